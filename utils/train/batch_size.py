"""optimizer step 하나가 배울 양: batch와 블록의 길이를 데이터의 크기에 맞춘다.

step의 수는 데이터의 토큰 / (batch x 블록)이다. 행이 몇십 개뿐이면 16블록의 batch로는 몇 step 만에 끝나, 가중치를 거의
고치지 못한다. 그때는 batch를 줄이고, 그래도 모자라면 블록을 가장 긴 행의 길이까지, 끝으로 블록에 담는 양을 줄인다.
블록을 줄이는 것은 계산을 늘리지 않는다. 담는 양을 줄이면 빈자리까지 계산하지만, 모두 몇백 블록뿐일 때다.
"""

import math

import numpy as np

from utils.data.blocks import pack
from utils.errors import UsageError
from utils.process import n_processes
from utils.train import conditions, run_folder
from utils.train.records import BatchSize, Schedule, Settings

DEFAULT_BATCH = 16
ENOUGH_STEPS = 100  # 스스로 고를 때 채우려는 step의 수. 작은 데이터의 loss가 다 내려가는 데 이만큼이 든다
FEW_STEPS = 50  # 이보다 적으면 경고한다
LEAST_TOKENS = 64  # 블록과, 블록에 담는 양을 이보다 줄이지 않는다
BLOCK_UNIT = 32


def choose_batch(settings: Settings, lengths: np.ndarray, longest: int, world: int) -> BatchSize:
    """batch와 블록의 길이를 정한다. 사용자가 적은 batch와, 이어 갈 실행의 것은 그대로 쓴다.

    Args:
        lengths: 학습할 문서들의 토큰 수. [문서의 수] int64.
        longest: 학습하거나 검증할 가장 긴 문서의 토큰 수. 블록은 이보다 짧아지지 않는다.
        world: 함께 배우는 프로세스의 수. batch는 이 수와 micro_batch_size로 나누어진다.
    """
    def attempt(size: int, block_len: int, room: int) -> BatchSize:
        n_blocks = len(pack(np.minimum(lengths, room), room, settings.seed))
        return BatchSize(size, block_len, room, Schedule.from_blocks(n_blocks, size, settings.num_train_epochs).steps)

    whole = settings.cutoff_len
    if settings.batch_size is not None:
        return attempt(settings.batch_size, whole, whole)
    earlier = conditions.earlier_batch(settings)
    if earlier is not None:
        return attempt(earlier.size, earlier.block_len, earlier.room)

    # 차례로 줄인다: batch(16블록에서 절반씩), 블록의 길이(가장 긴 행까지), 블록에 담는 양(64토큰까지)
    unit = world * (settings.micro_batch_size or 1)  # batch의 가장 작은 단위
    times = max(1, DEFAULT_BATCH // unit)
    chosen = attempt(unit * times, whole, whole)
    while chosen.steps < ENOUGH_STEPS and times > 1:
        times //= 2
        chosen = attempt(unit * times, whole, whole)
    shortest = min(whole, max(LEAST_TOKENS, -(-longest // BLOCK_UNIT) * BLOCK_UNIT))
    while chosen.steps < ENOUGH_STEPS and chosen.block_len > shortest:
        block_len = max(chosen.block_len // 2, shortest)
        chosen = attempt(unit, block_len, block_len)
    while chosen.steps < ENOUGH_STEPS and chosen.room > LEAST_TOKENS:
        chosen = attempt(unit, chosen.block_len, max(chosen.room // 2, LEAST_TOKENS))
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
            lines.append(f"batch: 데이터가 적어 {DEFAULT_BATCH}블록씩 배우면 {usual} step뿐이다. 한 번에 "
                         f"{batch.size}블록(블록마다 {batch.room}토큰까지)으로 줄여 {batch.steps} step을 배운다. "
                         "직접 정하려면 --batch_size를 적는다")
    if batch.steps >= FEW_STEPS:
        return lines
    warning = f"주의: 모두 {batch.steps} step뿐이라 조금밖에 배우지 못한다"
    free = choose_batch(settings.without_batch(), lengths, longest, world)
    if free.steps > batch.steps:
        return [*lines, f"{warning}. --batch_size를 빼면 {free.steps} step을 배운다: {changed(batch_size=None)}"]
    epochs = math.ceil(settings.num_train_epochs * FEW_STEPS / batch.steps)
    return [*lines, f"{warning}. 데이터를 {epochs}번 보면 {FEW_STEPS} step이 된다: "
                    f"{changed(num_train_epochs=str(epochs))}"]


def share_of_batch(settings: Settings, batch_size: int) -> int:
    """프로세스 하나가 optimizer step마다 계산하는 블록의 수.

    Raises:
        UsageError: batch_size를 프로세스들에 똑같이 나눌 수 없다.
    """
    share, rest = divmod(batch_size, n_processes())
    if rest or not share or (settings.micro_batch_size and share % settings.micro_batch_size):
        unit = n_processes() * (settings.micro_batch_size or 1)
        raise UsageError(f"batch_size를 프로세스와 micro_batch_size에 나눌 수 없다: batch {batch_size}, "
                         f"프로세스 {n_processes()}개, micro {settings.micro_batch_size or 1}. "
                         f"--batch_size {unit}의 배수로 적는다")
    return share
