"""블록을 micro batch로 나누는 일을 맡는다: 섞는 순서, 모자라는 자리, 블록마다의 dropout 씨앗."""

import math

import torch
from torch.utils.data import Dataset, Sampler

from utils.microstep import IGNORE


class MicroBatches(Sampler):
    """한 epoch의 블록을 섞어 이 프로세스의 micro-batch로 나눈다. 순서는 seed와 epoch만으로 정해진다.

    모자라는 자리는 -1로 채운다. 학습은 그 자리를 정답이 없는 블록으로 읽으므로 손실과 gradient가 변하지 않는다.
    """

    def __init__(self, trainer, size: int, rows: int):
        self.trainer, self.size, self.rows = trainer, size, rows
        self.rank, self.world = trainer.args.process_index, trainer.args.world_size

    def __len__(self) -> int:
        return math.ceil(self.size / (self.rows * self.world))

    def __iter__(self):
        args = self.trainer.args
        steps_per_epoch = math.ceil(len(self) / args.gradient_accumulation_steps)
        epoch = self.trainer.state.global_step // steps_per_epoch
        seed = args.seed if args.data_seed is None else args.data_seed
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        stride = self.rows * self.world
        order += [-1] * (len(self) * stride - self.size)
        for start in range(self.rank * self.rows, len(order), stride):
            yield order[start:start + self.rows]


class PaddedBlocks(Dataset):
    """-1번 블록을 정답이 없는 블록으로 읽어 주는 dataset."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        block = self.dataset[max(index, 0)]
        return block if index >= 0 else {**block, "labels": torch.full_like(block["labels"], IGNORE)}


def stack_blocks(blocks: list[dict]) -> dict:
    """묶인 블록들을 [rows, block] 모양의 tensor로 쌓는다."""
    return {name: torch.stack([block[name] for block in blocks]) for name in ("input_ids", "labels", "position_ids")}


def block_key(*parts: int) -> tuple[int, int]:
    """정수들로 정해지는 두 32비트 수(부호 있음). splitmix64로 섞는다."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    low, high = state & 0xFFFFFFFF, state >> 32
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def split_rows(batch: dict, rows: int) -> list[dict]:
    """블록의 묶음을 `rows` 블록씩 나눈다."""
    size = len(batch["input_ids"])
    return [{name: value[at:at + rows] for name, value in batch.items()} for at in range(0, size, rows)]


def count_documents(dataset) -> int:
    """한 블록에 든 문서의 최대 수. dataset이 `max_documents`를 알면 그것을 쓴다."""
    if dataset is None:
        return 1
    if hasattr(dataset, "max_documents"):
        return dataset.max_documents
    return max(int((dataset[index]["position_ids"] == 0).sum()) for index in range(len(dataset)))
