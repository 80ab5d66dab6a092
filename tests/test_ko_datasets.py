"""함께 든 데이터의 약속: 형식, 겹치지 않는 질문, 길이의 분포, 두 파일이 같은 행이라는 것."""

import importlib
import json
import re
import statistics
import sys
import unicodedata
from collections import defaultdict

import pytest
from conftest import ROOT

from utils.data.rows import read_rows
from utils.data.texts import END_TOKEN
from utils.paths import BASE_DEMO, DATA_DEMO
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
    rendered = [prompter.prompt(row["instruction"], row["input"]) + row["output"] + END_TOKEN for row in rows]
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


@pytest.fixture(scope="module")
def skills() -> list[dict]:
    return [row for _, row in read_rows(DATA_DEMO)]


@pytest.fixture(scope="module")
def demo():
    """짧은 데이터를 짓는 모듈들."""
    sys.path.insert(0, str(BASE_DEMO))
    yield {name: importlib.import_module(name) for name in ("demo_rows", "korean", "sentences")}
    sys.path.remove(str(BASE_DEMO))


def test_skill_rows_are_what_the_generator_writes(skills, demo, tmp_path):
    demo["demo_rows"].main(tmp_path / "rows.json")
    assert (tmp_path / "rows.json").read_text(encoding="utf-8") == DATA_DEMO.read_text(encoding="utf-8")
    assert len(skills) >= 4000 and all(list(row) == ["instruction", "output"] for row in skills)


def test_the_data_card_counts_the_rows_there_are(skills, demo):
    """행을 더하고 데이터 카드의 표를 그대로 둔 적이 있다."""
    card = (DATA_DEMO.parent / "README.md").read_text(encoding="utf-8").split("\n## ")
    card = next(part for part in card if part.startswith("데이터 카드: polyglot-ko-skills"))
    counts = [int(count.replace(",", "")) for count in re.findall(r"^\|[^|]+\| ([\d,]+) \|", card, re.MULTILINE)]
    assert sum(counts) == len(skills) and f"묻고 답하는 {len(skills):,}행" in card
    asked = sum(row["instruction"].startswith(demo["demo_rows"].EXAMPLE_WORD) for row in skills)
    assert f"AI는 {asked}가지로" in card


def test_skill_questions_are_unique_and_clean(skills):
    asked = [row["instruction"].partition(": ")[2] or row["instruction"] for row in skills]
    assert len(set(asked)) == len(asked)
    for row in skills:
        for value in row.values():
            assert unicodedata.is_normalized("NFC", value) and value == value.strip()
            assert "\n" not in value and END_TOKEN not in value


def test_polite_answers_are_polite_and_keep_the_words(skills):
    """존댓말의 답은 모두 합쇼체로 끝나고, 낮춤말 "나, 내"가 남지 않으며, 끝의 말 앞까지는 같은 낱말이다."""
    rows = [row for row in skills if "존댓말로" in row["instruction"]]
    assert len(rows) >= 2000
    humble = {"나는": "저는", "나도": "저도", "내가": "제가", "내": "제"}
    for row in rows:
        said, answer = row["instruction"].partition(": ")[2].split(), row["output"].split()
        assert re.search(r"(니다|니까|시다|주세요)[.?]$", row["output"]), row
        assert (row["output"][-1] == "?") == (row["instruction"][-1] == "?")
        assert len(said) == len(answer) and [humble.get(word, word) for word in said[:-1]] == answer[:-1], row


def value_of(spoken: str) -> int:
    """한글로 읽은 수의 값. 읽는 쪽의 코드와 따로 셈한다."""
    total = part = digit = 0
    for letter in spoken.replace(" ", ""):
        if letter == "만":
            total, part, digit = total + max(part + digit, 1) * 10_000, 0, 0
        elif letter in "십백천":
            part, digit = part + max(digit, 1) * 10 ** ("십백천".index(letter) + 1), 0
        else:
            digit = "영일이삼사오육칠팔구".index(letter)
    return total + part + digit


def test_numbers_are_read_right(skills):
    pairs = [(re.search(r"[\d,]+", row["instruction"])[0], row["output"].removesuffix(" 원")) for row in skills
             if re.search(r"\d", row["instruction"]) and not re.search("시 |월 ", row["instruction"])]
    assert len(pairs) >= 1000
    assert [pair for pair in pairs if value_of(pair[1]) != int(pair[0].replace(",", ""))] == []


def test_times_and_dates_are_read_right(demo):
    korean = demo["korean"]
    assert korean.read_time(1, 25) == "한 시 이십오 분" and korean.read_time(12, 0) == "열두 시"
    assert korean.read_date(6, 1) == "유월 일일" and korean.read_date(10, 31) == "시월 삼십일일"
    assert korean.read_date(11, 28) == "십일월 이십팔일"
    assert {hour: korean.read_time(hour, 0) for hour in (2, 3, 4, 11)} == {
        2: "두 시", 3: "세 시", 4: "네 시", 11: "열한 시"}


@pytest.mark.parametrize("number, spoken", [
    (1, "일"), (10, "십"), (11, "십일"), (100, "백"), (1_204, "천이백사"), (3_482, "삼천사백팔십이"), (10_000, "만"),
    (12_345, "만 이천삼백사십오"), (110_010, "십일만 십"), (999_999, "구십구만 구천구백구십구"),
])
def test_reading_a_number(demo, number, spoken):
    assert demo["korean"].read_number(number) == spoken and value_of(spoken) == number


@pytest.mark.parametrize("stem, infinitive, before_eu, forms", [
    ("먹", "먹어", "먹", ("먹었", "먹습니다", "먹는다", "먹을", "먹읍시다")),
    ("가", "가", "가", ("갔", "갑니다", "간다", "갈", "갑시다")),
    ("만들", "만들어", "만들", ("만들었", "만듭니다", "만든다", "만들", "만듭시다")),
    ("듣", "들어", "들", ("들었", "듣습니다", "듣는다", "들을", "들읍시다")),
    ("돕", "도와", "도우", ("도왔", "돕습니다", "돕는다", "도울", "도웁시다")),
    ("하", "해", "하", ("했", "합니다", "한다", "할", "합시다")),
])
def test_verbs_are_conjugated_right(demo, stem, infinitive, before_eu, forms):
    verb = demo["korean"].Predicate(stem, infinitive, before_eu)
    assert (verb.past, verb.formal, verb.plain, verb.future, verb.together) == forms
