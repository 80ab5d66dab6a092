"""지금 프로세스의 자리: 몇 번째인지, 몇 개가 함께 학습하는지, 모델을 나누어 담는지.

torchrun과 accelerate가 환경 변수로 알려 준다. 혼자 실행하면 변수가 없고, 첫째이자 하나뿐인 프로세스다.
"""

import contextlib
import gc
import os
from collections.abc import Iterator


def rank() -> int:
    """모든 컴퓨터의 프로세스 가운데 나의 번호. 0번만 말하고 쓴다."""
    return int(os.environ.get("RANK", "0"))


def is_first_process() -> bool:
    return rank() == 0


def n_processes() -> int:
    """함께 배우는 프로세스의 수."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """이 컴퓨터의 프로세스 가운데 나의 번호. 이 번호의 카드를 쓴다."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def n_local_processes() -> int:
    """이 컴퓨터에서 함께 배우는 프로세스의 수. CPU 코어를 이만큼으로 나누어 쓴다."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_sharded() -> bool:
    """모델을 여러 카드에 나누어 담는가(`accelerate launch --use_fsdp`).

    FSDP는 정수 가중치를 나누지 못하므로 4비트를 계산 dtype의 버퍼에 담고, 카드 하나에 다 올리지 않도록 RAM에 올린다.
    """
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """라이브러리를 불러오는 동안 가비지 컬렉션(GC)을 쉰다. 남을 객체 수십만 개를 거듭 훑지 않아 0.7초가 준다."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
