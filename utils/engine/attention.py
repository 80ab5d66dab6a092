"""한 블록에 든 문서들이 서로를 보지 않는 인과 attention을 맡는다. 모양이 고정되어 CUDA graph로 찍을 수 있다.

문서의 경계는 `Documents`가 tensor로 담는다. 구현은 넷이고 `choose_attention`이 실제로 돌려 보아 고른다:
flash(문서마다의 계산만 한다), memory-efficient(같은 일을 하고 Turing과 Windows에서도 돈다), torch 식(어디서나),
그것을 문서마다 하는 것(CPU).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from utils.data.blocks import document_mask


@dataclass(frozen=True)
class Documents:
    """micro batch 하나에 든 문서들의 경계.

    Attributes:
        positions: 문서마다 0부터 다시 시작하는 자리 [rows, block].
        offsets: 이어 붙인 토큰에서 문서가 시작하는 곳 [capacity + 1] int32. 남는 자리는 토큰의 수다.
    """

    positions: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def find(cls, positions: torch.Tensor, capacity: int) -> "Documents":
        """`capacity`는 문서의 수보다 작으면 안 된다. 크기를 모양으로만 정하므로 GPU를 기다리지 않는다."""
        starts = positions.flatten() == 0
        tokens = starts.numel()
        rank = torch.where(starts, starts.cumsum(0) - 1, capacity + 1)
        offsets = torch.full((capacity + 2,), tokens, dtype=torch.int32, device=positions.device)
        offsets.scatter_(0, rank, torch.arange(tokens, dtype=torch.int32, device=positions.device))
        return cls(positions, offsets[:capacity + 1].clone())

    @property
    def longest(self) -> int:
        return self.positions.shape[1]


class FlashAttention:
    """FlashAttention-2의 가변 길이 커널."""

    name = "flash"

    def forward(self, q, k, v, documents: Documents):
        """q, k, v: [tokens, heads, head_dim](사이가 떨어져 있어도 된다). 출력과, backward에 필요한 것을 돌려준다."""
        offsets, longest = documents.offsets, documents.longest
        out, *saved, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, offsets, offsets, longest, longest, 0.0, True, False, scale=q.shape[-1] ** -0.5)
        return out, saved

    def backward(self, gradient, q, k, v, out, saved, documents: Documents):
        log_sum, state, unused = saved
        offsets, longest = documents.offsets, documents.longest
        return torch.ops.aten._flash_attention_backward(
            gradient, q, k, v, out, log_sum, offsets, offsets, longest, longest, 0.0, True, state, unused,
            scale=q.shape[-1] ** -0.5)


class EfficientAttention:
    """xFormers에서 온 memory-efficient 커널."""

    name = "memory-efficient"

    def forward(self, q, k, v, documents: Documents):
        offsets, longest = documents.offsets, documents.longest
        out, *saved = torch.ops.aten._efficient_attention_forward(
            q[None], k[None], v[None], None, offsets, offsets, longest, longest, 0.0, 1, True,
            scale=q.shape[-1] ** -0.5)[:4]
        return out[0], saved

    def backward(self, gradient, q, k, v, out, saved, documents: Documents):
        log_sum, seed, offset = saved
        offsets, longest = documents.offsets, documents.longest
        gradients = torch.ops.aten._efficient_attention_backward(
            gradient[None], q[None], k[None], v[None], None, out[None], offsets, offsets, longest, longest, log_sum,
            0.0, seed, offset, 1, False, scale=q.shape[-1] ** -0.5)
        return [part[0] for part in gradients[:3]]


class FormulaAttention:
    """점수 행렬을 그대로 만드는 식. 확률을 저장하지 않고 backward에서 다시 구한다."""

    name = "torch 식"

    def forward(self, q, k, v, documents: Documents):
        q, k, v = (self._heads_first(part, documents) for part in (q, k, v))
        return self._tokens_first(self._weights(q, k, documents) @ v), []

    def backward(self, gradient, q, k, v, out, saved, documents: Documents):
        gradient, q, k, v = (self._heads_first(part, documents) for part in (gradient, q, k, v))
        weights = self._weights(q, k, documents)
        dv = weights.transpose(-1, -2) @ gradient
        scores = gradient @ v.transpose(-1, -2)
        scores = weights * (scores - (scores * weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        return [self._tokens_first(part) for part in (scores @ k, scores.transpose(-1, -2) @ q, dv)]

    def _weights(self, q, k, documents: Documents):
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        return scores.masked_fill(~document_mask(documents.positions), -torch.inf).softmax(-1).to(q.dtype)

    def _heads_first(self, part, documents: Documents):
        return part.unflatten(0, documents.positions.shape).transpose(1, 2)

    def _tokens_first(self, part):
        return part.transpose(1, 2).flatten(0, 1)


class DocumentAttention:
    """문서를 하나씩 torch 식으로 계산한다. 문서 밖의 자리를 셈하지 않으므로 CPU에서 빠르다. 모양이 batch마다 다르다."""

    name = "문서마다 torch 식"

    def __init__(self):
        self.formula = FormulaAttention()

    def forward(self, q, k, v, documents: Documents):
        out = torch.empty_like(q)
        for span, alone in self._split(documents):
            out[span], _ = self.formula.forward(q[span], k[span], v[span], alone)
        return out, []

    def backward(self, gradient, q, k, v, out, saved, documents: Documents):
        gradients = [torch.empty_like(part) for part in (q, k, v)]
        for span, alone in self._split(documents):
            parts = self.formula.backward(gradient[span], q[span], k[span], v[span], None, [], alone)
            for whole, part in zip(gradients, parts, strict=True):
                whole[span] = part
        return gradients

    def _split(self, documents: Documents):
        positions = documents.positions.flatten()
        for start, end in pairwise(documents.offsets.unique_consecutive().tolist()):
            yield slice(start, end), Documents(positions[None, start:end], documents.offsets)


def choose_attention(heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
    """이 장치에서 돌고 torch 식과 같은 답(forward와 backward)을 내는 가장 빠른 구현을 고른다."""
    if device.type == "cpu":
        return DocumentAttention()
    formula = FormulaAttention()
    if device.type != "cuda":
        return formula
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, gradient = torch.randn(4, 128, heads, head_dim, dtype=dtype, device=device, generator=generator)
    positions = torch.cat([torch.arange(50), torch.arange(14), torch.arange(64)]).view(2, 64).to(device)
    documents = Documents.find(positions, 8)
    wanted = [formula.forward(q, k, v, documents)[0], *formula.backward(gradient, q, k, v, None, [], documents)]
    for attention in (FlashAttention(), EfficientAttention()):
        try:
            out, saved = attention.forward(q, k, v, documents)
            got = [out, *attention.backward(gradient, q, k, v, out, saved, documents)]
            torch.cuda.synchronize()
        except RuntimeError:
            continue
        if all((a - b).float().norm() < 0.02 * b.float().norm() for a, b in zip(got, wanted, strict=True)):
            return attention
    return formula
