"""검증 행에서 물을 질문과 모범 답. 학습의 예시 답, 배움의 점수, 병합의 검산이 같은 행에서 같은 것을 묻는다."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.data import blocks
from utils.data.documents import Documents

_PLACE = "\0"  # 템플릿에서 질문이 놓이는 자리를 찾는 글자. 어느 데이터에도 나오지 않는다


@dataclass(frozen=True)
class Question:
    """검증 행 하나의 질문과 모범 답.

    여러 번 주고받은 행이면 배우는 첫 답까지만 쓴다. 그 뒤의 질문은 모범 답에 이어진 것이라 모델의 답 뒤에 둘 수 없다.

    Attributes:
        prompt: 답이 시작되기 직전까지의 토큰. [n] int32. 질문 없이 글만 있는 행이면 비어 있다.
        answer: 답의 토큰. 마지막은 끝 토큰이다. [m] int32.
    """

    prompt: np.ndarray
    answer: np.ndarray


def plain_question(tokenizer, prompter, prompt: Sequence[int]) -> str:
    """템플릿의 표시와 특수 토큰을 뺀, 사람이 읽을 질문.

    Args:
        prompt: 답이 시작되기 직전까지의 토큰.
    """
    text = readable(tokenizer, prompt)
    parts = prompter.prompt(_PLACE).partition(_PLACE)
    opening, closing = (without_special(tokenizer, part).strip() for part in (parts[0], parts[2]))
    return text.removeprefix(opening).removesuffix(closing).strip() or text


def readable(tokenizer, ids: Sequence[int]) -> str:
    """토큰들의 글에서 특수 토큰(`<|endoftext|>`, `<bos>`)을 뺀 것."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def without_special(tokenizer, text: str) -> str:
    """`readable`이 빼는 것과 같은 특수 토큰을 글에서 뺀 것. Gemma의 `<start_of_turn>`처럼 이름 없는 것도 있다."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for token in sorted(special, key=len, reverse=True):
        text = text.replace(token, "")
    return text


def held_out_members(documents: Documents, percent: float, seed: int) -> np.ndarray:
    """학습할 때와 똑같이 나눈, 물어볼 검증 문서의 번호. 답이 모두 잘린 문서는 뺀다. [n] int64."""
    _, held_out = blocks.split_by_content(documents, percent, seed)
    if documents.pairs:
        return documents.asked(blocks.fitting_pairs(documents, held_out))
    return blocks.with_answers(documents, held_out)


def read_question(documents: Documents, member: int) -> Question:
    """문서 하나의 질문. `blocks.with_answers`를 지난 문서여야 한다."""
    tokens, learned = documents.document(member)  # [n] int32, [n] bool
    start = int(np.argmax(learned))  # 배우는 첫 토큰. argmax는 첫 True의 자리다
    is_end = tokens[start:] == documents.end_id
    is_last = ~np.append(learned[start + 1 :], False)  # 다음 토큰을 배우지 않으면 답의 마지막이다
    end = start + int(np.flatnonzero(is_end | is_last)[0]) + 1
    return Question(tokens[:start], tokens[start:end])
