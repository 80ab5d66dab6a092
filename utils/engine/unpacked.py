"""NF4 가중치를 푸는 자리. 곧 쓸 것을 지금의 계산과 나란히 미리 푼다."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from utils.engine.train_layers import Projection
from utils.engine.train_memory import pad_row


@dataclass(frozen=True)
class Unpacked:
    """자리의 [start, end) 원소에 풀어 둔 가중치 [rows, columns + tail]. `ready`는 다른 stream에서 다 푼 때다."""

    start: int
    end: int
    projection: Projection
    weight: torch.Tensor
    ready: torch.cuda.Event | None = None


class Unpacker:
    """가중치를 쓰는 차례대로 풀어 준다. 한 곳을 여러 가중치와 logits가 번갈아 쓴다.

    푸는 일은 메모리를 읽고 쓰기만 하고, attention과 원소별 계산은 메모리를 다 쓰지 못한다. 그래서 앞으로 쓸 것을 자리가
    남는 만큼 미리 풀고, GPU에서는 다른 stream에서 나란히 한다. 차례는 처음 지나갈 때 적어 둔다.
    """

    def __init__(self, unpack: Callable[[Projection, torch.Tensor], torch.Tensor], buffer: torch.Tensor,
                 lent: torch.Tensor):
        """
        Args:
            unpack: 가중치를 1차원의 자리에 풀어 [rows, columns + tail]을 주는 함수.
            buffer: [원소의 수], 모델의 dtype.
            lent: logits가 쓸 자리. buffer를 모두 품는다.
        """
        self.unpack, self.buffer, self.lent = unpack, buffer, lent
        self.side = torch.cuda.Stream(buffer.device) if buffer.is_cuda else None
        self.orders: dict[str, list[Projection | None]] = {}  # 이름 -> 차례. None에서는 logits가 자리를 쓴다
        self.held: list[Unpacked] = []  # 쓰는 차례대로

    def begin(self, name: str) -> None:
        """이 이름의 차례를 처음부터 시작한다."""
        self.known = name in self.orders
        self.order, self.at = self.orders.setdefault(name, []), 0
        self.held.clear()

    def take(self, projection: Projection) -> torch.Tensor:
        """지금 쓸 가중치. 쓰는 일을 시작했으면 `give_back`을 부른다."""
        self._note(projection)
        if not self.held:
            self.held.append(self._unpack(projection, 0))
        first = self.held[0]
        if first.projection is not projection:
            raise RuntimeError("가중치를 쓰는 차례가 처음과 다르다")
        if first.ready is not None:
            torch.cuda.current_stream().wait_event(first.ready)
        return first.weight

    def give_back(self) -> None:
        """가장 앞의 가중치의 자리를 놓고, 남는 자리에 다음 것들을 푼다."""
        self.held.pop(0)
        if not self.known:
            return
        for projection in self.order[self.at + len(self.held):]:
            start = None if projection is None else self._find_room(size_of(projection))
            if start is None:
                return
            self.held.append(self._unpack_aside(projection, start))

    def lend(self) -> torch.Tensor:
        """logits가 쓸 자리. 푼 가중치가 하나도 남지 않은 때다."""
        self._note(None)
        return self.lent

    def _note(self, item: Projection | None) -> None:
        if not self.known:
            self.order.append(item)
        self.at += 1

    def _find_room(self, size: int) -> int | None:
        """원소 `size`개가 들어가는 가장 앞의 자리. 없으면 None."""
        start = 0
        for other in sorted(self.held, key=lambda other: other.start):
            if start + size <= other.start:
                break
            start = max(start, other.end)
        return start if start + size <= self.buffer.numel() else None

    def _unpack_aside(self, projection: Projection, start: int) -> Unpacked:
        """GPU면 다른 stream에서, 이 자리를 쓰던 계산이 끝나는 대로 푼다."""
        if self.side is None:
            return self._unpack(projection, start)
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            return replace(self._unpack(projection, start), ready=self.side.record_event())

    def _unpack(self, projection: Projection, start: int) -> Unpacked:
        weight = self.unpack(projection, self.buffer[start:])
        return Unpacked(start, start + size_of(projection), projection, weight)


def size_of(projection: Projection) -> int:
    """푼 가중치의 원소 수."""
    return projection.rows * pad_row(projection.columns + projection.tail)
