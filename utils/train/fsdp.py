"""모델을 여러 카드에 나누어 담는 학습(FSDP). `accelerate launch --use_fsdp`로 시작한다.

FSDP의 단위는 층 하나, 그리고 배우는 LoRA 행렬 하나다. 얼어 있는 것과 배우는 것이 한 단위에 섞이지 않아야 배우는 것만
모으고 쓸 수 있다. 기반 모델까지 모으는 `state_dict()`는 12.8b에서 저장 한 번에 십여 초가 걸린다.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from utils.data.blocks import IGNORE, shifted_targets
from utils.model.folder import ADAPTER_WEIGHTS
from utils.model.objective import measured, objective
from utils.train.autograd_step import recompute_all
from utils.train.group import Group
from utils.train.micro_step import Batch
from utils.train.parity import check_isolation
from utils.train.weights import write_adapter

MIXED = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
WRAPPED = "_fsdp_wrapped_module."


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype) -> FSDP:
    """모델을 카드들에 나눈다. 층의 중간값은 backward에서 다시 계산한다.

    Args:
        dtype: 계산하고 주고받는 dtype. 4비트 가중치도 이 dtype의 버퍼에 담겨 있다.
    """
    recompute_all(model)
    # 나누는 법은 accelerate launch의 플래그가 정한다
    accelerator = Accelerator(mixed_precision=MIXED[dtype], cpu=device.type == "cpu")
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
    plugin.set_mixed_precision(dtype, override=True)
    return accelerator.prepare(model)


class ShardedStep:
    """나뉜 모델의 micro-step. 층마다 가중치를 모아 계산하고 다시 흩는다. 출력 행렬도 나뉘어 logits를 한 번에 구한다."""

    path = "FSDP(모델을 여러 프로세스에 나눈다), 자동미분(손실은 한 번에), 모든 층을 재계산"

    def __init__(self, model: FSDP, rows: int, group: Group, device: torch.device):
        self.model = model
        self.rows = rows
        self.group = group
        self.device = device

    def _move(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _nll(self, batch: Batch) -> torch.Tensor:
        """자리마다의 음의 로그 가능도 [rows * block]."""
        logits = self.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), shifted_targets(batch["labels"]).flatten(),
                                           reduction="none", ignore_index=IGNORE)

    def train(self, batch: Batch) -> torch.Tensor:
        """gradient를 더하고 `factor * 손실`을 돌려준다."""
        self.model.train()
        batch = self._move(batch)
        loss = objective(self._nll(batch), batch)
        (loss.flatten()[0] * self.group.world).backward()  # FSDP는 프로세스들의 평균을 낸다
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """dropout 없이 구한 음의 로그 가능도의 합. 선호 쌍이면 쌍마다의 값(`objective.measured`)이다."""
        self.model.eval()
        batch = self._move(batch)
        return measured(self._nll(batch), batch)

    def check(self, vocab: int, block: int) -> None:
        """문서들이 서로를 보지 못함을 확인한다.

        Raises:
            UsageError: 문서가 서로를 본다.
        """
        check_isolation(self, vocab, self.rows, block, self.device, {})

    def close(self) -> None:
        """나뉜 모델은 되돌리지 않는다."""


class ShardedWeights:
    """카드마다 한 조각씩 나누어 가진 LoRA 가중치."""

    def __init__(self, model: FSDP, peft_config, group: Group, fp16: bool = False):
        self.model = model
        self.peft_config = peft_config
        self.group = group
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.scaler = ShardedGradScaler(self.parameters[0].device.type, enabled=fp16)

    def zero_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def sum_gradients(self) -> None:
        """FSDP가 backward에서 이미 더했다."""

    def clip_gradients(self, limit: float) -> torch.Tensor:
        return self.model.clip_grad_norm_(limit)

    def save_adapter(self, folder: Path) -> None:
        """조각들을 모아 쓴다. PEFT의 `save_pretrained`는 나뉜 모델에서 이름을 알아보지 못해 빈 파일을 남긴다."""
        state = {}
        for prefix, unit in self._units():
            with whole(unit):
                state |= {prefix + name: value.detach().float().cpu().clone()
                          for name, value in unit.module.named_parameters()}
        if self.group.is_first:
            write_adapter(state, self.peft_config, folder)

    def load_adapter(self, folder: Path) -> None:
        state = load_file(folder / ADAPTER_WEIGHTS)
        for prefix, unit in self._units():
            with whole(unit, writeback=True), torch.no_grad():
                for name, value in unit.module.named_parameters():
                    value.copy_(state[prefix + name])

    def _units(self) -> Iterator[tuple[str, FSDP]]:
        """배우는 FSDP 단위와, PEFT가 파일에 적는 이름의 앞부분."""
        for name, module in self.model.named_modules():
            if isinstance(module, FSDP) and any(own.requires_grad for own in module.module.parameters(recurse=False)):
                yield f"{name}.".replace(WRAPPED, "").replace(".default.", "."), module

    def optimizer_file(self, folder: Path) -> Path:
        return folder / f"optimizer-{self.group.rank}.pt"

    def writes_optimizer(self) -> bool:
        return True


@contextmanager
def whole(unit: FSDP, writeback: bool = False) -> Iterator[None]:
    """`with` 안에서 이 단위의 가중치를 온전한 모양으로 모은다. 모든 프로세스가 함께 부른다."""
    with FSDP.summon_full_params(unit, recurse=False, writeback=writeback):
        yield
