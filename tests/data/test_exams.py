"""시험 문항: KoBEST의 두 형식이 같은 문항이 되고, 글은 lm-evaluation-harness의 것이고, 사용자의 행도 시험이 된다."""

import csv
import json

import pytest
from conftest import ROOT, pieces_of

from utils.data.exams import TASKS, load_exams
from utils.errors import UsageError
from utils.prompter import Prompter

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


@pytest.mark.parametrize("row", [{"instruction": "?", "output": "가", "options": ["나"]},
                                 {"instruction": "?", "output": "가", "options": "가"},
                                 {"instruction": "?", "output": "가", "options": ["가", 1]}])
def test_wrong_options_are_refused_with_the_row(row, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match="1번째 행의 options"):
        load_exams(str(file), Prompter())


def test_folder_without_exams_and_wrong_answers_are_refused(tmp_path):
    with pytest.raises(UsageError, match="KoBEST의 파일이 없는 폴더"):
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
