"""norm의 weight와 bias를 커널이 읽는 꼴로. 학습과 답 만들기가 함께 쓴다."""

from dataclasses import dataclass

import torch
from torch import nn

from utils.engine.family import Family


@dataclass(frozen=True)
class Norm:
    """norm 하나의 fp32 [폭]. Gemma의 1을 더해 두었다. bias는 없으면(RMSNorm) None이다."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def read_norm(module: nn.Module | None, family: Family, scale: float = 1.0) -> Norm | None:
    """norm의 weight와 bias를 fp32로 읽고 `scale`을 곱한다. norm이 없는 자리면 None이다."""
    if module is None:
        return None
    bias = getattr(module, "bias", None)
    weight = (module.weight.detach().float() + family.norm_offset) * scale
    return Norm(weight.contiguous(), None if bias is None else bias.detach().float() * scale)
