"""학습 단계가 주고받는 기록: 설정(`Settings`), 계획(`Plan`), 루프가 따르는 값(`Recipe`), 결과(`Result`)."""

import math
from dataclasses import dataclass, field, replace

from torch import nn

from utils.train.planner import MemoryPlan
from utils.train.state import TrainState


@dataclass(frozen=True)
class Settings:
    """`finetune-lora.py`의 플래그. 뜻과 기본값은 그 서명이 정한다."""

    base_model: str
    data_path: str
    output_dir: str
    cache_dir: str | None
    num_train_epochs: float
    batch_size: int | None
    micro_batch_size: int | None
    learning_rate: float | None
    dpo_beta: float | None
    cutoff_len: int
    val_set_size: float
    train_on_inputs: bool
    early_stopping_patience: int | None
    eval_task: str | None
    seed: int
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: tuple[str, ...]
    prompt_template: str
    vram_gb: float | None
    deterministic: bool
    resume_from_checkpoint: bool | str | None
    check_data: bool
    repair_data: str | None
    report_to: str
    wandb_project: str | None
    wandb_run_name: str | None
    wandb_watch: str | None
    wandb_log_model: str | None
    verbose: bool

    def without_batch(self) -> "Settings":
        """batch를 적지 않고 새로 시작한 설정."""
        return replace(self, batch_size=None, resume_from_checkpoint=None)


@dataclass(frozen=True)
class BatchShape:
    """optimizer step 하나가 쓰는 블록들의 모양.

    Attributes:
        size: 블록의 수.
        block_len: 블록의 길이(토큰). cutoff_len이거나, 데이터가 적으면 그보다 짧다.
        room: 블록 하나에 문서를 이만큼(토큰)까지만 담는다. 이보다 긴 문서는 블록 하나를 혼자 쓴다.
    """

    size: int
    block_len: int
    room: int


@dataclass(frozen=True)
class BatchSize(BatchShape):
    """데이터에 맞추어 고른 모양(`batch_size.choose_batch`).

    Attributes:
        steps: 이렇게 나누면 모두 몇 step인지.
    """

    steps: int


@dataclass(frozen=True)
class Schedule:
    """optimizer step의 수에서 나오는 간격들. 단위는 모두 step이다.

    Attributes:
        steps: 모두 몇 번 고치는지. epoch마다의 step(모자란 batch도 한 step이다) x epoch을 올림한 것이다.
        warmup: steps의 6%, 100까지.
        interval: 몇 step마다 평가하고 저장하는지. steps의 10분의 1이다.
    """

    steps: int
    warmup: int
    interval: int

    @classmethod
    def from_blocks(cls, n_blocks: int, batch_size: int, epochs: float) -> "Schedule":
        """워밍업은 전체의 6%(100 step까지), 평가와 저장은 열 번이다."""
        per_epoch = math.ceil(n_blocks / batch_size)
        steps = max(1, math.ceil(per_epoch * epochs))
        return cls(steps, warmup=min(100, round(steps * 0.06)), interval=max(1, steps // 10))


@dataclass(frozen=True)
class Plan:
    """모델을 올리기 전에 정하는 것.

    Attributes:
        accumulation: optimizer step마다 프로세스 하나가 계산하는 micro batch의 수.
        processes: 함께 배우는 프로세스의 수.
    """

    schedule: Schedule
    memory: MemoryPlan
    accumulation: int
    processes: int


@dataclass(frozen=True)
class Recipe:
    """무엇을 얼마나 배우는지.

    effective batch는 `rows` x `accumulation` x 프로세스 수(블록)다.

    Attributes:
        steps: optimizer step의 수.
        warmup: 학습률을 올리는 step의 수. 첫 step은 가장 높은 학습률의 1 / warmup이고, 그 뒤로는 `steps`에서 0이 되게
            내린다.
        interval: 몇 step마다 평가하고 저장하는지.
        rows: micro batch의 블록 수.
        accumulation: optimizer step마다 프로세스 하나가 계산하는 micro batch의 수.
        patience: 검증 loss가 이만큼 잇달아 나아지지 않으면 멈춘다. None이면 끝까지 간다.
        max_grad_norm: gradient의 크기를 이 아래로 줄인다.
    """

    steps: int
    warmup: int
    interval: int
    rows: int
    accumulation: int
    learning_rate: float
    seed: int
    patience: int | None = None
    max_grad_norm: float = 1.0

    def learning_share(self, taken: int) -> float:
        """가중치를 `taken`번 고친 다음 step의 학습률이 가장 높은 학습률의 몇 배인지. 첫 step도 0이 아니다."""
        if taken < self.warmup:
            return (taken + 1) / self.warmup
        return max(0.0, (self.steps - taken) / max(1, self.steps - self.warmup))


@dataclass(frozen=True)
class Result:
    """학습이 남긴 것.

    Attributes:
        model: 가장 좋은 어댑터를 얹은 모델.
        path: 어느 길로 학습했는지 설명하는 한 줄.
        before, after: 학습 전후의 검증 loss. 검증하지 않았으면 None이다.
        seconds: 걸린 시간. 이어 가기 전의 것도 센다.
        sharded: 모델을 여러 카드에 나누어 배웠는지. 나뉜 모델로는 답하지 않는다.
        is_first: 기록을 쓰는 프로세스인지.
        interrupted: 다 배운 뒤 어댑터를 쓰는 동안 멈추라는 신호를 받았는지.
        started: 학습 전의 검증 값(`Loop.evaluate`).
    """

    model: nn.Module
    state: TrainState
    path: str
    before: float | None
    after: float | None
    seconds: float
    sharded: bool
    is_first: bool
    interrupted: bool = False
    started: dict[str, float] = field(default_factory=dict)

    @property
    def ended(self) -> dict[str, float]:
        """가장 좋은 step의 검증 값. 검증하지 않았으면 비어 있다."""
        return next((row for row in self.state.log_history
                     if "eval_loss" in row and row["step"] == self.state.best_global_step), {})
