"""모델이 얼마나 배웠는지의 점수: 학습에 쓰지 않은 질문에 기반 모델과 학습한 모델이 한 답을 비교한다."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path

from utils import record
from utils.data import dataset
from utils.data.blocks import fingerprint
from utils.data.questions import held_out_members, plain_question, read_question
from utils.errors import UsageError
from utils.paths import find_recorded
from utils.record import MODELS
from utils.sampling import GREEDY
from utils.talk.answerer import Answer, Answerer
from utils.talk.guard import is_number

TOGETHER = 16  # 한꺼번에 답하는 질문의 수
CHRF_ORDER, CHRF_BETA = 6, 2
REPEAT_N = 4
SETTINGS = ("data_path", "cutoff_len", "val_set_size", "seed")  # 검증 질문을 다시 고르는 데 드는 학습의 설정


@dataclass(frozen=True)
class Metric:
    """점수 하나의 이름과 제목. `better_high`가 False면 작을수록 좋다."""

    name: str
    title: str
    better_high: bool


METRICS = (
    Metric("stopped", "스스로 멈춤(%)", better_high=True),
    Metric("chrf", "chrF", better_high=True),
    Metric("hangul", "한글 비율(%)", better_high=True),
    Metric("repetition", "반복(%)", better_high=False),
    Metric("echo", "질문 되풀이(%)", better_high=False),
)


@dataclass(frozen=True)
class Question:
    """검증 질문 하나. `text`는 사람이 읽을 질문, `input_ids`는 답이 시작되기 직전까지의 토큰이다."""

    text: str
    reference: str
    input_ids: list[int]


@dataclass(frozen=True)
class Scored:
    """한 모델의 답과 그 점수. `points`는 지표의 이름 -> 0에서 100."""

    text: str
    points: dict[str, float]


@dataclass(frozen=True)
class Row:
    """질문 하나의 결과. `answers`는 모델의 이름(`record.MODELS`) -> 그 모델의 답."""

    question: str
    reference: str
    answers: dict[str, Scored]


@dataclass(frozen=True)
class Validation:
    """학습에 쓰지 않은 질문들. 데이터나 검증 행이 학습할 때와 다르면 `changed`가 참이다."""

    questions: list[Question]
    changed: bool


def load_validation(run_dir: str | Path, answerer: Answerer, cache_dir: str | None = None) -> Validation:
    """run.json에 적힌 데이터를 다시 읽어, 학습할 때와 똑같이 나눈 검증 질문을 돌려준다.

    Raises:
        UsageError: 학습의 기록이나 데이터가 없거나, 검증하지 않은 학습이다.
    """
    run = record.read_run(run_dir)
    settings = run.get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get(SETTINGS[0]), str) or not all(
            is_number(settings.get(name)) for name in SETTINGS[1:]):
        raise UsageError(f"{Path(run_dir) / record.RUN_FILE}에 학습의 설정({', '.join(SETTINGS)})이 없다")
    if not settings["val_set_size"]:
        raise UsageError("검증 질문을 남기지 않은 학습이다(val_set_size 0)")
    data_path = find_recorded(str(settings["data_path"]))
    tokenizer = answerer.tokenizer
    documents = dataset.load_documents(data_path, answerer.prompter, answerer.encoder, int(settings["cutoff_len"]),
                                       answerer.end_id, cache_dir)
    members = held_out_members(documents, settings["val_set_size"], settings["seed"])
    asked = [each for each in (read_question(documents, member) for member in members) if len(each.prompt)]
    questions = [Question(plain_question(tokenizer, answerer.prompter, each.prompt),
                          tokenizer.decode(each.answer[:-1]).strip(), each.prompt.tolist()) for each in asked]
    if not questions:
        raise UsageError(f"검증 질문이 없다: {data_path}")
    recorded = run["data"] if isinstance(run.get("data"), dict) else {}
    now = {"sha256": documents.sha256, "validation_rows": len(members),
           "validation_sha256": fingerprint(documents, members)}
    return Validation(questions, any(recorded.get(name, value) != value for name, value in now.items()))


def make_answers(question: Question, context: int, session: str = "") -> tuple[Answer, ...]:
    """질문 하나에 대한 `MODELS` 차례의 답들. 늘 가장 그럴듯한 토큰을 고르므로 다시 재도 같다."""
    settings = replace(GREEDY, max_new_tokens=min(GREEDY.max_new_tokens, context))
    return tuple(Answer(question.input_ids, settings, model.tuned, session=session) for model in MODELS)


def score(answer: Answer, question: Question) -> dict[str, float]:
    """답 하나의 점수. 모두 0에서 100이다."""
    return {
        "stopped": 100.0 * (answer.finish_reason == "stop"),
        "chrf": chrf(answer.text, question.reference),
        "hangul": 100 * hangul_share(answer.text),
        "repetition": 100 * repetition(answer.ids),
        "echo": 100 * echo(answer.text, question.text),
    }


def chrf(hypothesis: str, reference: str) -> float:
    """글자 n-gram의 F-점수, 0에서 100. 공백은 세지 않는다.

    출처: Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015. n은 6까지, beta는 2.
    """
    hypothesis, reference = "".join(hypothesis.split()), "".join(reference.split())
    precisions, recalls = [], []
    for order in range(1, CHRF_ORDER + 1):
        ours, theirs = _ngrams(hypothesis, order), _ngrams(reference, order)
        if ours and theirs:
            matched = sum((ours & theirs).values())
            precisions.append(matched / ours.total())
            recalls.append(matched / theirs.total())
    if not precisions or not any(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * (1 + CHRF_BETA**2) * precision * recall / (CHRF_BETA**2 * precision + recall)


def hangul_share(text: str) -> float:
    """공백이 아닌 글자 가운데 한글의 비율."""
    letters = [char for char in text if not char.isspace()]
    return sum("가" <= char <= "힣" or "ㄱ" <= char <= "ㅣ" for char in letters) / max(1, len(letters))


def repetition(ids: Sequence[int]) -> float:
    """앞에 나온 토큰 4-gram을 되풀이한 비율(seq-rep-4).

    출처: Welleck 외, "Neural Text Generation with Unlikelihood Training", 2020.
    """
    grams = [tuple(ids[start : start + REPEAT_N]) for start in range(len(ids) - REPEAT_N + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def echo(text: str, question: str) -> float:
    """질문 가운데 답에 그대로 옮겨진 가장 긴 부분의 비율. 공백은 세지 않는다."""
    question, text = "".join(question.split()), "".join(text.split())
    if not question:
        return 0.0
    match = SequenceMatcher(None, question, text, autojunk=False).find_longest_match()
    return match.size / len(question)


def average(rows: Sequence[Row], model: str) -> dict[str, float]:
    """행들의 점수를 지표마다 평균한 것."""
    every = [row.answers[model].points for row in rows]
    return {metric.name: sum(points[metric.name] for points in every) / len(rows) for metric in METRICS}


def table(rows: Sequence[Row]) -> list[list[str]]:
    """지표마다 [제목, 기반 모델, 학습한 모델, 차이]."""
    base, tuned = average(rows, "base"), average(rows, "tuned")
    lines = []
    for metric in METRICS:
        title = metric.title + (" ↑" if metric.better_high else " ↓")
        before, after = base[metric.name], tuned[metric.name]
        lines.append([title, f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}"])
    return lines


def to_csv(rows: Sequence[Row]) -> str:
    """행마다 질문, 모범 답, 두 답, 두 답의 점수를 담은 CSV. 엑셀이 한글을 알아보게 BOM으로 시작한다."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["질문", "모범 답", *(f"{model.title} 답" for model in MODELS),
                     *(f"{model.title} {metric.title}" for model in MODELS for metric in METRICS)])
    for row in rows:
        answers = [row.answers[model.name] for model in MODELS]
        writer.writerow([row.question, row.reference, *(answer.text for answer in answers),
                         *(f"{answer.points[metric.name]:.2f}" for answer in answers for metric in METRICS)])
    return "\ufeff" + out.getvalue()


def make_row(question: Question, answers: Sequence[Answer]) -> Row:
    """질문 하나의 결과. `answers`는 `make_answers`가 만든 차례대로다."""
    return Row(question.text, question.reference, {model.name: Scored(answer.text, score(answer, question))
                                                   for model, answer in zip(MODELS, answers, strict=True)})


def evaluate(answerer: Answerer, questions: Sequence[Question]) -> Iterator[Row]:
    """질문마다 두 모델의 답을 잰 행. 질문 `TOGETHER`개에 함께 답한다. 줄을 서지 않으므로 페이지 없이 쓴다."""
    for begin in range(0, len(questions), TOGETHER):
        group = questions[begin : begin + TOGETHER]
        pairs = [make_answers(question, answerer.context) for question in group]
        for answers in zip(*pairs, strict=True):
            answerer.together(answers)
        for question, answers in zip(group, pairs, strict=True):
            yield make_row(question, answers)


def _ngrams(text: str, order: int) -> Counter:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))
