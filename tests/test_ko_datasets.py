"""함께 든 데이터의 약속: 형식, 겹치지 않는 질문, 길이의 분포, 두 파일이 같은 행이라는 것."""

import json
import re
import statistics
import unicodedata
from collections import defaultdict

import pytest
from conftest import ROOT

from utils.data.rows import read_rows
from utils.data.texts import END_TOKEN
from utils.prompter import Prompter

pytestmark = pytest.mark.quick

TEXTONLY = ROOT / "ko-datasets" / "polyglot-ko-lite_textonly.json"
COLUMNS = ROOT / "ko-datasets" / "polyglot-ko-lite.json"
KOALPACA = ROOT.parent / "shared" / "data" / "koalpaca_500.json"
NEAR = 0.35  # 글자와 숫자만 남긴 질문의 3-gram Jaccard 유사도가 이보다 크면 같은 질문으로 본다


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [row["text"] for _, row in read_rows(TEXTONLY)]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [row for _, row in read_rows(COLUMNS)]


@pytest.fixture(scope="module")
def koalpaca() -> list[str]:
    if not KOALPACA.is_file():
        pytest.skip(f"비교할 KoAlpaca가 없다: {KOALPACA}")
    return [row["text"] for _, row in read_rows(KOALPACA)]


def letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)


def without_endings(text: str) -> str:
    """어절 끝의 조사와 물음꼴을 떼어, 말끝만 다른 질문을 같은 글로 만든다."""
    endings = r"(인가요|나요|까요|습니까|세요|해요|어요|줄래|줘요|줘|지요|야|지|은|는|이|가|을|를|요|까)$"
    return letters(" ".join(re.sub(endings, "", letters(word)) for word in text.split()))


def trigrams(text: str) -> set[str]:
    return {text[at : at + 3] for at in range(max(1, len(text) - 2))}


def question(row: dict) -> str:
    return f"{row['instruction']} {row['input']}"


def test_enough_rows(rows):
    assert len(rows) >= 1200
    assert sum(bool(row["input"]) for row in rows) >= 150


def test_both_files_hold_the_same_rows_through_the_prompter(rows, texts):
    prompter = Prompter("default")
    rendered = [prompter.render(row["instruction"], row["input"], row["output"]) + END_TOKEN for row in rows]
    assert texts == rendered


def test_every_line_is_one_object_and_ends_once(texts):
    lines = TEXTONLY.read_text(encoding="utf-8").splitlines()
    assert [list(json.loads(line)) for line in lines] == [["text"]] * len(texts)
    assert all(text.endswith(END_TOKEN) and text.count(END_TOKEN) == 1 for text in texts)


def test_text_is_clean(rows):
    for row in rows:
        assert list(row) == ["instruction", "input", "output"]
        for value in row.values():
            assert unicodedata.is_normalized("NFC", value)
            assert value == value.strip() and not re.search(r"### |\t| \n|\ufffd", value)
        assert row["instruction"] and re.search("[가-힣]", row["output"])


@pytest.mark.parametrize("normalise", [letters, without_endings])
def test_questions_are_unique(rows, normalise):
    seen = defaultdict(list)
    for row in rows:
        seen[normalise(question(row))].append(row["instruction"])
    assert [same for same in seen.values() if len(same) > 1] == []


def test_no_near_duplicate_questions(rows):
    grams = [trigrams(letters(question(row))) for row in rows]
    holders = defaultdict(list)
    near = []
    for index, own in enumerate(grams):
        shared = defaultdict(int)
        for gram in own:
            for other in holders[gram]:
                shared[other] += 1
            holders[gram].append(index)
        near += [(rows[index]["instruction"], rows[other]["instruction"]) for other, common in shared.items()
                 if common / (len(own) + len(grams[other]) - common) > NEAR]
    assert near == []


def test_answer_lengths_are_bounded(rows):
    lengths = [len(row["output"]) for row in rows]
    assert 150 <= statistics.median(lengths) <= 400 and max(lengths) <= 900


def test_lengths_are_close_to_koalpaca(texts, koalpaca):
    ratio = statistics.median(map(len, texts)) / statistics.median(map(len, koalpaca))
    assert 0.5 <= ratio <= 2.0


def test_no_row_is_from_koalpaca(texts, koalpaca):
    theirs = [Prompter("default").split(text.removesuffix(END_TOKEN)) for text in koalpaca]
    questions = {letters(pieces[0]) for pieces in theirs}
    answers = {letters(pieces[1]) for pieces in theirs}
    for text in texts:
        asked, answered = Prompter("default").split(text.removesuffix(END_TOKEN))
        assert letters(asked) not in questions and letters(answered) not in answers
