"""학습 루프를 짓고 돌려, 가장 좋은 어댑터를 `output_dir`에 남긴다."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from utils import process
from utils.console import detail
from utils.train.group import Group, join_group
from utils.train.inputs import Inputs
from utils.train.loop import Loop
from utils.train.micro_step import RunningStep
from utils.train.pairs import measure_references
from utils.train.progress import Progress, Speed
from utils.train.records import Plan, Recipe, Result, Settings
from utils.train.resume import Checkpoints
from utils.train.run_folder import Run
from utils.train.signals import Interrupt
from utils.train.step import open_step
from utils.train.tracking import open_trackers
from utils.train.weights import ReplicatedWeights, Weights


def fit(settings: Settings, inputs: Inputs, plan: Plan, model: nn.Module, run: Run,
        say: Callable[[str], None]) -> Result:
    """학습하고, 가장 좋은 어댑터를 `output_dir`에 남긴다.

    Raises:
        SystemExit: 멈추라는 신호를 받아 저장하고 멈추었다. 이어 가는 명령을 말한 뒤다.
    """
    run.require_space(model.get_nb_trainable_parameters()[0])
    with contextlib.closing(open_loop(settings, inputs, plan, model, run, say)) as loop:
        detail(f"학습 길: {loop.step.path}")
        measure_references(loop, say)
        before = measure_before(loop)
        loop.checkpoints.restore(loop)
        with Interrupt(say) as interrupt:
            learn(loop, run, interrupt, say)
            seconds = loop.checkpoints.seconds
            report_end(plan, before.get("eval_loss"), loop.state.best_metric, say)
            loop.checkpoints.keep_best(loop)
            loop.checkpoints.save_adapter(loop)
        for listener in loop.listeners:
            listener.saved(run.folder, loop.state, final=True)
    return Result(model, loop.state, loop.step.path, before.get("eval_loss"), loop.state.best_metric, seconds,
                  process.is_sharded(), loop.group.is_first, interrupt.code is not None, before)


def open_loop(settings: Settings, inputs: Inputs, plan: Plan, model: nn.Module, run: Run,
              say: Callable[[str], None]) -> Loop:
    """모델을 장치에 놓고, 기록할 곳을 열고, 학습 루프를 짓는다."""
    schedule, memory, device = plan.schedule, plan.memory, inputs.device.device
    torch.manual_seed(settings.seed)
    group = join_group(device)
    checkpoints = Checkpoints(run, inputs.tokenizer, model.get_nb_trainable_parameters()[0], group, say)
    placed = place(model, inputs, plan, group, say)
    recipe = Recipe(schedule.steps, schedule.warmup, schedule.interval, memory.micro_batch_size, plan.accumulation,
                    settings.learning_rate, settings.seed, settings.early_stopping_patience)
    speed = Speed(inputs.train_set.n_tokens * settings.num_train_epochs / schedule.steps)
    trackers = open_trackers(inputs.trackers, settings, model) if group.is_first else []
    return Loop(placed.step, placed.weights, recipe, inputs.train_set, inputs.eval_set, group=group, device=device,
                checkpoints=checkpoints, listeners=[Progress(say, speed), *trackers], speed=speed)


def learn(loop: Loop, run: Run, interrupt: Interrupt, say: Callable[[str], None]) -> None:
    """끝까지 배우거나, 신호를 받으면 저장하고 멈춘다."""
    loop.run(should_stop=lambda: interrupt.asked)
    if interrupt.asked:
        say(f"checkpoint-{loop.state.global_step}에 저장하고 멈추었다. 이어 가는 명령: {run.resume_command}")
        raise SystemExit(interrupt.code)


@dataclass(frozen=True)
class Placed:
    """장치에 놓인 모델: micro-step과 배우는 가중치."""

    step: RunningStep
    weights: Weights


def place(model: nn.Module, inputs: Inputs, plan: Plan, group: Group, say: Callable[[str], None]) -> Placed:
    """모델을 프로세스마다 온전히 두거나, `accelerate launch --use_fsdp`로 시작했으면 나눈다.

    온전히 두면 학습하는 계산을 모델의 forward와 비교한다(`parity`). 나누면 비교하지 않는다: 비교할 참값을 얻으려면 나눈
    모델을 문서마다 따로 불러야 하고, 나눈 길은 모델의 forward와 자동미분을 그대로 쓴다. 문서가 서로를 보지 않는지는
    어느 쪽이든 확인한다.

    Raises:
        UsageError: 이 모델을 묶은 블록으로 학습하면 값이 틀린다.
    """
    device, rows = inputs.device, plan.memory.micro_batch_size
    fp16 = device.dtype is torch.float16 and device.device.type == "cuda"
    if not process.is_sharded():
        weights = ReplicatedWeights(model, group, fp16)
        step = open_step(model, plan.memory, inputs.train_set, inputs.eval_set, device.device, weights.gradients, say)
        return Placed(step, weights)

    from utils.train import fsdp

    config, vocab = model.peft_config["default"], model.get_input_embeddings().weight.shape[0]
    model = fsdp.shard(model, device.device, device.dtype)
    step = fsdp.ShardedStep(model, rows, group, device.device)
    step.check(vocab, len(inputs.train_set[0]["input_ids"]))
    return Placed(step, fsdp.ShardedWeights(model, config, group, fp16))


def measure_before(loop: Loop) -> dict[str, float]:
    """학습 전의 검증 loss를 재어 알린다. 검증하지 않으면 비어 있다."""
    if loop.eval_set is None:
        return {}
    before = loop.evaluate()
    for listener in loop.listeners:
        listener.log(before, loop.state)
    return before


def report_end(plan: Plan, before: float | None, after: float | None, say: Callable[[str], None]) -> None:
    if plan.memory.parts:
        say(plan.memory.outcome(torch.cuda.max_memory_reserved()))
    if before is not None:
        grown = after / before - 1
        change = f"{-grown:.1%} 줄었다" if after < before else f"{grown:.1%} 늘었다"
        say(f"학습 후 검증 loss {after:.4f}(학습 전 {before:.4f}, {change})")
