"""선호 쌍에서만 보이는 것: 같은 두 답, 서로 바뀐 쌍, 길이의 차이, 블록보다 긴 쌍."""

import numpy as np

from utils.data.blocks import fitting_pairs
from utils.data.documents import Documents
from utils.data.preferences import Pair

LENGTH_BIAS, LEAST_APART = 1.3, 10  # 두 답의 평균 길이가 이 비율과 이 글자 수보다 더 다르면 말한다
ENOUGH = 5  # 쌍이 이보다 적으면 길이를 비교하지 않는다


class PairCheck:
    """선호 쌍을 하나씩 본다.

    Attributes:
        count, n_same: 지금까지 본 쌍의 수와, 그 가운데 두 답이 같은 것의 수.
    """

    def __init__(self):
        self.count = self.n_same = 0
        self._characters = np.zeros(2)  # 고른 답과 버린 답의 글자의 수
        self._seen: set[int] = set()

    def look(self, pair: Pair) -> list[str]:
        """쌍 하나에서 보이는 잘못의 종류."""
        self.count += 1
        self.n_same += pair.is_same
        self._characters += len(pair.better[-1].text), len(pair.worse[-1].text)
        swapped = hash((tuple(pair.rejected), tuple(pair.chosen))) in self._seen
        self._seen.add(hash((tuple(pair.chosen), tuple(pair.rejected))))
        return ["same_pair"] if pair.is_same else ["swapped_pair"] if swapped else []

    def finish(self) -> dict[str, dict]:
        """모두 보아야 아는 것."""
        chosen, rejected = self._characters / max(self.count, 1)
        biased = max(chosen, rejected) > LENGTH_BIAS * min(chosen, rejected) and abs(chosen - rejected) > LEAST_APART
        if self.count < ENOUGH or not biased:
            return {}
        return {"length_bias": {"count": self.count, "rows": [], "note": f"평균 {chosen:.0f}자와 {rejected:.0f}자"}}


def answer_lengths(documents: Documents) -> tuple[float, float]:
    """고른 답과 버린 답의 평균 길이(토큰, 끝 토큰까지)."""
    learned = np.add.reduceat(documents.answer == 1, documents.offsets[:-1])
    return float(learned[0::2].mean()), float(learned[1::2].mean())


def find_long(documents: Documents) -> tuple[np.ndarray, str]:
    """(블록에 들어가지 않는 쌍의 고른 답의 문서들, 덧붙일 말)."""
    every = np.arange(len(documents))
    long = documents.asked(np.setdiff1d(every, fitting_pairs(documents, every)))
    fits = int(np.quantile(documents.full_lengths().reshape(-1, 2).sum(1), 0.99, method="higher"))
    return long, f"{2 * len(long) / len(documents):.1%}, 99%가 들어가는 cutoff_len은 {fits}"
