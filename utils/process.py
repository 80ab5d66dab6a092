"""지금 프로세스의 자리: 몇 번째인지, 몇 개가 함께 학습하는지, 모델을 나누어 담는지."""

import os


def n_processes() -> int:
    """함께 배우는 프로세스의 수. torchrun과 accelerate가 알려 준다."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_sharded() -> bool:
    """모델을 여러 카드에 나누어 담는가(`accelerate launch --use_fsdp`).

    FSDP는 정수 가중치를 나누지 못하므로 4비트를 계산 dtype의 그릇에 담고, 카드 하나에 다 올리지 않도록 RAM에 올린다.
    """
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
