"""학습 하나를 이 프로세스 안에서 끝까지 하고 시험 문항으로 재는 `Lab`. `bench_settings.py`의 일꾼이 쓴다.

학습은 `finetune-lora.py`와 같은 단계(prepare, plan, build_model, 학습 루프)를 지난다. 다른 것은 다섯이다: 토크나이저와
읽은 데이터와 기반 모델을 다음 학습이 다시 쓰고, 빠른 길을 모델의 forward와 비교하지 않고(카드를 함께 쓰면 비교가
학습보다 오래 걸린다), batch의 블록을 되도록 함께 계산하고, 가장 좋은 때의 가중치를 디스크가 아니라 메모리에 두고, 시험
답을 만들지 않는다.
"""

import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import train_settings

from utils.data.blocks import PackedDataset
from utils.data.exams import Exam, Item, load_exams, make_exam
from utils.data.kobest_files import find_task, read_task
from utils.decode import likelihood, scorecard
from utils.model import loader
from utils.model.targets import find_backbone
from utils.train import corpus, defaults, stage, step
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
VRAM_GB = 8.0  # 계획에만 쓴다. 한 카드에서 여럿이 함께 배운다
TOGETHER = 4096  # 한 번에 계산하는 토큰. 작은 모델은 블록 하나가 카드를 채우지 못한다
NEFTUNE = 5.0
BOOLQ_TRAIN, KOALPACA_TRAIN = 500, 400  # BoolQ는 dev만 있고 KoAlpaca는 500행뿐이라 나누어 쓴다
Rows = list[dict[str, str]]


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


class Lab:
    """설정 하나를 받아 가르치고 재는 곳. 일꾼 하나가 하나를 갖는다.

    Args:
        base: 기반 모델의 폴더.
        kobest: KoBEST의 TSV가 든 폴더.
        koalpaca: KoAlpaca의 textonly 파일.
        rows: 0이 아니면 학습과 시험의 행을 이만큼만 쓴다. 돌아가는지 볼 때 적는다.
    """

    def __init__(self, base: str, kobest: str, koalpaca: str, rows: int = 0):
        self.base, self.kobest, self.koalpaca, self.rows = base, Path(kobest), Path(koalpaca), rows
        self.work = Path(tempfile.mkdtemp())
        self.exams: dict[str, Exam] = {}
        corpus.load_tokenizer = functools.cache(corpus.load_tokenizer)
        read, known = corpus.read, {}

        def read_once(settings: Settings) -> corpus.Corpus:
            key = settings.data_path, settings.cutoff_len
            if key not in known:
                known[key] = read(settings)
            return known[key]

        corpus.read = read_once
        load, self.bases = loader.load_base, {}
        loader.load_base = lambda base, device, quantize=None, cache_dir=None: (
            self.bases.pop(quantize, None) or load(base, device, quantize, cache_dir))
        step.choose_step = lambda candidates, *others, **more: candidates[0]()
        if torch.cuda.is_available():
            likelihood.LOGIT_BYTES, likelihood.ROW_TOKENS = 1 << 29, 16384

    def run(self, case: dict) -> dict:
        """설정 하나의 결과: 맞힌 비율, 정답의 loss, 학습의 기록, 걸린 시간."""
        began = time.perf_counter()
        extra = case["extra"]
        flags = {**case["flags"], "lora_target_modules": tuple(case["flags"]["lora_target_modules"])}
        settings = train_settings(base_model=self.base, output_dir=str(self.work), cache_dir=str(self.work),
                                  vram_gb=VRAM_GB, seed=case["seed"], data_path=self.training_file(case), **flags)
        inputs = stage.prepare(settings, silent)
        settings = defaults.fill(settings, inputs.config, inputs.documents.pairs)
        if extra.get("alone"):
            inputs = unpacked(settings, inputs)
        plan = together(stage.plan(settings, inputs, silent), inputs.batch.block_len)
        with wide_base() if extra.get("wide") else as_it_is():
            model = stage.build_model(settings, inputs, silent)
        loaded = time.perf_counter()
        if extra.get("base"):
            found = {}
        elif extra.get("trainer"):
            from settings_trainer import train_plainly

            found = train_plainly(settings, inputs, plan, model, self.work)
        else:
            found = train(settings, inputs, plan, model, extra)
        trained = time.perf_counter()
        found |= self.score(case["task"], model, inputs)
        if not extra.keys() & {"trainer", "neftune"}:  # 남의 길은 모델에 무엇을 남겼는지 모른다
            self.give_back(model, None if extra.get("wide") else "4bit")
        return {**found, "batch": [inputs.batch.size, inputs.batch.block_len, inputs.batch.room],
                "steps": plan.schedule.steps, "tokens": inputs.train_set.n_tokens,
                "seconds": [round(loaded - began, 2), round(trained - loaded, 2),
                            round(time.perf_counter() - trained, 2)]}

    def give_back(self, model, quantize: str | None) -> None:
        """어댑터를 떼어 낸 기반 모델을 다음 학습에 남긴다. 실패한 학습의 것은 남기지 않아 새로 올린다."""
        self.bases[quantize] = model.unload()

    def score(self, task: str, model, inputs: stage.Inputs) -> dict:
        """시험의 성적. 보기가 있으면 맞힌 비율, 고르기의 loss를, 없으면 정답의 토큰마다의 loss를 잰다(nat)."""
        exam = self.exam(task, inputs)
        measured: list[likelihood.Likelihood] = []

        def ask(name: str, pairs: list) -> list[likelihood.Likelihood]:
            measured[:] = likelihood.measure(model, pairs)
            return measured

        model.eval()
        context = inputs.config["max_position_embeddings"]
        score = scorecard.measure(ask, ["tuned"], [exam], inputs.encoder, inputs.end_id, context, silent)[0]
        if len(exam.items[0].options) == 1:
            tokens = sum(len(each.logprobs) for each in measured)
            return {"answer_loss": -sum(each.total for each in measured) / tokens, "items": len(exam.items)}
        values = iter(measured)
        losses = [choice_loss([next(values).total for _ in item.options], item.answer) for item in exam.items]
        return {"accuracy": score.share("tuned"), "choice_loss": float(np.mean(losses)), "items": len(exam.items)}

    def exam(self, task: str, inputs: stage.Inputs) -> Exam:
        """배우지 않은 문항들."""
        if task not in self.exams:
            if task == "koalpaca":
                exam = load_exams(self.write(task, self.pool(task)[1]), inputs.prompter)[0]
            else:
                kind, rows = self.pool(task)[1]
                exam = make_exam(kind, rows, inputs.prompter, task)
            self.exams[task] = replace(exam, items=exam.items[:self.rows or None])
        return self.exams[task]

    @functools.cache  # noqa: B019 - 일꾼과 함께 끝난다
    def pool(self, task: str) -> tuple:
        """(배울 것, 시험). KoBEST면 (문항들, (Task, 행들))이고 KoAlpaca면 (행들, 행들)이다."""
        shuffle = np.random.default_rng(0).permutation
        if task == "koalpaca":
            lines = self.koalpaca.read_text(encoding="utf-8").splitlines()
            rows = [split_textonly(json.loads(line)["text"]) for line in lines if line.strip()]
            order = shuffle(len(rows))
            return [rows[at] for at in order[:KOALPACA_TRAIN]], [rows[at] for at in order[KOALPACA_TRAIN:]]
        files = {file.name.lower(): file for file in self.kobest.glob("*.tsv")}
        kind = find_task(files[f"{task}-dev.tsv"])
        held_out = read_task(files[f"{task}-dev.tsv"], kind)
        if f"{task}-train.tsv" in files:
            learned = read_task(files[f"{task}-train.tsv"], kind)
        else:
            order = shuffle(len(held_out))
            learned = [held_out[at] for at in order[:BOOLQ_TRAIN]]
            held_out = [held_out[at] for at in order[BOOLQ_TRAIN:]]
        items = make_exam(kind, learned, None, task).items
        return items, (kind, held_out)

    def training_file(self, case: dict) -> str:
        """배울 행을 담은 파일. 행의 수를 적었으면 씨앗마다 다른 행이다."""
        task, rows, count = case["task"], self.pool(case["task"])[0], case["rows"] or self.rows
        name = f"{task}-train"
        if count:
            name = f"{task}-{count}-{case['seed']}"
            rows = [rows[at] for at in np.random.default_rng(case["seed"]).permutation(len(rows))[:count]]
        if case["extra"].get("pairs"):
            return self.write(f"{name}-pairs", [pair for item in rows for pair in preferred(item)])
        return self.write(name, [answered(row) if isinstance(row, Item) else row for row in rows])

    def write(self, name: str, rows: Rows) -> str:
        file = self.work / f"{name}.jsonl"
        if not file.exists():
            file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        return str(file)


def answered(item: Item) -> dict[str, str]:
    """문항과 정답을 적은 행."""
    return {"instruction": item.text, "output": item.options[item.answer]}


def preferred(item: Item) -> Rows:
    """정답을 고르고 다른 보기를 버린 선호 쌍들."""
    right = item.options[item.answer]
    return [{"prompt": item.text, "chosen": right, "rejected": wrong} for wrong in item.options if wrong != right]


def split_textonly(text: str) -> dict[str, str]:
    question, answer = text.removeprefix("### 질문: ").split("\n\n### 답변: ", 1)
    return {"instruction": question, "output": answer.removesuffix("<|endoftext|>")}


def choice_loss(totals: list[float], answer: int) -> float:
    """보기들의 로그 가능도를 확률로 보았을 때 정답의 음의 로그 확률(nat)."""
    most = max(totals)
    return most + math.log(sum(math.exp(total - most) for total in totals)) - totals[answer]


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
    return {"path": loop.step.path, "before": before, "val_loss": loop.state.best_metric,
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


@contextmanager
def as_it_is() -> Iterator[None]:
    yield

