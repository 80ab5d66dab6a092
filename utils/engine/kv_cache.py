"""KV cache: 위치 PAGE개마다 메모리 한 쪽이다. 쪽의 자리와, 쪽을 더하고 돌려주는 일."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from utils.engine.family import Family

PAGE = 512  # 한 쪽의 위치의 수


@dataclass(frozen=True)
class PageLayout:
    """KV cache 한 쪽의 자리(바이트). 값, 배율, rotary의 차례다.

    Attributes:
        group: int8 값 몇 개가 배율 하나를 함께 쓰는지.
        scales, turns: 배율과 rotary가 시작하는 자리.
        size: 한 쪽의 크기.
    """

    group: int
    scales: int
    turns: int
    size: int

    @classmethod
    def of(cls, family: Family) -> "PageLayout":
        group = 16 if family.head_dim % 32 else 32
        values = 2 * family.layers * family.kv_heads * PAGE * family.head_dim
        scales = values // group * 2
        turns = len(family.rotary_kinds) * PAGE * (family.rotary // 2) * 8
        return cls(group, values, values + scales, values + scales + turns)


class KvCache:
    """층마다의 K, V. 위치 PAGE개마다 메모리 한 쪽이고, 대화가 길어지면 쪽을 더한다.

    Attributes:
        table: 쪽의 주소 int64 [쪽의 최대 수]. 커널이 읽는다. 주면 그 메모리를 쓴다.
        capacity: 지금 담을 수 있는 위치의 수.
    """

    def __init__(self, family: Family, rotary: tuple, device: torch.device, table: torch.Tensor | None = None):
        self._family, self._layout, self._rotary, self._device = family, PageLayout.of(family), rotary, device
        self._pages: list[torch.Tensor] = []
        pages = -(-family.context // PAGE)
        self.table = torch.zeros(pages, dtype=torch.int64, device=device) if table is None else table

    @property
    def capacity(self) -> int:
        return len(self._pages) * PAGE

    def fits(self, free: float) -> int:
        """`free`바이트가 더 있을 때 담을 수 있는 위치의 수. 질문을 읽으며 층 하나의 K, V를 푸는 자리도 센다."""
        widened = 2 * self._family.kv_heads * self._family.head_dim * 2 * PAGE
        return int((free + len(self._pages) * self._layout.size) // (self._layout.size + 2 * widened)) * PAGE

    def lines_that_fit(self, lengths: list[int], free: float) -> int:
        """`free`바이트가 더 있을 때, 길이가 `lengths`인 줄들의 앞에서 몇 줄까지 저마다의 쪽에 담을 수 있는지."""
        pages = [-(-length // PAGE) for length in lengths]
        room = (self.fits(free) - self.capacity) // PAGE
        return sum(together <= room for together in accumulate(pages))

    def grow(self, tokens: int) -> None:
        """위치 `tokens`개를 담을 수 있게 쪽을 더한다."""
        while self.capacity < tokens:
            page = torch.zeros(self._layout.size, dtype=torch.uint8, device=self._device)
            page[self._layout.turns :].copy_(self._turns(self.capacity).view(torch.uint8).flatten())
            self.table[len(self._pages)] = page.data_ptr()
            self._pages.append(page)

    def clear(self) -> None:
        """모든 쪽을 돌려준다."""
        self._pages.clear()

    def _turns(self, begin: int) -> torch.Tensor:
        """begin부터 PAGE개 위치의 (cos, sin) fp32 [rotary의 종류, PAGE, rotary / 2, 2]. transformers와 같은 수다."""
        positions = torch.arange(begin, begin + PAGE, device=self._device, dtype=torch.float32)[:, None]
        kinds = []
        for inv_freq, scaling in self._rotary:
            angles = positions * inv_freq.to(self._device, torch.float32)
            kinds.append(torch.stack((angles.cos(), angles.sin()), -1) * scaling)
        return torch.stack(kinds).contiguous()
