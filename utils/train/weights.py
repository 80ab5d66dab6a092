"""배우는 가중치(LoRA)와 그 gradient: 지우기, 프로세스들의 합, 크기 줄이기, 파일에 쓰고 읽기."""

from copy import copy
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from utils.model.folder import ADAPTER_WEIGHTS
from utils.train.group import Group


class Weights(Protocol):
    """배우는 가중치. 프로세스마다 온전히 있거나(`ReplicatedWeights`) 나뉘어 있다(`fsdp.ShardedWeights`).

    모든 메서드는 모든 프로세스가 함께 부른다.
    """

    parameters: list[nn.Parameter]  # optimizer가 고칠 것
    scaler: torch.amp.GradScaler  # fp16이 아니면 아무것도 하지 않는다

    def zero_gradients(self) -> None: ...

    def sum_gradients(self) -> None:
        """프로세스들의 gradient를 더한다."""

    def clip_gradients(self, limit: float) -> torch.Tensor:
        """gradient의 크기를 `limit` 아래로 줄이고 줄이기 전의 크기(스칼라)를 돌려준다."""

    def save_adapter(self, folder: Path) -> None:
        """PEFT가 읽는 어댑터를 폴더에 쓴다."""

    def load_adapter(self, folder: Path) -> None: ...

    def optimizer_file(self, folder: Path) -> Path:
        """이 프로세스의 optimizer 상태가 담긴 파일."""

    def writes_optimizer(self) -> bool:
        """이 프로세스가 optimizer 상태를 쓰는지."""


class ReplicatedWeights:
    """프로세스마다 온전히 있는 LoRA 가중치. gradient는 이어 붙인 fp32 tensor 하나이고 `.grad`는 그 조각이다.

    0으로 지우기, 크기 재기, 여러 프로세스의 합이 저마다 연산 하나로 끝나고, CUDA graph가 가리키는 주소가 변하지 않는다.

    Attributes:
        gradients: [배우는 매개변수의 수], fp32.
    """

    def __init__(self, model: nn.Module, group: Group, fp16: bool = False):
        self.model, self.group = model, group
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        count = sum(parameter.numel() for parameter in self.parameters)
        self.gradients = torch.zeros(count, dtype=torch.float32, device=device)
        start = 0
        for parameter in self.parameters:
            # bf16의 눈금은 값의 1/128이라 그보다 훨씬 작은 갱신은 사라진다. 그래서 LoRA 가중치는 fp32로 둔다
            parameter.data = parameter.data.float()
            stop = start + parameter.numel()
            parameter.grad = self.gradients[start:stop].view_as(parameter)  # 복사가 아니라 같은 메모리의 다른 모양이다
            start = stop

    def zero_gradients(self) -> None:
        self.gradients.zero_()

    def sum_gradients(self) -> None:
        self.group.add_up(self.gradients)

    def clip_gradients(self, limit: float) -> torch.Tensor:
        """g <- g min(1, limit / |g|). 더한 1e-6은 0으로 나누지 않게 한다(`torch.nn.utils.clip_grad_norm_`과 같다)."""
        norm = self.gradients.norm()
        self.gradients.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def save_adapter(self, folder: Path) -> None:
        if self.group.is_first:
            write_adapter(get_peft_model_state_dict(self.model), self.model.peft_config["default"], folder)

    def load_adapter(self, folder: Path) -> None:
        set_peft_model_state_dict(self.model, load_file(folder / ADAPTER_WEIGHTS))

    def optimizer_file(self, folder: Path) -> Path:
        return folder / "optimizer.pt"

    def writes_optimizer(self) -> bool:
        return self.group.is_first


def write_adapter(state: dict[str, torch.Tensor], config: PeftConfig, folder: Path) -> None:
    """PEFT가 읽는 두 파일(가중치와 설정)을 쓴다.

    `save_pretrained`를 부르지 않는 이유: 저장할 때마다 영어 양식의 README.md를 함께 만들며 시간의 대부분을 쓴다.

    Args:
        state: PEFT가 파일에 적는 이름 -> LoRA의 A [r, 입력]나 B [출력, r], fp32.
    """
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    for_inference = copy(config)
    for_inference.inference_mode = True  # 읽는 쪽은 답하려고 읽는다. 배우던 설정은 그대로 둔다
    for_inference.save_pretrained(folder)
