"""시험 문항: KoBEST의 두 형식이 같은 문항이 되고, 글은 lm-evaluation-harness의 것이고, 사용자의 행도 시험이 된다."""

import csv
import json

import pytest
from conftest import ROOT, pieces_of

from utils.data import columns, forms
from utils.data.dataset import load_documents
from utils.data.encoder import Encoder
from utils.data.exams import is_kobest, load_exams
from utils.data.kobest import TASKS
from utils.data.rows import read_rows
from utils.errors import UsageError
from utils.model.tokenizer import load_tokenizer
from utils.paths import BASE_DEMO
from utils.prompter import Prompter
from utils.turns import Turn

pytestmark = pytest.mark.quick

HUB = {  # hub의 열, TSV의 열, lm-evaluation-harness의 글, 보기, 정답
    "boolq": ({"paragraph": "제주도는 섬이다.", "question": "제주도는 섬인가?", "label": 1},
              {"Text": "제주도는 섬이다.", "Question": "제주도는 섬인가?", "Answer": "True"},
              "제주도는 섬이다. 질문: 제주도는 섬인가? 답변: ", ("아니오", "예"), 1),
    "copa": ({"premise": "비가 왔다.", "question": "결과", "alternative_1": "땅이 말랐다.",
              "alternative_2": "땅이 젖었다.", "label": 1},
             {"sentence": "비가 왔다.", "question": "결과", "1": "땅이 말랐다.", "2": "땅이 젖었다.", "Answer": "2"},
             "비가 왔다.  그래서", ("땅이 말랐다.", "땅이 젖었다."), 1),
    "hellaswag": ({"context": "물을 끓인다.", **{f"ending_{n}": f"끝 {n}" for n in range(1, 5)}, "label": 2},
                  {"context": "물을 끓인다.", **{f"choice{n}": f"끝 {n}" for n in range(1, 5)}, "label": "2"},
                  "문장: 물을 끓인다.", ("끝 1", "끝 2", "끝 3", "끝 4"), 2),
    "sentineg": ({"sentence": "맛있어요", "label": 1}, {"Text": "맛있어요", "Label": "1"},
                 "문장: 맛있어요 긍부정:", ("부정", "긍정"), 1),
    "wic": ({"word": "배", "context_1": "배를 탔다.", "context_2": "배를 먹었다.", "label": 0},
            {"Target": "배", "SENTENCE1": "배를 탔다.", "SENTENCE2": "배를 먹었다.", "ANSWER": "False"},
            "문장1: 배를 탔다. 문장2: 배를 먹었다. 두 문장에서 배가 같은 뜻으로 쓰였나?", ("아니오", "예"), 0),
}


def write_tsv(file, rows: list[dict]):
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["ID", *rows[0]], delimiter="\t")
        writer.writeheader()
        writer.writerows({"ID": number, **row} for number, row in enumerate(rows, 1))


@pytest.mark.parametrize("name", HUB)
def test_both_forms_are_the_questions_of_the_harness(name, tmp_path):
    hub, tsv, text, options, answer = HUB[name]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_tsv(tmp_path / "a" / "test.tsv", [tsv])
    (tmp_path / "b" / "test.jsonl").write_text(json.dumps(hub, ensure_ascii=False) + "\n", encoding="utf-8")
    for folder in ("a", "b"):
        (exam,) = load_exams(str(tmp_path / folder), None)
        (item,) = exam.items
        assert exam.name == name and item.text == text and not item.asked
        assert (item.options, item.answer) == (options, answer)
    (asked,) = load_exams(str(tmp_path / "b"), Prompter())
    assert asked.items[0].asked == tuple([pieces_of(Prompter(), text, "", option)] for option in options)


def learnt(file) -> list:
    """배울 때 첫 행에서 읽는 글들."""
    number, row = next(read_rows(file))
    return forms.read_row(row, columns.form_of(row, file), number, file)


@pytest.mark.parametrize("name", HUB)
def test_a_file_of_kobest_is_learnt_as_it_is_asked(name, tmp_path):
    hub, tsv, text, options, answer = HUB[name]
    write_tsv(tmp_path / f"{name}-train.tsv", [tsv])
    write_rows(tmp_path / f"{name}-train.jsonl", hub)
    for file in tmp_path.iterdir():
        assert learnt(file) == [Turn("user", text), Turn("assistant", options[answer])]


@pytest.mark.parametrize("name", HUB)
def test_options_that_differ_by_row_are_learnt_as_pairs(name, tmp_path):
    hub, _, text, options, answer = HUB[name]
    file = write_rows(tmp_path / f"{name}-train.jsonl", hub)
    form = columns.form_of(hub, file)
    assert form.is_preference == (options not in (("아니오", "예"), ("부정", "긍정")))
    if form.is_preference:
        better, worse = forms.read_pair(hub, form, 1, file)
        assert better == [Turn("user", text), Turn("assistant", options[answer])]
        assert worse[:-1] == better[:-1] and worse[-1].text in set(options) - {options[answer]}


@pytest.mark.parametrize("row", [
    {"sentence": "맛있어요", "label": "1"},  # 이름에 kobest나 sentineg가 없는 사용자의 표
    {"Text": "섬이다.", "Question": "섬인가?", "Answer": "그렇다"},
    {"paragraph": "섬이다.", "question": "섬인가?", "answer": "예"},
])
def test_other_tables_are_learnt_as_they_are(row, tmp_path):
    *_, asked, answer = row.values()
    said = learnt(write_rows(tmp_path / "mine.jsonl", row))
    assert [turn.text for turn in said] == [asked, answer]


def test_a_row_of_kobest_without_an_answer_is_named(tmp_path):
    rows = [{"ID": 1, "Text": "좋다", "Label": "1"}, {"ID": 2, "Text": "싫다", "Label": "7"}]
    file = write_rows(tmp_path / "sentineg.jsonl", *rows)
    form = columns.form_of(rows[0], file)
    with pytest.raises(UsageError, match=r"2번째 행을 SentiNeg의 문항으로 읽을 수 없다: 정답\(7\)"):
        forms.read_row(rows[1], form, 2, file)


def test_the_same_rows_under_another_name_are_read_anew(tmp_path):
    """(sentence, label)은 파일의 이름까지 보고 안다. 한쪽의 토큰을 다른 쪽이 다시 쓰지 않는다."""
    tokenizer = load_tokenizer(BASE_DEMO)
    texts = []
    for name in ("mine.jsonl", "sentineg.jsonl"):
        write_rows(tmp_path / name, {"sentence": "맛있어요", "label": "1"})
        documents = load_documents(tmp_path / name, Prompter(), Encoder(tokenizer, 2), 64, 2, str(tmp_path / "cache"))
        texts.append(tokenizer.decode(documents.document(0)[0]))
    assert "문장: 맛있어요 긍부정:" in texts[1] and "긍부정" not in texts[0]


def test_takes_the_test_part_and_never_the_training_part(tmp_path):
    rows = [{"Text": f"{number}번", "Label": "0"} for number in range(6)]
    for file, part in (("train.tsv", rows), ("dev.tsv", rows[:3]), ("test.tsv", rows[:2]), ("Negation_Test.tsv", rows)):
        write_tsv(tmp_path / file, part)
    (exam,) = load_exams(str(tmp_path), None)
    assert len(exam.items) == 2
    (tmp_path / "test.tsv").unlink()
    (tmp_path / "Negation_Test.tsv").unlink()
    assert len(load_exams(str(tmp_path), None)[0].items) == 3


def test_rows_of_the_user(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [{"instruction": "숫자를 읽어 줘: 12", "output": "십이"},
            {"instruction": "기분은?", "output": "긍정", "options": ["부정", "긍정"]}]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (exam,) = load_exams(str(file), Prompter())
    assert [item.options for item in exam.items] == [("십이",), ("부정", "긍정")]
    assert [item.answer for item in exam.items] == [0, 1]
    assert exam.items[0].asked == ([pieces_of(Prompter(), "숫자를 읽어 줘: 12", "", "십이")],)
    assert exam.items[1].asked[0] == [pieces_of(Prompter(), "기분은?", "", "부정")]


def write_rows(file, *rows) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("row", [
    {"질문": "?", "답변": "나 ", "보기": ["가", "나"]},
    {"question": "?", "answer": "나", "Choices": '["가", "나"]'},  # CSV의 칸에 적은 목록
    *({"질문": "?", "답변": "나", "보기": text} for text in ("가|나", "가; 나", "가\n나", "가 / 나", "가,나")),
    {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "나"}], "options": ["가", "나"]},
])
def test_options_are_found_by_any_of_their_names_and_in_every_form(row, tmp_path):
    (exam,) = load_exams(write_rows(tmp_path / "mine.jsonl", row), Prompter())
    (item,) = exam.items
    assert (item.options, item.answer) == (("가", "나"), 1)
    assert item.asked == tuple([pieces_of(Prompter(), "?", "", option)] for option in item.options)


@pytest.mark.parametrize("options", [["나"], "가", "나|다", "가|", ["가", 1], [], ["가"], ["가", "가"], ["가", " "],
                                     {"a": "가"}])
def test_wrong_options_are_refused_with_the_row(options, tmp_path):
    row = {"instruction": "?", "output": "가", "options": options}
    with pytest.raises(UsageError, match="1번째 행의 options"):
        load_exams(write_rows(tmp_path / "mine.jsonl", row), Prompter())


@pytest.mark.parametrize("row, reason", [({"prompt": "?", "chosen": "가", "rejected": "나"}, "선호 쌍"),
                                         ({"text": "질문과 답이 아닌 글이다."}, "질문이 없는 글"),
                                         ({"instruction": "?", "output": ""}, "output 열이 없거나 비었다"),
                                         ({"instruction": "?", "options": ["가", "나"]}, "열을 알 수 없다")])
def test_rows_that_are_no_questions_are_refused(row, reason, tmp_path):
    with pytest.raises(UsageError, match=reason):
        load_exams(write_rows(tmp_path / "mine.jsonl", row), Prompter())


@pytest.mark.parametrize("row", [
    {"질문": "1+1은?", "보기1": "1", "보기2": "2", "정답": "2"},
    {"질문": "1+1은?", "보기 ①": "1", "보기 ②": "2", "정답": "②"},
    {"question": "1+1은?", "A": "1", "B": "2", "C": "3", "answer": "B"},
    {"question": "1+1은?", "option_a": "1", "option_b": "2", "answer": "b"},
])
def test_options_in_columns_of_their_own_are_refused(row, tmp_path):
    """말없이 정답만 보면, 고르기가 아니라 글자까지 똑같이 답해야 하는 시험이 된다."""
    with pytest.raises(UsageError, match="보기가 여러 열.*에 나뉘어 있다"):
        load_exams(write_rows(tmp_path / "mine.jsonl", row), Prompter())


def test_a_row_without_options_among_rows_with_them_is_exact(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("Q,A,보기\n가?,나,나|다\n가?,나,\n", encoding="utf-8")
    (exam,) = load_exams(str(file), Prompter())
    assert [item.options for item in exam.items] == [("나", "다"), ("나",)]


def test_the_first_row_decides_the_columns_and_the_broken_row_is_named(tmp_path):
    file = write_rows(tmp_path / "mine.jsonl", {"instruction": "?", "output": "가"}, {"instruction": "?"})
    with pytest.raises(UsageError, match="2번째 행의 output 열이 없거나 비었다. 글을 적거나 그 행을 뺀다$"):
        load_exams(file, Prompter())


def test_one_file_of_kobest_is_that_exam(tmp_path):
    write_tsv(tmp_path / "any.tsv", [{"Text": "좋다", "Label": "1"}])
    hub = write_rows(tmp_path / "any.jsonl", {"sentence": "좋다", "label": 1})
    mine = write_rows(tmp_path / "mine.jsonl", {"instruction": "?", "output": "가"})
    (tsv,), (jsonl,), (own,) = (load_exams(str(file), None if "any" in str(file) else Prompter())
                                for file in (tmp_path / "any.tsv", hub, mine))
    assert tsv.items == jsonl.items and (tsv.name, tsv.source, jsonl.source) == ("sentineg", "any.tsv", "any.jsonl")
    assert own.name == "mine.jsonl"  # 이름이 copa.jsonl이어도 KoBEST COPA의 성적을 덮어쓰지 않는다
    assert is_kobest(hub) and is_kobest(str(tmp_path)) and is_kobest("kobest") and not is_kobest(mine)


@pytest.mark.parametrize("label, answer", [("1", 1), ("1.0", 1), (True, 1), ("FALSE", 0), (" true ", 1), ("긍정", 1),
                                           ("2", None), ("-1", None), ("?", None), (None, None), ("0.5", None)])
def test_the_answer_is_a_number_or_a_word(label, answer, tmp_path):
    file = write_rows(tmp_path / "test.jsonl", {"sentence": "좋다", "label": label})
    if answer is not None:
        assert load_exams(file, None)[0].items[0].answer == answer
    else:
        with pytest.raises(UsageError, match="1번째 SentiNeg 문항을 읽을 수 없다: 정답"):
            load_exams(file, None)


GOOD = "1\t좋다\t1\n"


@pytest.mark.parametrize("rows, reason", [
    ('2\t"따옴표가 열린 글\t0\n3\t싫다\t0\n', "2번째 행에 닫히지 않은 큰따옴표"),
    ("2\t싫다\t0\t더\n", "2번째 행의 칸이 열보다 많다"),
    ("2\t싫\n", "2번째 행의 칸이 열보다 적다"),
    ("2\t싫다\t부정적\n", "2번째 SentiNeg 문항을 읽을 수 없다: 정답"),
])
def test_broken_rows_of_a_table_are_named(rows, reason, tmp_path):
    (tmp_path / "dev.tsv").write_text(f"ID\tText\tLabel\n{GOOD}{rows}", encoding="utf-8")
    with pytest.raises(UsageError, match=reason):
        load_exams(str(tmp_path), None)


@pytest.mark.parametrize("row, reason", [
    ({"premise": "비", "question": "이유", "alternative_1": "가", "alternative_2": "나", "label": 0}, "question 열이"),
    ({"premise": None, "question": "원인", "alternative_1": "가", "alternative_2": "나", "label": 0}, "premise 열이"),
    ({"premise": "비", "question": "원인", "alternative_1": " ", "alternative_2": "나", "label": 1},
     "alternative_1 열이"),
    ({"premise": "비", "question": "원인"}, "2번째 행은 COPA의 문항이 아니다"),
])
def test_questions_that_lack_a_part_are_named(row, reason, tmp_path):
    write_rows(tmp_path / "test.jsonl", HUB["copa"][0], row)
    with pytest.raises(UsageError, match=reason):
        load_exams(str(tmp_path), None)


def test_a_folder_may_hold_other_files(tmp_path):
    """다른 데이터와 숨은 폴더는 지나치지만, 시험의 이름으로 적힌 깨진 파일은 지나치지 않는다."""
    write_rows(tmp_path / "notes.json", [1, 2])
    (tmp_path / "broken.json").write_text("{{", encoding="utf-8")
    for name in (".cache", "sentineg"):
        (tmp_path / name / "train").mkdir(parents=True)
        (tmp_path / name / "validation").mkdir()
        write_rows(tmp_path / name / "train" / "0000.jsonl", *[{"sentence": "싫다", "label": 0}] * 3)
        write_rows(tmp_path / name / "validation" / "0000.jsonl", {"sentence": name, "label": 0})
    (exam,) = load_exams(str(tmp_path), None)
    assert [item.text for item in exam.items] == ["문장: sentineg 긍부정:"]
    (tmp_path / "copa-test.json").write_text("{{", encoding="utf-8")
    with pytest.raises(UsageError, match="올바른 JSON이 아니다"):
        load_exams(str(tmp_path), None)


@pytest.mark.parametrize("name", ["kobest", "skt/kobest_v1"])
def test_a_folder_of_that_name_comes_before_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    write_rows(tmp_path / name / "test.jsonl", HUB["sentineg"][0])
    (exam,) = load_exams(name, None)
    assert exam.name == "sentineg"


def test_folder_without_exams_and_wrong_answers_are_refused(tmp_path):
    write_tsv(tmp_path / "train.tsv", [{"Text": "좋다", "Label": "1"}])
    with pytest.raises(UsageError, match="KoBEST의 파일이 없는 폴더.*train은 시험하지 않는다"):
        load_exams(str(tmp_path), None)
    write_tsv(tmp_path / "test.tsv", [{"Text": "좋다", "Label": "3"}])
    with pytest.raises(UsageError, match="1번째 SentiNeg 문항"):
        load_exams(str(tmp_path), None)


def test_reads_the_published_files():
    folder = ROOT.parent / "shared" / "data" / "kobest"
    if not folder.is_dir():
        pytest.skip(f"KoBEST의 파일이 없다: {folder}")
    exams = {exam.name: exam for exam in load_exams(str(folder), None)}
    assert {"boolq": 700, "copa": 500, "sentineg": 400}.items() <= {n: len(e.items) for n, e in exams.items()}.items()
    assert {task.name for task in TASKS} >= exams.keys()
