"""학습이 잘되었는지의 판단과, 잘되지 않았을 때 해 볼 것."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from utils.paths import BASE_DEMO, DATA_DEMO
from utils.record import SAMPLES_FILE
from utils.train import pairs, run_folder
from utils.train.batch_size import FEW_STEPS
from utils.train.records import Plan, Result, Settings

LEAST_FALL = 0.02  # loss가 이 비율보다 적게 줄었으면 거의 배우지 못한 것이다
SAME = 1.0005  # loss가 이 비율보다 적게 늘었으면 그대로인 것이다
CLEARLY_RISEN = 1.02  # 가장 좋은 검증 loss보다 이만큼 크면 그 뒤로는 외우기만 한 것이다
DISPLACED = 0.1  # 고른 답의 보상이 두 답의 차이의 이 비율보다 많이 내려갔으면 두 답을 모두 밀어낸 것이다
HIGH_RATE = 1e-4  # 이보다 높은 학습률로 나빠졌으면 먼저 학습률을 의심한다
LOWEST_RATE = 1e-5  # 올려 보라고 하는 학습률은 적어도 이만큼이다
WILD_RATE = 1e-2  # 이보다 높으면 loss가 줄었어도 답이 깨지기 쉽다. 고르는 학습률은 가장 높아도 1e-3이다


@dataclass(frozen=True)
class Verdict:
    """학습 하나의 판단.

    Attributes:
        learned: 학습 전보다 뚜렷하게 나아졌고, 그것을 믿을 만한지.
        lines: 끝에 말할 줄들. 나아졌으면 없거나 참고할 것 한 줄이다.
    """

    learned: bool
    lines: tuple[str, ...] = ()


def judge(settings: Settings, plan: Plan, result: Result) -> Verdict:
    """검증 loss로, 검증하지 않았으면 학습 loss의 처음과 끝으로 판단한다."""
    losses = measured(result)
    if losses is None:
        return Verdict(True)
    before, after = losses.before, losses.after
    outcome = pairs.outcome_line(result)
    figures = f"{losses.kind} loss {before:.4f} -> {after:.4f}" + (f", {outcome}" if outcome else "")
    if after >= before * SAME:
        return Verdict(False, (f"주의: 학습한 모델이 학습 전보다 나쁘다({figures}, {after / before - 1:.1%} 늘었다).",
                               *advice(settings, plan, worse=True)))
    if 1 - after / before < LEAST_FALL:
        return Verdict(False, (f"주의: 거의 배우지 못했다({figures}, {max(0.0, 1 - after / before):.1%} "
                               "줄었다).", *advice(settings, plan, worse=False)))
    if too_high := wild(settings):
        return Verdict(False, tuple(too_high))
    return Verdict(True, (*([f"{outcome}."] if outcome else []), *displaced(settings, result), *overfitted(result),
                          *hurried(settings, plan), *small_base(settings, plan)))


class Losses(NamedTuple):
    """학습 앞과 뒤의 loss. kind는 무엇의 것인지("검증", "학습")다."""

    kind: str
    before: float
    after: float


def measured(result: Result) -> Losses | None:
    """판단할 loss. 학습 loss는 흔들리므로 앞뒤의 10분의 1씩을 평균한다. 둘 다 없으면 None이다."""
    if result.before is not None and result.after is not None:
        return Losses("검증", result.before, result.after)
    losses = [row["loss"] for row in result.state.log_history if "loss" in row]
    if len(losses) < 2:
        return None
    part = max(1, len(losses) // 10)
    return Losses("학습", sum(losses[:part]) / part, sum(losses[-part:]) / part)


def advice(settings: Settings, plan: Plan, worse: bool) -> list[str]:
    """해 볼 것 하나와 그대로 칠 수 있는 명령."""
    steps, rate, epochs = plan.schedule.steps, settings.learning_rate, settings.num_train_epochs
    if worse and rate > HIGH_RATE:
        return try_this("학습률을 낮춘다", settings, learning_rate=f"{max(min(rate / 10, 1e-3), HIGH_RATE):g}")
    if worse:
        return ["해 볼 것: --check_data True로 데이터를 보고, 행을 늘리거나 --num_train_epochs를 줄인다."]
    if rate < HIGH_RATE:
        times = 10 if settings.dpo_beta is None else 3  # 선호 쌍은 조금만 높아도 답이 깨진다
        return try_this("학습률을 올린다", settings, learning_rate=f"{max(min(rate * times, 1e-3), LOWEST_RATE):g}")
    if steps < FEW_STEPS and settings.batch_size is not None:
        return try_this(f"{steps} step뿐이었다. batch를 데이터에 맞게 고르게 한다", settings, batch_size=None)
    return try_this("데이터를 더 여러 번 본다", settings, num_train_epochs=f"{epochs * 3:g}")


def try_this(what: str, settings: Settings, **changes: str | None) -> list[str]:
    return [f"해 볼 것: {what}.", f"  {run_folder.command_elsewhere(settings.output_dir, changes)}"]


def displaced(settings: Settings, result: Result) -> list[str]:
    """버린 답뿐 아니라 고른 답도 덜 그럴듯해졌으면 그 말. 보상의 차이는 벌어져도 답은 나빠진 것일 수 있다."""
    reward, margin = (result.ended.get(f"eval_{name}", 0.0) for name in ("chosen_reward", "reward_margin"))
    if reward >= -DISPLACED * abs(margin):
        return []
    return [f"참고: 고른 답의 보상도 내려갔다({reward:.3f}). 두 답을 모두 말하지 않게 되어 답이 깨졌을 수 있으니 "
            f"{SAMPLES_FILE}의 답을 본다.",
            *try_this("깨졌으면 학습률을 낮춘다", settings, learning_rate=f"{settings.learning_rate / 3:.0e}")]


def wild(settings: Settings) -> list[str]:
    """loss는 줄었어도 학습률이 너무 높으면 그 말."""
    if settings.learning_rate <= WILD_RATE:
        return []
    return [f"주의: 학습률 {settings.learning_rate:g}은 너무 높다. loss가 줄었어도 답이 깨졌을 수 있으니 "
            f"{SAMPLES_FILE}의 답을 본다.",
            *try_this("학습률을 모델에 맞게 고르게 한다", settings, learning_rate=None)]


def hurried(settings: Settings, plan: Plan) -> list[str]:
    """적어 준 batch가 커서 몇 step뿐이었으면 그 말."""
    steps = plan.schedule.steps
    if steps >= FEW_STEPS or settings.batch_size is None:
        return []
    return [f"주의: {steps} step뿐이라 조금밖에 배우지 못했다.",
            *try_this("batch를 데이터에 맞게 고르게 한다", settings, batch_size=None)]


def small_base(settings: Settings, plan: Plan) -> list[str]:
    """데모 모델에 내 데이터를 가르쳤으면, 쓸 만한 답은 진짜 기반 모델에서 나온다는 말."""
    base, data = (Path(path).resolve() for path in (settings.base_model, settings.data_path))
    if base != BASE_DEMO or data == DATA_DEMO:
        return []
    return ["참고: 데모 모델은 과정을 보여 주는 작은 모델이라 내 데이터를 배워도 엉뚱한 답을 한다.",
            *try_this("진짜 기반 모델을 받아(README의 'polyglot-ko-1.3b로 가는 길') 배운다", settings,
                      base_model="resources/polyglot-ko-1.3b",
                      **({"batch_size": None} if hurried(settings, plan) else {}))]


def overfitted(result: Result) -> list[str]:
    """가장 좋은 step 뒤로 검증 loss가 다시 늘었으면 그 말."""
    evaluated = [row["eval_loss"] for row in result.state.log_history if "eval_loss" in row]
    if not evaluated or result.after is None or evaluated[-1] < result.after * CLEARLY_RISEN:
        return []
    return [f"참고: 검증 loss는 {result.state.best_global_step} step에서 가장 좋았고({result.after:.4f}) 그 뒤로 다시 "
            f"늘었다({evaluated[-1]:.4f}). 가장 좋은 때의 어댑터를 남겼다. --num_train_epochs를 줄여도 된다."]
