"""micro-step의 모양: 블록 몇 개의 gradient를 더하는 것(`Step`)과, 학습 루프가 쓰는 것(`RunningStep`)."""

from typing import Protocol

import torch

Batch = dict[str, torch.Tensor]


class Step(Protocol):
    """micro-step 하나를 계산하는 길.

    batch는 `input_ids`, `labels`, `position_ids`가 모두 [rows, block]이고, dropout의 시드 `keys`는 [rows, 2]다. 선호
    쌍이면 `reference`와 `beta`도 있다. 손실은 `model/objective.py`가 정한다.
    """

    path: str  # 어느 길인지 설명하는 한 줄

    def options(self, batch: Batch) -> dict:
        """CPU에 있는 `batch`를 보고 정하는 `train`과 `evaluate`의 인자. CUDA graph는 이것마다 따로 찍는다."""

    def train(self, batch: Batch, **options) -> torch.Tensor:
        """`batch["factor"]`를 곱한 손실의 gradient를 `.grad`에 더하고 그 손실(`objective.objective`)을 돌려준다."""

    def evaluate(self, batch: Batch, **options) -> torch.Tensor:
        """dropout 없이 구한 값(`objective.measured`): 음의 로그 가능도의 합, 선호 쌍이면 쌍마다의 값."""

    def release(self) -> None:
        """잡아 둔 메모리를 놓는다."""

    def recompute_more(self) -> bool:
        """backward에서 재계산하는 층을 늘린다. 더 늘릴 수 없으면 False."""


class RunningStep(Protocol):
    """루프가 쓰는 micro-step: 한 번에 몇 블록을 계산할지 알고, 끝나면 모델을 되돌려 준다."""

    path: str
    rows: int  # 한 번에 계산하는 블록의 수

    def train(self, batch: Batch) -> torch.Tensor: ...

    def evaluate(self, batch: Batch) -> torch.Tensor: ...

    def close(self) -> None: ...
