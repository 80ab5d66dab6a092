"""모델을 여러 카드에 나누어 담는 학습(FSDP)의 저장과 재개를 맡는다. 나뉜 것 가운데 배우는 것만 모은다.

기반 모델까지 모두 모으는 `state_dict()`는 12.8b에서 저장 한 번에 십여 초가 걸린다.
"""

from copy import copy
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from utils.checkpoint import ADAPTER
from utils.errors import UsageError

WRAPPED = "_fsdp_wrapped_module."


def gather_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """카드들에 나뉜 LoRA 가중치를 모아 CPU의 fp32로 돌려준다. 모든 프로세스가 함께 불러야 한다.

    Returns:
        PEFT가 파일에 적는 이름 -> 온전한 tensor.
    """
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, FSDP) and module._has_params and module._flat_param.requires_grad:
            prefix = f"{name}.".replace(WRAPPED, "").replace(".default.", ".")
            with FSDP.summon_full_params(module, recurse=False, writeback=False):
                for key, value in module.module.named_parameters():
                    state[prefix + key] = value.detach().float().cpu().clone()
    return state


def write_adapter(model: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    """모은 가중치와 설정을 쓴다. PEFT의 `save_pretrained`는 나뉜 모델에서 이름을 알아보지 못해 빈 파일을 남긴다."""
    save_file(state, folder / ADAPTER[1], metadata={"format": "pt"})
    config = copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(folder)


def read_adapter(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / ADAPTER[1])


def load_adapter(model: nn.Module, checkpoint: Path) -> None:
    """아직 나누지 않은 모델에 체크포인트의 LoRA 가중치를 넣는다."""
    set_peft_model_state_dict(model, read_adapter(checkpoint))


def optimizer_file(folder: Path, rank: int) -> Path:
    """프로세스 하나가 맡은 조각의 optimizer 상태."""
    return folder / f"optimizer-{rank}.pt"


def load_optimizer(optimizer, folder: Path, rank: int) -> None:
    """저장할 때와 같은 수의 프로세스에서, 제 조각의 optimizer 상태를 잇는다.

    Raises:
        UsageError: 이 프로세스의 조각이 없다.
    """
    file = optimizer_file(folder, rank)
    if not file.is_file():
        raise UsageError(f"{folder}은 프로세스의 수가 다른 실행에서 저장했다. --num_processes를 그때와 같게 적는다")
    optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
