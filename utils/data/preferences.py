"""선호 쌍의 행: 한 질문의 고른 답(chosen)과 버린 답(rejected). 열 이름에서 꼴을 알고, 두 대화로 읽는다."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from utils.data.talks import BadTurns, read_turns
from utils.turns import Pieces, Turn

# (고른 답, 버린 답)의 열. 앞의 것부터 고른다
PREFERENCES = (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("좋은답", "나쁜답"),
               ("좋은답변", "나쁜답변"), ("선호", "비선호"), ("고른답", "버린답"))
# 그 질문의 열. 앞의 것부터 고른다
ASKED = ("prompt", "instruction", "question", "query", "질문", "문제", "명령", "지시", "input", "입력", "q")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # 두 답이 대화 전체인 글(Anthropic HH)의 표시
_DECORATION = re.compile(r"\([^()]*\)|\s+|\W+$|^\W+")
_TAIL = re.compile(r"(?<=[가-힣])(?:내용|사항)$")
_SPEAKER = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Pair:
    """선호 쌍 하나.

    Attributes:
        better, worse: 고른 답과 버린 답으로 끝나는 글들. 마지막 답 말고는 같다.
        chosen, rejected: 템플릿으로 말한 그 문서들.
    """

    better: list[Turn]
    worse: list[Turn]
    chosen: Pieces
    rejected: Pieces

    @property
    def is_same(self) -> bool:
        """두 답이 같아 배울 것이 없는가."""
        return self.better[-1].text.strip() == self.worse[-1].text.strip()


def plain(name: str) -> str:
    """대소문자, 빈칸, 괄호 속의 글, 끝의 점과 '내용'을 가리지 않는 이름: `질문 내용(필수)`은 `질문`이다."""
    bare = _DECORATION.sub("", unicodedata.normalize("NFC", name)).lower()
    return _TAIL.sub("", bare)


@lru_cache(maxsize=256)
def find_answers(names: tuple[str, ...]) -> tuple[str, str] | None:
    """(고른 답, 버린 답)의 열로 적힌 이름. 둘 다 있어야 한다."""
    known = {plain(name): name for name in names if isinstance(name, str)}
    pair = next((pair for pair in PREFERENCES if known.keys() >= set(pair)), None)
    return None if pair is None else (known[pair[0]], known[pair[1]])


def holds_pair(row: dict) -> bool:
    """고른 답과 버린 답이 모두 적힌 행인가."""
    found = find_answers(tuple(row))
    return found is not None and all(is_written(row[name]) for name in found)


def is_whole_talk(value: object) -> bool:
    """답이 아니라 질문부터 적은 대화 전체인가."""
    if isinstance(value, str):
        return value.lstrip().startswith("Human:")
    first = value[0] if isinstance(value, list) and value else None
    name = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return isinstance(name, str) and name not in ("assistant", "model", "gpt", "bot", "chatgpt")


def read_whole_talk(value: object) -> list[Turn]:
    """대화 전체를 적은 열의 글들. 목록이거나, `Human:`과 `Assistant:`로 나눈 글이다.

    Raises:
        BadTurns: 읽을 수 없다.
    """
    if not isinstance(value, str):
        return read_turns(value)
    parts = _SPEAKER.split(value)  # [앞의 글, 이름, 글, 이름, 글, ...]
    return read_turns([{"role": SPEAKERS[name], "content": text.strip()}
                       for name, text in zip(parts[1::2], parts[2::2], strict=True)])


def join_pair(chosen: list[Turn], rejected: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """두 대화에서 마지막 답만 배우게 한다. 앞의 답은 함께 읽는 질문의 일부다.

    Raises:
        BadTurns: 마지막 답 앞의 글이 서로 다르거나, 답으로 끝나지 않는다.
    """
    for turns, what in ((chosen, "고른 답"), (rejected, "버린 답")):
        if turns[-1].role != "assistant":
            raise BadTurns(f"의 {what} 열이 assistant의 글로 끝나지 않는다. 답을 적거나 그 행을 뺀다")
    heads = [[(turn.role, turn.text, turn.input) for turn in turns[:-1]] for turns in (chosen, rejected)]
    if heads[0] != heads[1]:
        raise BadTurns("의 고른 답과 버린 답은 마지막 답 앞의 글이 서로 다르다. 같은 질문의 두 답을 적거나 행을 뺀다")
    first, second = ([*(replace(turn, learned=False) if turn.role == "assistant" else turn for turn in turns[:-1]),
                      replace(turns[-1], learned=True)] for turns in (chosen, rejected))
    return first, second


def asked_column(known: Iterable[str]) -> str | None:
    """질문의 열의 이름. 없으면 None이다."""
    return next((name for name in ASKED if name in known), None)


def is_written(value: object) -> bool:
    """칸에 무엇이 적혔는가. 빈 글, 빈 목록, None, NaN은 적지 않은 것이다."""
    return value is not None and value == value and not (isinstance(value, str | list) and not len(value))
