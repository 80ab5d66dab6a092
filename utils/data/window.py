"""긴 대화에서 학습할 창: 차례 가운데가 아니라 차례에서, 앞에서부터 덜어 내고 system은 남긴다."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from utils.data.encoder import Encoder
from utils.turns import Pieces, Turn

_SHORTEST = 2  # 주고받음 한 번의 가장 적은 토큰


class Window:
    """대화를 `cutoff_len`에 맞는 문서들로 바꾼다.

    한 번만 주고받은 대화는 자르지 않는다. 배우는 마지막 답의 뒤(weight 0인 답들)는 먼저 덜어 낸다. 마지막 주고받음이
    혼자서도 너무 길면 그것만 남기고, 문서를 꺼낼 때 토큰에서 잘린다.

    Attributes:
        dropped: 마지막으로 바꾼 대화에서 덜어 낸 주고받음의 수.
    """

    def __init__(self, prompter, encoder: Encoder, cutoff_len: int):
        self._prompter = prompter
        self._encoder = encoder
        self._cutoff_len = cutoff_len
        self.dropped = 0

    def documents(self, turns: Sequence[Turn]) -> list[Pieces]:
        """대화의 문서들. 배우는 답이 적어도 하나 남는다.

        Raises:
            UsageError: 템플릿이 이 대화를 받지 않는다.
        """
        self.dropped = 0
        head = [turn for turn in turns if turn.role == "system"]
        asked, answered = turns[len(head) :: 2], turns[len(head) + 1 :: 2]
        pairs = list(zip(asked, answered, strict=False))  # 주고받음마다 (user, assistant)
        if len(pairs) < 2:
            return self._prompter.talk(turns)
        if len(pairs) * _SHORTEST <= self._cutoff_len:
            documents = self._prompter.talk(turns)
            if all(map(self._fits, documents)):
                return documents
        last = max(place for place, (_, answer) in enumerate(pairs) if answer.learned)
        if self._is_one_document(head, pairs):
            start = self._start(lambda at: _said(head, pairs[at : last + 1]), 0, last)
            self.dropped = start + len(pairs) - last - 1
            return self._prompter.talk(_said(head, pairs[start : last + 1]))
        documents = self._one_each(head, pairs[: last + 1])
        self.dropped += len(pairs) - last - 1
        return documents

    def _one_each(self, head: list[Turn], pairs: list[tuple[Turn, Turn]]) -> list[Pieces]:
        """배우는 답마다 문서 하나. 창은 답마다 따로 정한다."""
        documents, start = [], 0
        for place, (asked, answer) in enumerate(pairs):
            if not answer.learned:
                continue
            past = [(question, replace(said, learned=False)) for question, said in pairs[:place]]
            window = [*past, (asked, answer)]
            start = self._start(lambda at, window=window: _said(head, window[at:]), start, place)
            documents += self._prompter.talk(_said(head, window[start:]))
        self.dropped = start
        return documents

    def _start(self, talk_from: Callable[[int], list[Turn]], low: int, high: int) -> int:
        """[low, high]에서 `talk_from(at)`이 들어가는 가장 앞의 자리. 하나도 없으면 high다.

        앞을 많이 덜어 낼수록 짧아지므로, 들어가는 자리들은 어느 자리부터 high까지 이어져 있다. 뒤에서부터 1, 2, 4...씩
        넓혀 들어가지 않는 자리를 만난 다음, 그 사이를 이분 탐색한다.
        """
        def fits(at: int) -> bool:
            return self._fits(self._prompter.talk(talk_from(at))[-1])

        low = max(low, high + 1 - self._cutoff_len // _SHORTEST)
        good, step = high, 1  # good은 들어가는 자리. 긴 대화 전체를 글로 만들지 않는다
        while good > low and fits(max(low, good - step)):
            good, step = max(low, good - step), step * 2
        bad = max(low, good - step) if good > low else low - 1  # 들어가지 않는 자리
        while good - bad > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if fits(middle) else (good, middle)
        return good

    def _is_one_document(self, head: list[Turn], pairs: list[tuple[Turn, Turn]]) -> bool:
        """앞의 답이 다음 차례에서도 같은 글인 템플릿인지."""
        two = [(asked, replace(answer, learned=True)) for asked, answer in pairs[-2:]]
        return len(self._prompter.talk(_said(head, two))) == 1

    def _fits(self, pieces: Pieces) -> bool:
        characters = sum(len(part) for piece in pieces for part in piece)
        most = len(self._encoder.head) + characters * 4 + len(pieces)  # 글자는 많아야 4바이트고, 토큰은 그보다 적다
        if most <= self._cutoff_len:
            return True
        return self._encoder.length(pieces) <= self._cutoff_len


def _said(head: list[Turn], pairs: list[tuple[Turn, Turn]]) -> list[Turn]:
    return [*head, *(turn for pair in pairs for turn in pair)]
