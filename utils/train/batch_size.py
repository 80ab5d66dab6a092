"""optimizer step 하나가 배울 양: batch와 블록의 길이를 데이터의 크기에 맞춘다.

step의 수는 데이터의 토큰 / (batch x 블록)이다. 행이 몇십 개뿐이면 16블록의 batch로는 몇 step 만에 끝나, 가중치를 거의
고치지 못한다. 그때는 batch를 줄이고, 그래도 모자라면 가장 긴 행이 들어가는 데까지 블록을 줄인다. 블록을 줄여도 채움은
그대로이므로 계산이 늘지 않는다.
"""

import math
from dataclasses import dataclass

import numpy as np

from utils.data.blocks import pack
from utils.train import run_folder
from utils.train.records import Schedule, Settings

DEFAULT_BATCH = 16
ENOUGH_STEPS = 100  # 스스로 고를 때 채우려는 step의 수. 작은 데이터의 loss가 다 내려가는 데 이만큼이 든다
FEW_STEPS = 50  # 이보다 적으면 경고한다
MIN_BLOCK, BLOCK_UNIT = 64, 32


@dataclass(frozen=True)
class BatchSize:
    """optimizer step 하나가 쓰는 것.

    Attributes:
        size: 블록의 수.
        block_len: 블록의 길이(토큰). cutoff_len이거나, 데이터가 적으면 그보다 짧다.
        steps: 이렇게 나누면 모두 몇 step인지.
    """

    size: int
    block_len: int
    steps: int


def choose_batch(settings: Settings, lengths: np.ndarray, longest: int, world: int) -> BatchSize:
    """batch와 블록의 길이를 정한다. 사용자가 적은 batch와, 이어 갈 실행의 것은 그대로 쓴다.

    Args:
        lengths: 학습할 문서들의 토큰 수.
        longest: 학습하거나 검증할 가장 긴 문서의 토큰 수. 블록은 이보다 짧아지지 않는다.
        world: 함께 배우는 프로세스의 수. batch는 이 수와 micro_batch_size로 나누어진다.
    """
    def attempt(size: int, block_len: int) -> BatchSize:
        n_blocks = len(pack(lengths, block_len, settings.seed))
        return BatchSize(size, block_len, Schedule.from_blocks(n_blocks, size, settings.num_train_epochs).steps)

    if settings.batch_size is not None:
        return attempt(settings.batch_size, settings.cutoff_len)
    earlier = run_folder.earlier_batch(settings)
    if earlier is not None:
        return attempt(*earlier)

    unit = world * (settings.micro_batch_size or 1)
    times = max(1, DEFAULT_BATCH // unit)
    chosen = attempt(unit * times, settings.cutoff_len)
    while chosen.steps < ENOUGH_STEPS and times > 1:
        times //= 2
        chosen = attempt(unit * times, settings.cutoff_len)
    shortest = max(MIN_BLOCK, -(-longest // BLOCK_UNIT) * BLOCK_UNIT)
    while chosen.steps < ENOUGH_STEPS and chosen.block_len > shortest:
        chosen = attempt(unit, max(chosen.block_len // 2, shortest))
    return chosen


def batch_lines(settings: Settings, batch: BatchSize, lengths: np.ndarray, longest: int, world: int) -> list[str]:
    """고른 batch와 그 이유, 또는 step이 너무 적다는 경고와 그대로 칠 수 있는 명령."""
    def changed(**flags: str | None) -> str:
        return run_folder.command_elsewhere(settings.output_dir, flags)

    lines = []
    if settings.batch_size is None:
        usual = Schedule.from_blocks(len(pack(lengths, settings.cutoff_len, settings.seed)), DEFAULT_BATCH,
                                     settings.num_train_epochs).steps
        if batch.steps > usual:
            block = "" if batch.block_len == settings.cutoff_len else f", 블록을 {batch.block_len}토큰으로"
            lines.append(f"batch: 데이터가 적어 {DEFAULT_BATCH}블록씩 배우면 {usual} step뿐이다. batch를 {batch.size}"
                         f"블록{block} 줄여 {batch.steps} step을 배운다(직접 정하려면 --batch_size)")
    if batch.steps >= FEW_STEPS:
        return lines
    warning = f"주의: 모두 {batch.steps} step뿐이라 조금밖에 배우지 못한다"
    free = choose_batch(settings.without_batch(), lengths, longest, world)
    if free.steps > batch.steps:
        return [*lines, f"{warning}. --batch_size를 빼면 {free.steps} step을 배운다: {changed(batch_size=None)}"]
    epochs = math.ceil(settings.num_train_epochs * FEW_STEPS / batch.steps)
    return [*lines, f"{warning}. 데이터를 {epochs}번 보면 {FEW_STEPS} step이 된다: "
                    f"{changed(num_train_epochs=str(epochs))}"]
