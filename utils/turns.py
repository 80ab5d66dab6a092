"""대화에서 한 번 말한 글(`Turn`)과, 그것을 토큰화하기 전의 조각들. 모든 템플릿에서 행은 파일에서 토큰까지 이 꼴이다."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_PLACEHOLDER = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Turn:
    """한 사람이 한 번 말한 글.

    Attributes:
        role: "system", "user", "assistant" 가운데 하나. 질문과 답으로 나누지 않은 글이면 "text"다.
        text: 그 글.
        learned: False면 읽기만 하고 배우지 않는 답이다(weight 0).
        input: 질문에 딸린 글(맥락). user에만 있다.
    """

    role: str
    text: str
    learned: bool = True
    input: str = ""


Pieces = list[tuple[str, str]]


class Unlearned(tuple):
    """읽기만 하고 답을 배우지 않는 (프롬프트, 답) 조각."""


class Joined(list):
    """이어서 한 글로 토큰화하는 조각들. 답의 끝 토큰은 글에 적혀 있다.

    Attributes:
        open_end: True면 글에 끝 토큰이 없어 토큰 뒤에 하나를 붙인다.
    """

    def __init__(self, pieces: Sequence[tuple[str, str]], open_end: bool = False):
        super().__init__(pieces)
        self.open_end = open_end


def fill_placeholder(instruction: str, input: str) -> str:
    """질문 안의 모든 `{...}`를 input으로 바꾼다. 역슬래시와 중괄호도 글자 그대로 들어간다."""
    return _PLACEHOLDER.sub(lambda _: input, instruction)


def find_placeholder(text: str) -> str | None:
    """질문 안의 첫 `{...}`. 없으면 None이다."""
    found = _PLACEHOLDER.search(text)
    return found[0] if found else None


def filled(turn: Turn) -> tuple[str, str]:
    """(질문, 딸린 글). 질문에 `{...}` 자리가 있으면 딸린 글을 그 자리에 넣고 비운다."""
    if turn.input and find_placeholder(turn.text):
        return fill_placeholder(turn.text, turn.input), ""
    return turn.text, turn.input


def shift_space(prompt: str, answer: str) -> tuple[str, str]:
    """프롬프트 끝의 공백을 답의 앞으로 옮긴다. BPE 토큰은 앞의 공백을 단어에 붙이기 때문이다."""
    body = prompt.rstrip(" ")
    return body, prompt[len(body) :] + answer


def as_talk(instruction: str, input: str = "") -> list[Turn]:
    """질문 하나를 대화로."""
    return [Turn("user", instruction, input=input)]
