"""성적표: 시험마다 기반 모델과 학습한 모델이 맞힌 비율. 답을 만들지 않고 보기의 로그 가능도로 안다.

보기가 여럿인 문항은 로그 가능도가 가장 큰 보기를 고른 것으로 보고, 정답만 있는 문항은 끝 토큰까지 정답과 똑같이 답할
때 맞힌 것으로 본다.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from utils.console import telling
from utils.data.encoder import Encoder
from utils.data.exams import Exam, Item
from utils.decode.likelihood import Likelihood, Pair
from utils.record import MODELS

Ask = Callable[[str, list[Pair], Callable[[int], None]], list[Likelihood]]


@dataclass(frozen=True)
class Score:
    """시험 하나의 결과.

    Attributes:
        name, title: 시험의 이름과 사람에게 보일 제목.
        items: 문항의 수.
        right: 모델의 이름(`record.MODELS`) -> 맞힌 문항의 수. 어댑터가 없으면 "base"뿐이다.
        seconds: 모델들을 재는 데 걸린 시간.
        cut: 모델이 읽는 길이보다 길어 앞을 자른 문항의 수.
        source: `Exam.source`.
    """

    name: str
    title: str
    items: int
    right: dict[str, int]
    seconds: float
    cut: int = 0
    source: str = ""

    def share(self, model: str) -> float:
        """맞힌 비율. 0에서 1."""
        return self.right[model] / self.items

    def error(self, model: str) -> float:
        """비율의 표준오차: 표본 표준편차를 문항 수의 제곱근으로 나눈 것."""
        share = self.share(model)
        return math.sqrt(share * (1 - share) / max(1, self.items - 1))

    def line(self) -> str:
        titles = {model.name: f"{model.title} " for model in MODELS} if len(self.right) > 1 else {}
        parts = [f"{titles.get(name, '')}{self.share(name):.1%} ±{self.error(name):.1%}" for name in self.right]
        cut = f". 길어서 앞을 자른 문항 {self.cut:,}개" if self.cut else ""
        return f"{self.title} {self.items:,}문항({self.seconds:.1f}초): {', '.join(parts)}{cut}"

    def as_dict(self) -> dict:
        return {**asdict(self), "accuracy": {name: self.share(name) for name in self.right},
                "standard_error": {name: self.error(name) for name in self.right}}


def measure(ask: Ask, names: Sequence[str], exams: Sequence[Exam], encoder: Encoder, end_id: int, context: int,
            say: Callable[[str], None]) -> list[Score]:
    """시험마다 모델들의 점수. 모델들은 같은 문항에 답하고, 한 시험이 끝날 때마다 `say`로 한 줄을 알린다.

    Args:
        ask: (모델의 이름, 문맥과 보기의 토큰들, 잴 때마다 잰 수를 받을 것)을 받아 로그 가능도를 주는 것.
        names: 잴 모델의 이름(`record.MODELS`)들.
        context: 모델이 읽을 수 있는 토큰의 수. 이보다 긴 문항은 앞을 자른다.
    """
    scores = []
    for exam in exams:
        began = time.perf_counter()
        whole = [encode(item, encoder, end_id) for item in exam.items]
        pairs = [[fitted(pair, context) for pair in options] for options in whole]
        n_cut = sum(before != after for before, after in zip(whole, pairs, strict=True))
        together = [pair for options in pairs for pair in options]
        values = _ask_models(ask, names, together, exam.title, say)
        right = {name: count_right(exam.items, each) for name, each in values.items()}
        seconds = time.perf_counter() - began
        found = [Score(exam.name, exam.title, len(exam.items),
                       {name: each.plain for name, each in right.items()}, seconds, n_cut, exam.source)]
        if exam.by_length:
            found.append(Score(f"{exam.name}_norm", f"{exam.title}(글자 수로 나눔)", len(exam.items),
                               {name: each.by_length for name, each in right.items()}, seconds, n_cut, exam.source))
        for score in found:
            say(score.line())
        scores += found
    return scores


def _ask_models(ask: Ask, names: Sequence[str], pairs: list[Pair], title: str,
                say: Callable[[str], None]) -> dict[str, list[Likelihood]]:
    """모델마다의 값. 오래 걸리면 얼마나 쟀는지 때때로 말한다."""
    done: list[int] = []
    with telling(say, lambda: f"  {title} 보기 {sum(done):,}/{len(names) * len(pairs):,}개를 쟀다"):
        return {name: ask(name, pairs, done.append) for name in names}


def encode(item: Item, encoder: Encoder, end_id: int) -> list[Pair]:
    """보기마다의 (문맥, 보기)의 토큰. 정답 하나만 있는 문항에는 끝 토큰도 든다.

    템플릿이 있는 문항은 학습과 같이 프롬프트와 답을 따로 토큰으로 바꾼다. 글 그대로 잇는 문항은
    lm-evaluation-harness처럼 이은 글을 한 번에 바꾸고 문맥의 토큰 수에서 가른다.
    """
    if item.asked:
        pairs = []
        for tokens, marks in encoder.encode_batch(list(item.asked)):
            # 마지막 답의 자리: 답인 마지막 토큰까지(대화 템플릿은 뒤에 줄바꿈을 둔다), 답이 아닌 마지막 토큰의 다음부터
            end = max(place for place, mark in enumerate(marks) if mark == 1) + 1
            start = max((place for place, mark in enumerate(marks[:end]) if mark != 1), default=-1) + 1
            pairs.append((tokens[:start], tokens[start:end]))
    else:
        body = encoder.encode_prompt(item.text.rstrip())
        whole = [encoder.encode_prompt(f"{item.text} {option}") for option in item.options]
        pairs = [(body, tokens[len(body):]) for tokens in whole]
    if len(item.options) > 1:
        return [(question, answer[:-1] if answer[-1] == end_id else answer) for question, answer in pairs]
    return pairs


def fitted(pair: Pair, context: int) -> Pair:
    """모델이 읽을 수 있게 앞을 자른 것. 마지막 토큰은 맞히기만 하고 읽지 않으므로 `context`보다 하나 많이 남긴다."""
    question, answer = pair
    answer = answer[:context]
    return question[len(answer) - context - 1:], answer


class Right(NamedTuple):
    """맞힌 문항의 수와, 로그 가능도를 보기의 글자 수로 나누어 고를 때 맞힌 수."""

    plain: int
    by_length: int


def count_right(items: Sequence[Item], values: Sequence[Likelihood]) -> Right:
    """모델 하나가 맞힌 문항을 센다.

    Args:
        values: 문항의 차례로, 문항마다 보기의 차례로 이은 값.
    """
    plain = by_length = 0
    following = iter(values)
    for item in items:
        found = [next(following) for _ in item.options]
        if len(found) == 1:
            plain += found[0].greedy
            continue
        totals = [value.total for value in found]
        shares = [total / len(option) for total, option in zip(totals, item.options, strict=True)]
        plain += totals.index(max(totals)) == item.answer
        by_length += shares.index(max(shares)) == item.answer
    return Right(plain, by_length)
