"""검증 행 가운데 모델이 정답과 똑같이 답하는 행을 센다. 답을 만들지 않고 로그 가능도를 재며 안다.

늘 가장 그럴듯한 토큰을 고르는 답이 정답과 똑같다는 것은, 정답을 앞에서부터 보여 줄 때 자리마다 가장 그럴듯한 다음
토큰이 모두 정답의 토큰이라는 것과 같다.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from utils.console import telling
from utils.data.documents import Documents
from utils.data.questions import read_question
from utils.decode import likelihood
from utils.decode.likelihood import Pair
from utils.record import MODELS

SHORT_ANSWER = 64  # 이보다 긴 답(토큰, 끝 토큰 포함)이 정답과 똑같기를 바라지 않는다
MAX_ROWS = 1000


@dataclass(frozen=True)
class ExactMatch:
    """정답이 짧은 검증 행의 수(rows)와, 그 가운데 두 모델이 끝 토큰까지 똑같이 답하는 행의 수."""

    rows: int
    base: int
    tuned: int

    def line(self) -> str:
        found = ((model.title, getattr(self, model.name)) for model in MODELS)
        counts = [f"{title} {count}개({count / self.rows:.1%})" for title, count in found]
        return f"검증 질문 {self.rows}개 가운데 정답과 똑같은 답: {', '.join(counts)}"

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def measure(model, documents: Documents, held_out: np.ndarray,
            say: Callable[[str], None] = lambda line: None) -> ExactMatch | None:
    """기반 모델과 학습한 모델의 똑같은 답을 센다. 정답이 짧은 행이 절반이 안 되는 데이터면 None이다.

    Args:
        model: 어댑터를 얹은 PEFT 모델.
        documents: 데이터의 모든 행.
        held_out: 검증 행의 번호. [n] int64. 앞에서부터 MAX_ROWS개만 잰다.
        say: 오래 걸리면 얼마나 쟀는지 알릴 곳.
    """
    asked = [read_question(documents, member) for member in held_out[:MAX_ROWS]]
    brief = [row for row in asked if len(row.prompt) and len(row.answer) <= SHORT_ANSWER]
    if not brief or 2 * len(brief) < len(asked):
        return None
    short = [(row.prompt.tolist(), row.answer.tolist()) for row in brief]
    model.eval()
    done: list[int] = []
    with telling(say, lambda: f"  정답과 똑같은 답 {sum(done):,}/{len(MODELS) * len(short):,}개를 쟀다"):
        tuned = _count(model, short, done.append)
        with model.disable_adapter():
            return ExactMatch(len(short), _count(model, short, done.append), tuned)


def _count(model, pairs: Sequence[Pair], told: Callable[[int], None]) -> int:
    return sum(value.greedy for value in likelihood.measure(model, pairs, told=told))
