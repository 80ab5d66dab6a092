"""설정의 벤치(`bench_settings.py`)가 묻는 것들과, 결과에서 가장 좋은 설정을 고르는 법."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from utils.train.defaults import OTHER_RATE

TARGETS = ("attention", "all")  # 뒤의 것이 polyglot이 아닌 모델의 기본값이다
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3)
SEEDS = (1, 2, 3)
EPOCHS = {"sentineg": 2, "copa": 2, "boolq": 3, "koalpaca": 3}
RANK_AT = 8  # lora_alpha 16이 배율 2가 되는 rank. rank를 바꾸어도 배율을 따라 재려고 기준으로 삼는다
THIRD = float(f"{OTHER_RATE / 3:.1g}")
ANSWERS = {"train_on_inputs": False}
Rows = list[tuple[str, dict]]
Results = dict[str, dict]


def case(task: str, targets: str = TARGETS[-1], rate: float = OTHER_RATE, rows: int = 0, extra: dict | None = None,
         **flags) -> dict:
    """시드를 뺀 설정 하나. 적지 않은 것은 도구의 기본값이고, epoch은 시험마다 정한 것이다."""
    flags = {"num_train_epochs": EPOCHS[task], "learning_rate": rate, "lora_target_modules": [targets], **flags}
    return {"task": task, "rows": rows, "flags": flags, "extra": extra or {}}


def key_of(one: dict) -> str:
    return json.dumps(one, sort_keys=True)


@dataclass(frozen=True)
class Question:
    """물음 하나.

    Attributes:
        rows: 표의 줄마다 (이름, 설정).
        seeds: 줄마다 배울 시드.
    """

    title: str
    rows: Rows
    seeds: tuple[int, ...] = SEEDS

    def cases(self) -> Iterator[dict]:
        """줄마다 모든 시드."""
        for _, one in self.rows:
            for seed in self.seeds:
                yield {**one, "seed": seed}


def grid(task: str) -> Rows:
    return [(f"{targets}, {rate:g}", case(task, targets, rate)) for targets in TARGETS for rate in RATES]


SENTINEG = Question("SentiNeg: 층과 학습률", grid("sentineg"))
KOALPACA = Question("KoAlpaca: 층과 학습률", grid("koalpaca"))
BASE = Question("배우기 전", [(f"{task}{name}", case(task, "attention", 1e-3, 30, {"base": True, **extra}))
                           for name, extra in (("", {}), (", 16비트", {"wide": True})) for task in EPOCHS], SEEDS[:1])


def every_question() -> list[Question]:
    """값진 차례다. 층과 학습률의 표가 아닌 것은 도구의 기본값에서 하나씩 바꾸어 묻는다."""
    return [
        BASE, SENTINEG, Question("Trainer", trainer()), Question("질문도 배우기", answers_only()), KOALPACA,
        Question("BoolQ: 층과 학습률", grid("boolq")), Question("COPA: 층과 학습률", grid("copa")),
        Question("보기를 고르기", choosing()),
        *(Question(f"{rows}행: SentiNeg", few("sentineg", rows)) for rows in (30, 100)),
        Question("다른 방법", others("sentineg") + others("koalpaca")),
        Question("rank", ranks("sentineg") + ranks("koalpaca")),
        Question("epoch", [row for task in ("sentineg", "koalpaca", "boolq") for row in epochs(task)]),
        Question("batch", batches("sentineg") + batches("koalpaca")),
        Question("30행: KoAlpaca", few("koalpaca", 30)),
    ]


def trainer() -> Rows:
    """같은 것을 PEFT와 transformers.Trainer로도."""
    return [(f"{task}, {name}", case(task, extra=extra)) for task in ("sentineg", "koalpaca", "boolq")
            for name, extra in (("이 도구", {}), ("PEFT와 Trainer", {"trainer": True}))]


def answers_only() -> Rows:
    rows = [(f"{task}, 답만", case(task, **ANSWERS)) for task in EPOCHS]
    return [*rows, *((f"{task}, 답만, {OTHER_RATE / 2:g}", case(task, rate=OTHER_RATE / 2, **ANSWERS))
                     for task in ("sentineg", "koalpaca"))]


def choosing() -> Rows:
    """보기를 고르는 문항을 더 잘 배우게 할 만한 것들: 더 오래, 답만, 선호 쌍으로."""
    rows = [(f"{task}, {n} epoch, 답만", case(task, num_train_epochs=n, **ANSWERS))
            for task in ("copa", "boolq") for n in (5, 10)]
    pairs = [*((rate, 2) for rate in (1e-5, 3e-5, 1e-4, 5e-4)), (1e-4, 5)]
    rows += [(f"copa, 선호 쌍, {rate:g}, {n} epoch", preferring("copa", rate, n)) for rate, n in pairs]
    return [*rows, ("boolq, 선호 쌍, 0.0001, 2 epoch", preferring("boolq", 1e-4, 2))]


def preferring(task: str, rate: float, n_epochs: int) -> dict:
    """정답을 고르고 다른 보기를 버린 선호 쌍으로."""
    return case(task, rate=rate, num_train_epochs=n_epochs, extra={"pairs": True})


def few(task: str, rows: int) -> Rows:
    """몇십 행만 배울 때."""
    found = [(f"{n} epoch, {rate:g}", case(task, rate=rate, rows=rows, num_train_epochs=n))
             for rate in (OTHER_RATE, THIRD) for n in (3, 10)]
    return [(f"5 epoch, {OTHER_RATE:g}", case(task, rows=rows, num_train_epochs=5)), *found,
            (f"5 epoch, {2 * OTHER_RATE:g}", case(task, rate=2 * OTHER_RATE, rows=rows, num_train_epochs=5)),
            (f"5 epoch, {OTHER_RATE:g}, 답만", case(task, rows=rows, num_train_epochs=5, **ANSWERS))]


def others(task: str) -> Rows:
    return [(f"{task}, 채우지 않음", case(task, extra={"alone": True})),
            (f"{task}, 16비트로 배우고 묻기", case(task, extra={"wide": True})),
            (f"{task}, 4비트로 배우고 16비트로 묻기", case(task, extra={"asked_wide": True})),
            (f"{task}, LoRA+ 16", case(task, extra={"lora_plus": 16})),
            (f"{task}, LoRA+ 16, 학습률 1/4", case(task, rate=OTHER_RATE / 4, extra={"lora_plus": 16})),
            (f"{task}, dropout 0", case(task, lora_dropout=0.0)),
            (f"{task}, NEFTune 5", case(task, extra={"neftune": True}))]


def ranks(task: str) -> Rows:
    return [(f"{task}, r {r}, {name}", case(task, lora_r=r, lora_alpha=alpha)) for r in (32, 16, 4)
            for name, alpha in (("rsLoRA", round(2 * math.sqrt(RANK_AT * r), 3)), ("alpha 2r", 2 * r))]


def epochs(task: str) -> Rows:
    return [(f"{task}, {n} epoch", case(task, num_train_epochs=n)) for n in (1, 2, 3, 5, 10)]


def batches(task: str) -> Rows:
    return [(f"{task}, batch {n}", case(task, batch_size=n)) for n in (1, 4, 8, 16)]


def questions(only: list[str] | None = None) -> list[Question]:
    """모든 물음. `only`를 적으면 이름이 그렇게 시작하는 것만, 적은 차례로."""
    every = every_question()
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
