"""검증 행에서 묻는 것은 어디서나 같다: 배우는 첫 답의 앞까지가 질문이고, 그 답의 끝 토큰까지가 모범 답이다."""

import numpy as np
import pytest

from utils.data.blocks import split_by_content
from utils.data.documents import MUTED, Documents
from utils.data.questions import held_out_members, read_question

END = 2
# 토큰과 그 자리의 표시(1은 배우는 답) -> 질문, 모범 답
ROWS = {
    "한 번": ([5, 6, 7, 8, END], [0, 0, 1, 1, 1], [5, 6], [7, 8, END]),
    "여러 번": ([5, 6, 7, END, 9, 10, 11, END], [0, 0, 1, 1, 0, 0, 1, 1], [5, 6], [7, END]),
    "질문 없이 이어진 답": ([5, 6, END, 7, END], [0, 1, 1, 1, 1], [5], [6, END]),
    "배우지 않는 답이 앞에 있다": ([5, 6, END, 8, 9, END], [0, MUTED, MUTED, 0, 1, 1], [5, 6, END, 8], [9, END]),
    "글만 있다": ([5, 6, END], [1, 1, 1], [], [5, 6, END]),
}


def documents(rows: list[tuple[list[int], list[int]]], cutoff_len: int | None = None) -> Documents:
    tokens, marks = zip(*rows, strict=True)
    return Documents(np.concatenate(tokens).astype(np.int32), np.concatenate(marks).astype(np.int8),
                     np.cumsum([0, *map(len, tokens)]), np.arange(1, len(rows) + 1, dtype=np.uint64) * 2**58,
                     cutoff_len=cutoff_len, end_id=END)


@pytest.mark.parametrize("name", ROWS)
def test_a_question_ends_where_the_first_learned_answer_begins(name):
    tokens, marks, prompt, answer = ROWS[name]
    question = read_question(documents([(tokens, marks)]), 0)
    assert question.prompt.tolist() == prompt and question.answer.tolist() == answer


def test_a_cut_answer_ends_with_the_end_token():
    tokens, marks, prompt, _ = ROWS["한 번"]
    question = read_question(documents([(tokens, marks)], cutoff_len=4), 0)
    assert question.prompt.tolist() == prompt and question.answer.tolist() == [7, END]


def test_held_out_members_are_those_of_training_without_the_answerless():
    short, long = ROWS["한 번"][:2], ([5] * 9 + [7, END], [0] * 9 + [1, 1])
    every = documents([short, long] * 10, cutoff_len=6)
    _, held_out = split_by_content(every, 50, 7)
    assert {member % 2 for member in held_out} == {0, 1}
    assert held_out_members(every, 50, 7).tolist() == [member for member in held_out if member % 2 == 0]
