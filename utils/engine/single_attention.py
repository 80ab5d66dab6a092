"""블록 하나가 문서 하나일 때의 attention. 문서의 경계를 볼 것이 없어 cuDNN의 평범한 인과 attention을 쓴다.

cuDNN은 Hopper의 wgmma로 곱해 flash보다 빠르다. 여러 문서를 떼어 놓지는 못한다.
"""

import torch

from utils.data.blocks import IGNORE, document_ids
from utils.engine.attention import Documents, FormulaAttention


def is_single(batch: dict[str, torch.Tensor]) -> bool:
    """블록마다 첫 문서만 배우는지. 끝을 채운 문서는 배우지 않으므로, 앞 문서를 보게 두어도 배우는 것이 같다.

    GPU에 있는 batch는 기다려야 알 수 있으므로 아니라고 본다.
    """
    labels, positions = batch["labels"], batch["position_ids"]
    return not labels.is_cuda and not bool(((labels != IGNORE) & (document_ids(positions) > 1)).any())


class SingleAttention:
    """cuDNN의 인과 attention. q, k, v의 모양은 `attention.Attention`과 같고 블록마다 문서가 하나여야 한다."""

    name = "cuDNN"

    def __init__(self, scale: float):
        self.scale = scale

    def forward(self, q, k, v, documents: Documents, window: int = 0) -> tuple[torch.Tensor, list]:
        q, k, v = (self._heads_first(part, documents) for part in (q, k, v))
        out, log_sum, _, _, *lengths, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=self.scale)
        return self._tokens_first(out), [log_sum, seed, offset, lengths]

    def backward(self, gradient, q, k, v, out, saved: list, documents: Documents, window: int = 0) -> list:
        log_sum, seed, offset, lengths = saved
        # torch는 q, k, v의 간격이 같으면 앞서 세운 계획을 다시 쓰고, gradient의 간격은 보지 않는다. 늘 이어 준다
        gradient = gradient.contiguous()
        gradient, q, k, v, out = (self._heads_first(part, documents) for part in (gradient, q, k, v, out))
        parts = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            gradient, q, k, v, out, log_sum, seed, offset, None, None, None, *lengths, 0.0, True, scale=self.scale)
        return [self._tokens_first(part) for part in parts]

    @staticmethod
    def _heads_first(part: torch.Tensor, documents: Documents) -> torch.Tensor:
        return part.unflatten(0, documents.positions.shape).transpose(1, 2)

    @staticmethod
    def _tokens_first(part: torch.Tensor) -> torch.Tensor:
        return part.transpose(1, 2).flatten(0, 1)


def choose_single(heads: int, kv_heads: int, head_dim: int, scale: float, dtype: torch.dtype,
                  device: torch.device) -> SingleAttention | None:
    """이 장치에서 더 빠르고 torch 식과 같은 답(forward와 backward)을 내면 `SingleAttention`, 아니면 None."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return None
    generator = torch.Generator(device).manual_seed(0)
    q, gradient = torch.randn(2, 128, heads, head_dim, dtype=dtype, device=device, generator=generator)
    k, v = torch.randn(2, 128, kv_heads, head_dim, dtype=dtype, device=device, generator=generator)
    documents = Documents.find(torch.arange(64, device=device).expand(2, 64), 1)
    answers = []
    for attention in (FormulaAttention(scale), SingleAttention(scale)):
        try:
            out, saved = attention.forward(q, k, v, documents)
            answers.append([out, *attention.backward(gradient, q, k, v, out, saved, documents)])
            torch.cuda.synchronize()
        except RuntimeError:
            return None
    same = all((a - b).float().norm() < 0.02 * b.float().norm() for b, a in zip(*answers, strict=True))
    return attention if same else None
