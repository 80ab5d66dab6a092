"""설정의 벤치(`bench_settings.py`)가 묻는 것들과, 결과에서 가장 좋은 설정을 고르는 법."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from utils.train.defaults import OTHER_RATE

TARGETS = ("attention", "all")
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3)
SEEDS = (1, 2, 3)
EPOCHS = {"sentineg": 2, "copa": 2, "boolq": 3, "koalpaca": 3}
RANK_AT = 8  # lora_alpha 16이 배율 2가 되는 rank. rank를 바꾸어도 배율을 따라 재려고 기준으로 삼는다
Results = dict[str, dict]


def case(task: str, targets: str = "attention", rate: float = 1e-3, rows: int = 0, extra: dict | None = None,
         **flags) -> dict:
    """씨앗을 뺀 설정 하나."""
    flags = {"num_train_epochs": EPOCHS[task], "learning_rate": rate, "lora_target_modules": [targets], **flags}
    return {"task": task, "rows": rows, "flags": flags, "extra": extra or {}}


def key_of(one: dict) -> str:
    return json.dumps(one, sort_keys=True)


@dataclass(frozen=True)
class Question:
    """물음 하나.

    Attributes:
        rows: 표의 줄마다 (이름, 설정).
        seeds: 줄마다 배울 씨앗.
    """

    title: str
    rows: list[tuple[str, dict]]
    seeds: tuple[int, ...] = SEEDS

    def cases(self) -> Iterator[dict]:
        """씨앗마다 모든 줄. 도중에 그쳐도 줄끼리 비교할 수 있다."""
        for seed in self.seeds:
            for _, one in self.rows:
                yield {**one, "seed": seed}


def grid(task: str, targets=TARGETS, rates=RATES) -> list[tuple[str, dict]]:
    return [(f"{target}, {rate:g}", case(task, target, rate)) for target in targets for rate in rates]


SENTINEG = Question("SentiNeg: 층과 학습률", grid("sentineg"))
KOALPACA = Question("KoAlpaca: 층과 학습률", grid("koalpaca"), SEEDS[:2])
FIRST = [
    Question("배우기 전", [(task, case(task, rows=30, extra={"base": True})) for task in EPOCHS], SEEDS[:1]),
    SENTINEG, KOALPACA,
    Question("BoolQ: 층과 학습률", grid("boolq", rates=(2e-4, 5e-4, 1e-3, 2e-3)), SEEDS[:2]),
    Question("COPA: 층과 학습률", grid("copa", rates=(2e-4, 5e-4, 1e-3, 2e-3)), SEEDS[:2]),
]


def at_default(task: str, rate: float = OTHER_RATE, rows: int = 0, extra: dict | None = None, **flags) -> dict:
    """도구의 기본값에서 몇 가지만 바꾼 설정."""
    return case(task, "auto", rate, rows, extra, **flags)


def later_questions() -> list[Question]:
    """기본값에서 하나씩 바꾸어 묻는 것들."""
    third, answers = float(f"{OTHER_RATE / 3:.1g}"), {"train_on_inputs": False}
    trainer = [(f"{task}, {name}", at_default(task, extra=extra)) for task in ("sentineg", "koalpaca", "boolq")
               for name, extra in (("이 도구", {}), ("PEFT와 Trainer", {"trainer": True}))]
    epochs = [(f"{n} epoch, {rate:g}", at_default("sentineg", rate, num_train_epochs=n))
              for rate in (OTHER_RATE, third) for n in (1, 2, 3, 5)]
    rank = [(f"r {r}, {name}", at_default("sentineg", lora_r=r, lora_alpha=alpha))
            for r in (32, 16, 4) for name, alpha in
            (("rsLoRA", round(2 * math.sqrt(RANK_AT * r), 3)), ("alpha 2r", 2 * r))]
    inputs = [(f"{task}, 답만", at_default(task, **answers)) for task in EPOCHS]
    inputs.append((f"sentineg, 답만, {OTHER_RATE / 2:g}", at_default("sentineg", OTHER_RATE / 2, **answers)))
    batches = [(f"batch {n}", at_default("sentineg", batch_size=n)) for n in (1, 4, 8, 16)]
    others = [("채우지 않음", at_default("sentineg", extra={"alone": True})),
              ("16비트 기반", at_default("sentineg", extra={"wide": True})),
              ("LoRA+ 16", at_default("sentineg", extra={"lora_plus": 16})),
              ("LoRA+ 16, 학습률 1/4", at_default("sentineg", OTHER_RATE / 4, extra={"lora_plus": 16})),
              ("dropout 0", at_default("sentineg", lora_dropout=0.0)),
              ("NEFTune 5", at_default("sentineg", extra={"neftune": True}))]
    return [Question("Trainer", trainer), Question("epoch", epochs),
            *(Question(f"{rows}행: SentiNeg", few("sentineg", rows, (OTHER_RATE, third)))
              for rows in (30, 60, 100, 200, 400)),
            Question("다른 방법", others), Question("rank", rank), Question("질문도 배우기", inputs),
            Question("batch", batches),
            *(Question(f"{rows}행: KoAlpaca", few("koalpaca", rows, (OTHER_RATE, third)), SEEDS[:2])
              for rows in (30, 60, 100, 200))]


def few(task: str, rows: int, rates: tuple[float, ...]) -> list[tuple[str, dict]]:
    return [(f"{n} epoch, {rate:g}", at_default(task, rate, rows, num_train_epochs=n))
            for rate in rates for n in (3, 10)]


def questions(only: list[str] | None = None) -> list[Question]:
    """모든 물음. `only`를 적으면 이름이 그렇게 시작하는 것만, 적은 차례로."""
    every = [*FIRST, *later_questions()]
    return every if not only else [each for name in only for each in every if each.title.startswith(name)]


def best(results: Results) -> tuple[str, float] | None:
    """두 시험에서 함께 가장 덜 뒤지는 (층, 학습률). 뒤진 것은 SentiNeg에서 놓친 %p와 KoAlpaca에서 커진 loss의 %다.

    두 표가 다 차지 않았으면 None이다.
    """
    behind: dict[tuple[str, float], float] = {}
    for question, measure in ((SENTINEG, "accuracy"), (KOALPACA, "answer_loss")):
        means = {}
        for _, one in question.rows:
            values = values_of(results, one, question.seeds, measure)
            place = one["flags"]["lora_target_modules"][0], one["flags"]["learning_rate"]
            if len(values) < len(question.seeds):
                return None
            means[place] = statistics.mean(values)
        for place, value in means.items():
            lost = max(means.values()) - value if measure == "accuracy" else value / min(means.values()) - 1
            behind[place] = behind.get(place, 0.0) + 100 * lost
    return min(behind, key=behind.get)


def values_of(results: Results, one: dict, seeds, measure: str) -> list[float]:
    found = [results.get(key_of({**one, "seed": seed}), {}).get(measure) for seed in seeds]
    return [value for value in found if value is not None]
