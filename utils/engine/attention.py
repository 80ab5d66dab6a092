"""한 블록에 든 문서들이 서로를 보지 않는 인과 attention. 모양이 고정되어 CUDA graph로 찍을 수 있다.

문서의 경계는 `Documents`가 tensor로 담는다. 구현은 넷이고 `choose_attention`이 실제로 돌려 보아 고른다:
flash(문서마다의 계산만 한다), memory-efficient(같은 일을 하고 Turing과 Windows에서도 돈다), torch 식(어디서나),
그것을 문서마다 하는 것(CPU).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from utils.data.blocks import document_mask


@dataclass(frozen=True)
class Documents:
    """micro batch 하나에 든 문서들의 경계.

    Attributes:
        positions: 문서마다 0부터 다시 시작하는 자리 [rows, block].
        offsets: 이어 붙인 토큰에서 문서가 시작하는 곳 [capacity + 1] int32. 남는 자리는 토큰의 수다.
        single: 블록마다 첫 문서만 배운다(`single_attention.is_single`).
    """

    positions: torch.Tensor
    offsets: torch.Tensor
    single: bool = False

    @classmethod
    def find(cls, positions: torch.Tensor, capacity: int, single: bool = False) -> "Documents":
        """`capacity`는 문서의 수보다 작으면 안 된다. 크기를 모양으로만 정하므로 GPU를 기다리지 않는다."""
        starts = positions.flatten() == 0
        tokens = starts.numel()
        rank = torch.where(starts, starts.cumsum(0) - 1, capacity + 1)
        offsets = torch.full((capacity + 2,), tokens, dtype=torch.int32, device=positions.device)
        offsets.scatter_(0, rank, torch.arange(tokens, dtype=torch.int32, device=positions.device))
        return cls(positions, offsets[:capacity + 1].clone(), single)

    @property
    def longest(self) -> int:
        return self.positions.shape[1]


class Attention(Protocol):
    """attention의 구현이 지키는 약속.

    q는 [tokens, heads, head_dim], k와 v는 [tokens, kv_heads, head_dim]이고 마지막 축만 이어져 있으면 된다. kv_heads가
    적으면 q의 머리 `heads / kv_heads`개가 k와 v 하나를 함께 읽는다. window는 볼 수 있는 토큰의 수이고 0이면 모두 본다.
    """

    name: str

    def forward(self, q, k, v, documents: Documents, window: int = 0) -> tuple[torch.Tensor, list]:
        """출력 [tokens, heads, head_dim]과, backward에 필요한 것."""

    def backward(self, gradient, q, k, v, out, saved: list, documents: Documents, window: int = 0) -> list:
        """q, k, v의 gradient. 모양은 q, k, v와 같다."""


class FlashAttention:
    """FlashAttention-2의 가변 길이 커널. 여러 q의 머리가 함께 읽는 k와 v, 창을 그대로 안다.

    backward는 dq를 키의 묶음마다 atomic으로 더해, 긴 문서에서는 더하는 차례가 그때그때 다르다. `exact`면 묶음마다 따로
    적어 두고 차례대로 더하는 라이브러리의 방식을 쓴다.
    """

    def __init__(self, scale: float, exact: bool = False):
        self.scale, self.exact = scale, exact
        self.name = "비트까지 같은 flash" if exact else "flash"

    def forward(self, q, k, v, documents: Documents, window: int = 0):
        offsets, longest = documents.offsets, documents.longest
        out, *saved, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, offsets, offsets, longest, longest, 0.0, True, False, scale=self.scale, **self._window(window))
        return out, saved

    def backward(self, gradient, q, k, v, out, saved, documents: Documents, window: int = 0):
        log_sum, state, unused = saved
        offsets, longest = documents.offsets, documents.longest
        with _deterministic(self.exact):
            return torch.ops.aten._flash_attention_backward(
                gradient, q, k, v, out, log_sum, offsets, offsets, longest, longest, 0.0, True, state, unused,
                scale=self.scale, **self._window(window))

    def _window(self, window: int) -> dict:
        return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


class EfficientAttention:
    """xFormers에서 온 memory-efficient 커널. k와 v를 q의 머리 수만큼 늘려서 준다."""

    name = "memory-efficient"

    def __init__(self, scale: float):
        self.scale = scale

    def forward(self, q, k, v, documents: Documents, window: int = 0):
        offsets, longest = documents.offsets, documents.longest
        k, v = _repeat(k, q), _repeat(v, q)
        out, *saved = torch.ops.aten._efficient_attention_forward(
            q[None], k[None], v[None], None, offsets, offsets, longest, longest, 0.0, 1, True, scale=self.scale,
            window_size=window or None)[:4]
        return out[0], saved

    def backward(self, gradient, q, k, v, out, saved, documents: Documents, window: int = 0):
        log_sum, seed, offset = saved
        offsets, longest = documents.offsets, documents.longest
        kv_heads = k.shape[1]
        k, v = _repeat(k, q), _repeat(v, q)
        dq, dk, dv = torch.ops.aten._efficient_attention_backward(
            gradient[None], q[None], k[None], v[None], None, out[None], offsets, offsets, longest, longest, log_sum,
            0.0, seed, offset, 1, False, scale=self.scale, window_size=window or None)[:3]
        return [dq[0], _gather(dk[0], kv_heads), _gather(dv[0], kv_heads)]


class FormulaAttention:
    """점수 행렬을 그대로 만드는 식. 확률을 저장하지 않고 backward에서 다시 구한다.

    P = softmax(scale * q k^T), out = P v라 하면 dv = P^T dout, dP = dout v^T이고, softmax의 backward는
    dS = P * (dP - sum(dP * P))다. 그래서 dq = scale * dS k, dk = scale * dS^T q다.
    """

    name = "torch 식"

    def __init__(self, scale: float):
        self.scale = scale

    def forward(self, q, k, v, documents: Documents, window: int = 0):
        k, v = _repeat(k, q), _repeat(v, q)
        q, k, v = (self._heads_first(part, documents) for part in (q, k, v))
        return self._tokens_first(self._weights(q, k, documents, window) @ v), []

    def backward(self, gradient, q, k, v, out, saved, documents: Documents, window: int = 0):
        kv_heads = k.shape[1]
        k, v = _repeat(k, q), _repeat(v, q)
        gradient, q, k, v = (self._heads_first(part, documents) for part in (gradient, q, k, v))
        weights = self._weights(q, k, documents, window)
        dv = weights.transpose(-1, -2) @ gradient
        scores = gradient @ v.transpose(-1, -2)
        scores = weights * (scores - (scores * weights).sum(-1, keepdim=True)) * self.scale
        dq, dk, dv = (self._tokens_first(part) for part in (scores @ k, scores.transpose(-1, -2) @ q, dv))
        return [dq, _gather(dk, kv_heads), _gather(dv, kv_heads)]

    def _weights(self, q, k, documents: Documents, window: int):
        scores = (q @ k.transpose(-1, -2)).float() * self.scale
        seen = document_mask(documents.positions)
        if window:
            seen = seen.triu(1 - window)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1).to(q.dtype)

    def _heads_first(self, part, documents: Documents):
        return part.unflatten(0, documents.positions.shape).transpose(1, 2)

    def _tokens_first(self, part):
        return part.transpose(1, 2).flatten(0, 1)


class DocumentAttention:
    """문서를 하나씩 torch 식으로 계산한다. 문서 밖의 자리를 셈하지 않으므로 CPU에서 빠르다. 모양이 batch마다 다르다."""

    name = "문서마다 torch 식"

    def __init__(self, scale: float):
        self.formula = FormulaAttention(scale)

    def forward(self, q, k, v, documents: Documents, window: int = 0):
        out = q.new_empty(q.shape)
        for span, alone in self._split(documents):
            out[span], _ = self.formula.forward(q[span], k[span], v[span], alone, window)
        return out, []

    def backward(self, gradient, q, k, v, out, saved, documents: Documents, window: int = 0):
        gradients = [part.new_empty(part.shape) for part in (q, k, v)]
        for span, alone in self._split(documents):
            parts = self.formula.backward(gradient[span], q[span], k[span], v[span], None, [], alone, window)
            for whole, part in zip(gradients, parts, strict=True):
                whole[span] = part
        return gradients

    def _split(self, documents: Documents):
        positions = documents.positions.flatten()
        for start, end in pairwise(documents.offsets.unique_consecutive().tolist()):
            yield slice(start, end), Documents(positions[None, start:end], documents.offsets)


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """라이브러리가 atomic 없이 계산하게 한다. 새로 잡은 메모리를 NaN으로 채우는 일은 시간만 들어 하지 않는다."""
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def choose_attention(heads: int, kv_heads: int, head_dim: int, scale: float, windowed: bool, dtype: torch.dtype,
                     device: torch.device, exact: bool = False) -> Attention:
    """이 장치에서 돌고 torch 식과 같은 답(forward와 backward)을 내는 가장 빠른 구현을 고른다.

    Args:
        windowed: 창이 있는 층이 있는지. 있으면 창을 걸어서도 해 본다.
        exact: 두 번 계산해도 비트까지 같은 backward를 쓴다.
    """
    if device.type == "cpu":
        return DocumentAttention(scale)
    formula = FormulaAttention(scale)
    if device.type != "cuda":
        return formula
    generator = torch.Generator(device).manual_seed(0)
    q, gradient = torch.randn(2, 128, heads, head_dim, dtype=dtype, device=device, generator=generator)
    k, v = torch.randn(2, 128, kv_heads, head_dim, dtype=dtype, device=device, generator=generator)
    positions = torch.cat([torch.arange(50), torch.arange(14), torch.arange(64)]).view(2, 64).to(device)
    documents = Documents.find(positions, 8)
    windows = (0, 20) if windowed else (0,)

    def run(attention: Attention) -> list[torch.Tensor]:
        answers = []
        for window in windows:
            out, saved = attention.forward(q, k, v, documents, window)
            answers += [out, *attention.backward(gradient, q, k, v, out, saved, documents, window)]
        return answers

    wanted = run(formula)
    for attention in (FlashAttention(scale, exact), EfficientAttention(scale)):
        try:
            got = run(attention)
            torch.cuda.synchronize()
        except RuntimeError:
            continue
        if all((a - b).float().norm() < 0.02 * b.float().norm() for a, b in zip(got, wanted, strict=True)):
            return attention
    return formula


def _repeat(part: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """k나 v [tokens, kv_heads, head_dim]을 q의 머리 수만큼 늘린다."""
    times = q.shape[1] // part.shape[1]
    return part if times == 1 else part.repeat_interleave(times, 1)


def _gather(gradient: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """함께 읽은 머리들의 gradient를 더해 [tokens, kv_heads, head_dim]으로 되돌린다."""
    return gradient if gradient.shape[1] == kv_heads else gradient.unflatten(1, (kv_heads, -1)).sum(2)
