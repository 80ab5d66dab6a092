"""모델이 얼마나 배웠는지 잰다: 학습에 쓰지 않은 질문에 기반 모델과 학습한 모델이 한 답을 견준다."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np

from utils import record
from utils.data import blocks, dataset
from utils.errors import UsageError
from utils.paths import find_input
from utils.sampling import Sampling
from utils.talk.answerer import Answer, Answerer

MAX_NEW_TOKENS = 256
TOGETHER = 16  # 한꺼번에 답하는 질문의 수
CHRF_ORDER, CHRF_BETA = 6, 2
REPEAT_N = 4
# (이름, 표의 제목, 클수록 좋은가)
METRICS = (
    ("stopped", "스스로 멈춤(%)", True),
    ("chrf", "chrF", True),
    ("hangul", "한글 비율(%)", True),
    ("repetition", "반복(%)", False),
    ("echo", "질문 되풀이(%)", False),
)
MODELS = (("base", "기반", False), ("tuned", "학습 후", True))


@dataclass(frozen=True)
class Question:
    """검증 질문 하나. `input_ids`는 답이 시작되기 직전까지의 토큰이다."""

    text: str
    reference: str
    input_ids: list[int]


@dataclass(frozen=True)
class Validation:
    """학습에 쓰지 않은 질문들. 원본이 학습 뒤에 바뀌었으면 `changed`가 참이다."""

    questions: list[Question]
    changed: bool


def load_validation(run_dir: str | Path, answerer: Answerer, cache_dir: str | None = None) -> Validation:
    """run.json에 적힌 데이터를 다시 읽어, 학습할 때와 똑같이 나눈 검증 질문을 돌려준다.

    Raises:
        UsageError: 학습의 기록이나 데이터가 없거나, 검증하지 않은 학습이다.
    """
    run = record.read_run(run_dir)
    settings = run.get("settings", {})
    data_path = find_input(str(settings.get("data_path")))
    tokenizer, end_id = answerer.tokenizer, answerer.end_id
    documents = dataset.load_documents(data_path, answerer.prompter, answerer.encoder, int(settings["cutoff_len"]),
                                       end_id, cache_dir)
    if not settings.get("val_set_size"):
        raise UsageError("검증 질문을 남기지 않은 학습이다(val_set_size 0)")
    _, held_out = blocks.split_by_content(documents, settings["val_set_size"], settings["seed"])
    questions = []
    for member in blocks.with_answers(documents, held_out):
        tokens, is_answer = documents.document(member)
        start = int(np.argmax(is_answer))
        if start == 0:
            continue
        end = start + int(np.argmax(tokens[start:] == end_id))
        questions.append(Question(tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:end]).strip(),
                                  tokens[:start].tolist()))
    if not questions:
        raise UsageError(f"검증 질문이 없다: {data_path}")
    return Validation(questions, len(documents) != run.get("data", {}).get("rows", len(documents)))


def plain_question(question: Question, prompter) -> str:
    """템플릿의 표시를 뺀, 사람이 읽을 질문."""
    opening = prompter.prompt("\0").partition("\0")[0]
    marker = getattr(prompter, "answer_marker", "").rstrip(" ")
    return question.text.removeprefix(opening).removesuffix(marker).strip() or question.text


def make_answers(question: Question, context: int, session: str = "") -> tuple[Answer, ...]:
    """질문 하나에 대한 (기반, 학습 후) 답. 늘 가장 그럴듯한 토큰을 고르므로 다시 재도 같다."""
    settings = Sampling(temperature=0.0, max_new_tokens=min(MAX_NEW_TOKENS, context))
    return tuple(Answer(question.input_ids, settings, tuned, session=session) for _, _, tuned in MODELS)


def score(answer: Answer, question: Question, plain: str) -> dict[str, float]:
    """답 하나의 점수. 모두 0에서 100이다."""
    return {
        "stopped": 100.0 * (answer.finish_reason == "stop"),
        "chrf": chrf(answer.text, question.reference),
        "hangul": 100 * hangul_share(answer.text),
        "repetition": 100 * repetition(answer.ids),
        "echo": 100 * echo(answer.text, plain),
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
    """질문 가운데 답에 그대로 옮겨진 가장 긴 토막의 비율. 공백은 세지 않는다."""
    question, text = "".join(question.split()), "".join(text.split())
    if not question:
        return 0.0
    match = SequenceMatcher(None, question, text, autojunk=False).find_longest_match()
    return match.size / len(question)


def average(rows: Sequence[dict], model: str) -> dict[str, float]:
    """행들의 점수를 지표마다 평균한 것."""
    return {name: sum(row[model][name] for row in rows) / len(rows) for name, _, _ in METRICS}


def table(rows: Sequence[dict]) -> list[list[str]]:
    """지표마다 [제목, 기반, 학습 후, 차이]."""
    base, tuned = average(rows, "base"), average(rows, "tuned")
    return [[title + (" ↑" if better else " ↓"), f"{base[name]:.1f}", f"{tuned[name]:.1f}",
             f"{tuned[name] - base[name]:+.1f}"] for name, title, better in METRICS]


def to_csv(rows: Sequence[dict]) -> str:
    """행마다 질문, 기준 답, 두 답, 두 답의 점수를 담은 CSV. 엑셀이 한글을 알아보게 BOM으로 시작한다."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["질문", "기준 답", *(f"{title} 답" for _, title, _ in MODELS),
                     *(f"{title} {metric}" for _, title, _ in MODELS for _, metric, _ in METRICS)])
    for row in rows:
        writer.writerow([row["question"], row["reference"], *(row[f"{name}_text"] for name, _, _ in MODELS),
                         *(f"{row[name][metric]:.2f}" for name, _, _ in MODELS for metric, _, _ in METRICS)])
    return "\ufeff" + out.getvalue()


def make_row(question: Question, answers: Sequence[Answer], prompter) -> dict:
    """질문 하나의 결과: 질문, 기준 답, 두 답, 두 답의 점수."""
    plain = plain_question(question, prompter)
    row = {"question": plain, "reference": question.reference}
    for (name, _, _), answer in zip(MODELS, answers, strict=True):
        row[name], row[f"{name}_text"] = score(answer, question, plain), answer.text
    return row


def evaluate(answerer: Answerer, questions: Sequence[Question]) -> Iterator[dict]:
    """질문마다 두 모델의 답을 잰 행. 질문 `TOGETHER`개에 함께 답한다. 줄을 서지 않으므로 페이지 없이 쓴다."""
    for begin in range(0, len(questions), TOGETHER):
        group = questions[begin : begin + TOGETHER]
        pairs = [make_answers(question, answerer.context) for question in group]
        for answers in zip(*pairs, strict=True):
            answerer.together(answers)
        for question, answers in zip(group, pairs, strict=True):
            yield make_row(question, answers, answerer.prompter)


def _ngrams(text: str, order: int) -> Counter:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))
