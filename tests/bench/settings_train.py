"""설정의 벤치가 배우는 법: 학습 루프와, 기본값이 아닌 길(LoRA+, NEFTune, 채우지 않은 블록, 16비트 기반 모델)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from utils.data.blocks import PackedDataset
from utils.model import loader
from utils.model.objective import FIGURES
from utils.model.targets import find_backbone
from utils.train import stage
from utils.train.autograd_step import AutogradStep
from utils.train.batch_size import BLOCK_UNIT, BatchSize
from utils.train.fit import place
from utils.train.graph_step import CapturedStep
from utils.train.group import ALONE
from utils.train.loop import Loop
from utils.train.pairs import measure_references
from utils.train.records import Plan, Recipe, Schedule, Settings
from utils.train.step import SplittingStep
from utils.train.weights import ReplicatedWeights

PROBE = 0.03  # 학습률을 고르는 짧은 시험: 이만큼 배운 자리에서도 검증한다
TOGETHER = 4096  # 한 번에 계산하는 토큰. 작은 모델은 블록 하나가 카드를 채우지 못한다
NEFTUNE = 5.0


def silent(line: str) -> None:
    """아무것도 알리지 않는다."""


class Kept:
    """가장 좋은 때의 가중치를 메모리에 두는, 체크포인트의 자리."""

    def __init__(self):
        self.best: list[torch.Tensor] | None = None

    def save(self, loop: Loop) -> Path:
        if loop.state.best_global_step in (None, loop.state.global_step):
            self.best = [parameter.detach().clone() for parameter in loop.weights.parameters]
        return Path()

    def newest(self) -> None:
        return None

    def restore(self, loop: Loop) -> None:
        for parameter, value in zip(loop.weights.parameters, self.best, strict=True):
            parameter.data.copy_(value)


class ProbedLoop(Loop):
    """배우는 중의 한 자리에서도 검증하고, LoRA+의 학습률을 아는 학습 루프."""

    probe = 0

    @property
    def is_due(self) -> bool:
        return self.state.global_step == self.probe or super().is_due

    def follow_schedule(self, taken: int) -> None:
        """묶음에 `times`가 있으면 그 학습률은 그만큼 크다."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = self.recipe.learning_rate * group.get("times", 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.recipe.learning_share, taken - 1)

    def raise_b(self, model, times: float) -> None:
        """LoRA+: B의 학습률을 A의 `times`배로."""
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups = [{"params": [parameter for name, parameter in named if "lora_A" in name]},
                  {"params": [parameter for name, parameter in named if "lora_B" in name], "times": times}]
        self.optimizer = torch.optim.AdamW(groups, self.recipe.learning_rate, weight_decay=0.0, fused=True)
        self.follow_schedule(0)


def together(plan: Plan, block: int) -> Plan:
    """batch의 블록(저마다 `block`토큰)을 되도록 함께 계산하는 같은 계획."""
    batch = plan.memory.micro_batch_size * plan.accumulation
    micro = max(rows for rows in range(1, max(1, TOGETHER // block) + 1) if batch % rows == 0)
    return replace(plan, memory=replace(plan.memory, micro_batch_size=micro), accumulation=batch // micro)


def train(settings: Settings, inputs: stage.Inputs, plan, model, extra: dict) -> dict:
    """`fit`과 같이 배우고 가장 좋은 때의 가중치를 모델에 남긴다.

    Raises:
        UsageError: loss나 기울기가 NaN이나 inf가 되었다.
    """
    torch.manual_seed(settings.seed)
    schedule, memory = plan.schedule, plan.memory
    if extra.get("neftune"):
        weights, micro_step = noisy_step(model, inputs, memory)
    else:
        placed = place(model, inputs, plan, ALONE, silent)
        weights, micro_step = placed.weights, placed.step
    recipe = Recipe(schedule.steps, schedule.warmup, schedule.interval, memory.micro_batch_size, plan.accumulation,
                    settings.learning_rate, settings.seed)
    kept = Kept()
    loop = ProbedLoop(micro_step, weights, recipe, inputs.train_set, inputs.eval_set, group=ALONE,
                      device=inputs.device.device, checkpoints=kept)
    loop.probe = max(1, math.ceil(PROBE * schedule.steps))
    if extra.get("lora_plus"):
        loop.raise_b(model, extra["lora_plus"])
    measure_references(loop, silent)
    before = loop.evaluate()["eval_loss"] if inputs.eval_set is not None else None
    loop.run()
    kept.restore(loop)
    history = [row for row in loop.state.log_history if "eval_loss" in row]
    best = next((row for row in history if row["step"] == loop.state.best_global_step), {})
    rewards = {name: best[name] for name in map("eval_{}".format, FIGURES[1:]) if name in best}
    return {**rewards, "path": loop.step.path, "before": before, "val_loss": loop.state.best_metric,
            "best_step": loop.state.best_global_step, "last_val_loss": history[-1]["eval_loss"] if history else None,
            "probe_loss": next((row["eval_loss"] for row in history if row["step"] == loop.probe), None),
            "tenth_loss": next((row["eval_loss"] for row in history if row["step"] >= schedule.interval), None)}


def noisy_step(model, inputs: stage.Inputs, memory) -> tuple[ReplicatedWeights, SplittingStep]:
    """NEFTune: 배울 때 embedding에 ±alpha / sqrt(길이 x 폭)의 고른 noise를 더한다. 자동미분의 길이다."""
    weights = ReplicatedWeights(model, ALONE)

    def disturb(module, args, output):
        if not model.training:
            return output
        size = NEFTUNE / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-size, size)

    find_backbone(model.get_base_model()).get_input_embeddings().register_forward_hook(disturb)
    captured = CapturedStep(AutogradStep(model), inputs.device.device)
    captured.enabled = False  # 찍다가 실패하면 난수가 찍던 상태로 남는다
    return weights, SplittingStep(captured, model, memory.micro_batch_size, weights.gradients, silent)


def unpacked(settings: Settings, inputs: stage.Inputs) -> stage.Inputs:
    """문서마다 블록 하나를 혼자 쓰고, step마다 배우는 문서의 수는 채웠을 때와 거의 같다(8의 배수로 맞춘다)."""
    members = np.sort(np.concatenate(inputs.train_set.blocks))
    lengths = inputs.documents.lengths()
    longest = int(lengths[np.concatenate([members, inputs.parts.held_out])].max())
    block = -(-longest // BLOCK_UNIT) * BLOCK_UNIT
    size = 8 * max(1, round(len(members) / len(inputs.train_set) * inputs.batch.size / 8))

    def alone(documents: np.ndarray, train_on_inputs: bool) -> PackedDataset:
        return PackedDataset(inputs.documents, documents, block, inputs.end_id, train_on_inputs, settings.seed, room=1)

    steps = Schedule.from_blocks(len(members), size, settings.num_train_epochs).steps
    return replace(inputs, batch=BatchSize(size, block, 1, steps), train_set=alone(members, settings.train_on_inputs),
                   eval_set=alone(inputs.parts.held_out, False))


@contextmanager
def wide_base() -> Iterator[None]:
    """기반 모델을 4비트로 줄이지 않고 올린다."""
    load: Callable = loader.load_base
    loader.load_base = lambda base, device, quantize, cache_dir: load(base, device, None, cache_dir)
    try:
        yield
    finally:
        loader.load_base = load


def on_wide_base(settings: Settings, inputs: stage.Inputs, learned):
    """4비트에서 배운 어댑터를 16비트 기반 모델에 얹은 것."""
    with wide_base():
        model = stage.build_model(settings, inputs, silent)
    set_peft_model_state_dict(model, get_peft_model_state_dict(learned))
    return model


@contextmanager
def as_it_is() -> Iterator[None]:
    yield

