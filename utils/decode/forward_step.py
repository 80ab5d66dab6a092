"""transformers의 forward 한 번: cache에 잇거나, 처음부터 하거나, CUDA graph로 한다. `read`로 읽고 `next`로 잇는다."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import StaticCache

PREFILL = 512  # 질문을 이만큼씩 나누어 읽어서 긴 질문도 메모리를 조금만 쓴다


class EagerStep:
    """forward를 그대로 부르는 단계. 줄의 길이가 다르면 왼쪽을 채운다.

    왼쪽을 채우면 모든 줄의 마지막 토큰이 같은 열에 서므로 로짓을 한 열에서 읽고, 새 토큰도 한 열에 쓴다.
    """

    def __init__(self, forward, cache, device: torch.device):
        self._forward = forward
        self._cache = cache
        self._device = device

    def read(self, questions: list[list[int]]) -> torch.Tensor:
        """질문들을 읽고 다음 토큰의 로짓 [rows, vocab]을 준다."""
        ids, mask, positions = pad_left(questions, self._device)
        padded = bool((mask == 0).any())  # 채운 자리가 없으면 mask를 주지 않는다. 더 빠른 attention을 쓸 수 있다
        for begin in range(0, ids.shape[1], PREFILL):
            part = slice(begin, begin + PREFILL)
            seen = mask[:, : begin + PREFILL]  # cache에 든 것과 이번 조각: [rows, 지금까지]
            logits = self._forward(ids[:, part], positions[:, part], seen if padded else None, self._cache)
        self._mask, self._position = mask if padded else None, positions[:, -1:]
        return logits

    def next(self, tokens: list[int]) -> torch.Tensor:
        """줄마다 토큰 하나를 먹이고 그다음의 로짓 [rows, vocab]을 준다."""
        self._position = self._position + 1
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)  # 새 토큰은 모든 줄에서 진짜다
        ids = torch.tensor(tokens, device=self._device)[:, None]  # [rows] -> [rows, 1]
        return self._forward(ids, self._position, self._mask, self._cache)


class FreshStep:
    """cache 없이 처음부터 다시 계산하는 단계. 한 줄만 받는다."""

    def __init__(self, forward, device: torch.device):
        self._forward, self._device = forward, device

    def read(self, questions: list[list[int]]) -> torch.Tensor:
        """질문을 읽고 다음 토큰의 로짓 [1, vocab]을 준다."""
        self._ids = list(questions[0])
        return self._again()

    def next(self, tokens: list[int]) -> torch.Tensor:
        """토큰 하나를 붙이고 그다음의 로짓 [1, vocab]을 준다."""
        self._ids += tokens
        return self._again()

    def _again(self) -> torch.Tensor:
        """지금까지의 글 전체의 forward. 마지막 토큰의 로짓 [1, vocab]."""
        ids = torch.tensor([self._ids], device=self._device)  # [1, 지금까지]
        positions = torch.arange(ids.shape[1], device=self._device)[None]
        return self._forward(ids, positions, None, None)


class RereadStep:
    """글이 `edge`토큰을 넘는 순간 처음부터 다시 읽는 단계. 길이에 따라 rotary가 바뀌는 모델이 쓴다. 한 줄만 받는다.

    질문도 나누어 읽지 않는다. 앞 조각을 읽을 때는 아직 짧아서 뒤 조각과 다른 주파수로 돌린다.

    Args:
        new_cache: 빈 cache를 만드는 함수.
    """

    def __init__(self, forward, new_cache: Callable, device: torch.device, edge: int):
        self._forward, self._new_cache, self._device, self._edge = forward, new_cache, device, edge

    def read(self, questions: list[list[int]]) -> torch.Tensor:
        """질문을 읽고 다음 토큰의 로짓 [1, vocab]을 준다."""
        self._ids = list(questions[0])
        return self._read_from(0)

    def next(self, tokens: list[int]) -> torch.Tensor:
        """토큰 하나를 붙이고 그다음의 로짓 [1, vocab]을 준다."""
        self._ids += tokens
        return self._read_from(0 if len(self._ids) == self._edge + 1 else len(self._ids) - 1)

    def _read_from(self, begin: int) -> torch.Tensor:
        """`begin`번째 토큰부터 읽는다. 처음부터면 새 cache에 읽는다. 마지막 토큰의 로짓 [1, vocab]."""
        if begin == 0:
            self._cache = self._new_cache()
        ids = torch.tensor([self._ids[begin:]], device=self._device)  # [1, 새로 읽을 토큰]
        positions = torch.arange(begin, len(self._ids), device=self._device)[None]
        return self._forward(ids, positions, None, self._cache)


class CapturedStep:
    """크기를 정해 둔 StaticCache와, 토큰 하나의 forward를 캡처한 CUDA graph.

    graph는 캡처할 때의 주소를 읽고 쓰므로 토큰 [rows, 1], 위치 [rows, 1], mask [rows, capacity], cache의 자리가 모두
    처음부터 끝까지 그대로다. mask는 아직 쓰지 않은 뒤쪽 자리까지 1이다: 지금 위치보다 뒤의 자리는 transformers가
    가린다.

    Attributes:
        rows, capacity: cache가 담는 줄과 토큰의 수.
        adapter_on: 캡처할 때 어댑터가 켜져 있었는지.
    """

    adapter_on = True

    def __init__(self, forward, config, device: torch.device, rows: int, capacity: int):
        self.rows = rows
        self.capacity = capacity
        self._forward = forward
        self._device = device
        self._cache = StaticCache(config=config, max_cache_len=capacity)
        self._ids, self._positions = (torch.zeros(rows, 1, dtype=torch.long, device=device) for _ in range(2))
        self._mask = torch.ones(rows, capacity, dtype=torch.long, device=device)
        if device.type == "cuda":
            self._capture()

    def reset(self) -> None:
        self._cache.reset()

    def read(self, questions: list[list[int]]) -> torch.Tensor:
        """질문들을 읽고 다음 토큰의 로짓 [질문의 수, vocab]을 준다. 모자라는 줄은 첫 질문으로 채운다."""
        self._count = len(questions)
        spare = self.rows - len(questions)
        ids, mask, positions = pad_left(questions + questions[:1] * spare, self._device)
        self._mask.fill_(1)
        self._mask[:, : ids.shape[1]] = mask
        self._positions.copy_(positions[:, -1:])
        for begin in range(0, ids.shape[1], PREFILL):
            part = slice(begin, begin + PREFILL)
            # mask를 함께 주어야 아직 쓰지 않은 cache의 0을 읽지 않는다
            logits = self._forward(ids[:, part], positions[:, part], self._mask[:, : begin + PREFILL], self._cache)
        return logits[: self._count]

    def next(self, tokens: list[int]) -> torch.Tensor:
        """줄마다 토큰 하나를 먹이고 그다음의 로짓 [질문의 수, vocab]을 준다."""
        self._ids[: self._count, 0] = torch.tensor(tokens, device=self._device)
        self._positions.add_(1)
        self._graph.replay()
        return self._logits[: self._count]

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # cuBLAS의 작업 공간처럼 처음 부를 때만 잡는 것을 캡처하기 전에 잡는다
                self._forward(self._ids, self._positions, self._mask, self._cache)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._forward(self._ids, self._positions, self._mask, self._cache)


class Padded(NamedTuple):
    """왼쪽을 채운 질문들의 토큰과 mask와 위치. 모두 [질문의 수, 가장 긴 질문] int64."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


def pad_left(questions: list[list[int]], device: torch.device) -> Padded:
    """질문들의 왼쪽을 0으로 채워 길이를 맞춘다."""
    longest = max(map(len, questions))
    ids = torch.zeros(len(questions), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(questions):
        ids[row, longest - len(question):] = torch.tensor(question)
        mask[row, longest - len(question):] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # 진짜 토큰만 0부터 센다. mask 0 0 1 1 1 -> 0 0 0 1 2
    return Padded(ids.to(device), mask.to(device), positions.to(device))
