"""사람들이 붙이는 열 이름에서 질문과 답을 찾고, 짐작한 것은 말한다."""

import unicodedata

import pytest

from utils.data.columns import choose_form, require_form
from utils.errors import UsageError

pytestmark = pytest.mark.quick

PAIRS = [("문의", "답"), ("Q", "A"), ("Q.", "A."), ("제목", "내용"), ("instruction", "response"), ("input", "output"),
         ("사용자", "상담원"), ("고객", "챗봇"), ("user", "assistant"), ("human", "bot"), ("질의", "응답"),
         ("물음", "답"), ("문의 내용", "답변 내용"), ("질문내용", "답변내용"), ("문의사항", "답변"),
         ("고객문의", "상담답변"), ("고객 질문", "모범 답안"), ("질문(필수)", "답변(필수)"), ("[질문]", "[답변]"),
         ("질문:", "답변:"), ("QUESTION", "Response"), ("prompt", "answer"),
         ("지시문", "출력"), ("원문", "번역"), ("문장", "라벨"), ("title", "content"), ("document", "summary")]


@pytest.mark.parametrize("asked, answered", PAIRS)
@pytest.mark.parametrize("others", [(), ("번호", "작성일", "")])
def test_the_question_and_the_answer_are_found(asked, answered, others):
    for names in ((asked, answered, *others), (*others, answered, asked)):
        assert choose_form(names).columns == {"question": asked, "answer": answered}


@pytest.mark.parametrize("names, columns", [
    (("제목", "내용", "답변"), {"question": "내용", "answer": "답변"}),
    (("제목", "질문", "답변"), {"question": "질문", "answer": "답변"}),
    (("user", "prompt", "response", "text"), {"question": "prompt", "answer": "response"}),
    (("question", "answer", "response"), {"question": "question", "answer": "answer"}),
    (("input", "문의", "답"), {"question": "문의", "answer": "답", "input": "input"}),
    (("user", "text"), {"text": "text"}), (("title", "text"), {"text": "text"}), (("번호", "내용"), {"text": "내용"}),
    (("user", "assistant", "messages"), {"talk": "messages"}),
    (("질문 내용", "좋은 답", "나쁜답"), {"question": "질문 내용", "chosen": "좋은 답", "rejected": "나쁜답"}),
])
def test_the_better_known_name_is_taken(names, columns):
    assert choose_form(names).columns == columns


def test_decomposed_names_are_the_same():
    names = tuple(unicodedata.normalize("NFD", name) for name in ("문의", "답변"))
    assert choose_form(names).columns == dict(zip(("question", "answer"), names, strict=True))


@pytest.mark.parametrize("names", [("한국어", "영어"), ("관련질문", "추천질문", "답변"), ("고객질문", "번호"),
                                   ("model", "label"), ()])
def test_other_names_are_not_guessed(names):
    assert choose_form(names) is None


def test_only_guesses_are_told():
    assert choose_form(("문의", "답")).guessed == ["문의", "답"] and choose_form(("본문",)).guessed == ["본문"]
    for names in (("질문", "답변"), ("Q", "A"), ("instruction", "output", "input"), ("text",), ("messages",),
                  ("prompt", "chosen", "rejected")):
        assert choose_form(names).guessed == []


def test_names_are_told_in_their_order_and_not_endlessly():
    with pytest.raises(UsageError, match="없음.*표의 첫 줄.*질문\\+답변"):
        require_form(["", " "], "a.csv")
    with pytest.raises(UsageError, match="알 수 없다: 나, 가, 배송은.*….*, …") as error:
        require_form(["나", "가", "배송은 며칠이나 걸리는지 알려 주세요" * 9, *map(str, range(99))], "a.csv")
    assert len(str(error.value)) < 400
