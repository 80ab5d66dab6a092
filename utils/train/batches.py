"""블록을 micro batch로 나누는 법: 섞는 순서, 모자라는 자리, 블록마다의 dropout 시드."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from utils.data.blocks import IGNORE
from utils.model.objective import is_preference
from utils.train.group import ALONE, Group
from utils.train.micro_step import Batch


@dataclass(frozen=True)
class MicroBatches:
    """이 프로세스가 epoch마다 배울 블록의 번호들. 순서는 seed와 epoch만으로 정해진다.

    모자라는 자리는 -1로 채운다. 학습은 그 자리를 정답이 없는 블록으로 읽으므로 손실과 gradient가 변하지 않는다.

    Attributes:
        size: 블록의 수.
        rows: micro batch의 블록 수.
        accumulation: optimizer step마다 이 프로세스가 계산하는 micro batch의 수.
    """

    size: int
    rows: int
    accumulation: int
    seed: int
    group: Group = ALONE

    @property
    def per_epoch(self) -> int:
        """epoch마다의 micro batch 수."""
        return math.ceil(self.size / (self.rows * self.group.world))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.per_epoch / self.accumulation)

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """epoch의 optimizer step마다, 거기서 배울 micro batch들(블록 번호의 목록)."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        stride = self.rows * self.group.world  # 모든 프로세스가 한 번에 계산하는 블록의 수
        order += [-1] * (self.per_epoch * stride - self.size)
        # 섞은 순서를 rows개씩 프로세스에 돌아가며 나눈다. 프로세스가 둘이고 rows가 2면 0번은 order의 0, 1번과 4, 5번을,
        # 1번은 2, 3번과 6, 7번을 갖는다
        first = self.group.rank * self.rows
        micros = [order[at:at + self.rows] for at in range(first, len(order), stride)]
        return list(in_groups(micros, self.accumulation))


def evaluation_batches(size: int, rows: int, group: Group) -> list[list[int]]:
    """이 프로세스가 평가할 블록의 번호들. 프로세스마다 같은 수가 되도록 모자라는 자리를 -1로 채운다.

    `rank`번부터 `world` 간격으로 갖는다. 가장 많이 갖는 것이 ceil(size / world)개이고, 그것을 `rows`의 배수로 올린다.
    """
    mine = list(range(group.rank, size, group.world))
    most = math.ceil(size / group.world)
    share = math.ceil(most / rows) * rows
    mine += [-1] * (share - len(mine))
    return list(in_groups(mine, rows))


def in_groups(values: list, size: int) -> Iterator[list]:
    """차례대로 `size`개씩. 마지막 묶음은 모자랄 수 있다."""
    for begin in range(0, len(values), size):
        yield values[begin:begin + size]


def read_blocks(dataset, indices: list[int], pin: bool = False) -> Batch:
    """블록들을 [rows, ...] 모양의 tensor로 쌓는다. -1번은 정답도 선호 쌍도 없는 블록이다.

    Args:
        pin: GPU로 빨리 옮길 수 있는 메모리에 담는다.
    """
    blocks = [dataset[max(index, 0)] for index in indices]
    batch = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
    empty = [index < 0 for index in indices]
    batch["labels"][empty] = IGNORE
    if is_preference(batch):
        batch["reference"][empty] = torch.nan
    return {name: value.pin_memory() for name, value in batch.items()} if pin else batch


def n_targets(batch: Batch) -> torch.Tensor:
    """손실을 이 수로 나눈다(int64 스칼라): 정답이 있는 토큰, 선호 쌍이면 쌍. 블록의 첫 토큰은 아무도 맞히지 않는다."""
    if is_preference(batch):
        return (~batch["reference"][:, 0::2].isnan()).sum()
    return (batch["labels"][:, 1:] != IGNORE).sum()


def block_key(*parts: int) -> tuple[int, int]:
    """정수들로 정해지는 두 32비트 수(부호 있음). splitmix64로 섞는다.

    이웃한 정수(step 10의 블록 3과 4)에서도 서로 닮지 않은 수가 나와야, 블록마다의 dropout이 독립이다.
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    low, high = state & 0xFFFFFFFF, state >> 32
    # 2^31 이상이면 2^32를 빼 int32의 범위로 옮긴다. 비트는 그대로다
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def split_rows(batch: Batch, rows: int) -> list[Batch]:
    """블록의 묶음을 `rows` 블록씩 나눈다."""
    size = len(batch["input_ids"])
    return [{name: value[at:at + rows] for name, value in batch.items()} for at in range(0, size, rows)]


def count_documents(dataset) -> int:
    """한 블록에 든 문서의 최대 수. dataset이 `max_documents`를 알면 그것을 쓴다."""
    if dataset is None:
        return 1
    if hasattr(dataset, "max_documents"):
        return dataset.max_documents
    positions = (dataset[index]["position_ids"] for index in range(len(dataset)))
    return max(int((each == 0).sum()) for each in positions)  # 문서마다 0이 하나 있다
