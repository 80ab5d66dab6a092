"""사람들이 가진 파일의 꼴마다 같은 대화가 나오고, 읽을 수 없는 행은 번호와 고치는 법을 말한다."""

import csv
import io
import json

import pytest

from utils.data import check, columns, dataset, forms, rows
from utils.data.encoder import Encoder
from utils.data.window import Window
from utils.errors import UsageError
from utils.model.tokenizer import load_tokenizer
from utils.prompter import Prompter
from utils.turns import Turn

pytestmark = pytest.mark.quick

END = 2
SYSTEM, ASK, SAY = Turn("system", "짧게"), Turn("user", "가?"), Turn("assistant", "나")
SECOND = [Turn("user", "다?"), Turn("assistant", "라")]


def said(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def shared(name: str, text: object) -> dict:
    return {"from": name, "value": text}


ONE = [ASK, SAY]
TWO = [SYSTEM, ASK, SAY, *SECOND]
LIST = [said("system", "짧게"), said("user", "가?"), said("assistant", "나"), said("user", "다?"),
        said("assistant", "라")]
FORMS = {
    "messages": ({"messages": LIST}, TWO),
    "조각": ({"messages": [said("user", [{"type": "text", "text": "가"}, {"type": "text", "text": "?"}]), LIST[2]]},
            ONE),
    "ShareGPT": ({"id": "a", "conversations": [shared("system", "짧게"), shared("human", "가?"), shared("gpt", "나"),
                                               shared("human", "다?"), shared("gpt", "라")]}, TWO),
    "ShareGPT의 system 열": ({"system": "짧게", "conversations": [shared("user", "가?"), shared("assistant", "나"),
                                                              shared("human", "다?"), shared("gpt", "라")]}, TWO),
    "conversation": ({"conversation": LIST}, TWO),
    "OpenAI": ({"messages": [said("user", "가?"), {**said("assistant", "나"), "weight": 0}, *LIST[3:]]},
               [ASK, Turn("assistant", "나", learned=False), *SECOND]),
    "칸에 적은 JSON": ({"messages": json.dumps(LIST)}, TWO),
    "Alpaca": ({"instruction": "가?", "input": "", "output": "나"}, ONE),
    "Alpaca의 input": ({"instruction": "가?", "input": "맥", "output": "나"}, [Turn("user", "가?", input="맥"), SAY]),
    "Alpaca의 history": ({"instruction": "다?", "output": "라", "history": [["가?", "나"]], "system": "짧게"}, TWO),
    "빈 history": ({"instruction": "가?", "output": "나", "history": [], "system": None}, ONE),
    "KoAlpaca": ({"instruction": "가?", "output": "나<|endoftext|>", "url": "https://example.org"}, ONE),
    "Dolly": ({"instruction": "가?", "context": "맥", "response": "나", "category": "qa"},
              [Turn("user", "가?", input="맥"), SAY]),
    "prompt": ({"prompt": "가?", "completion": "나"}, ONE),
    "prompt의 목록": ({"prompt": LIST[:4], "completion": LIST[4:]}, TWO),
    "question": ({"Question ": "가?", "Answer": "나"}, ONE),
    "질문": ({"번호": 3, "질문": "가?", "답변": "나"}, ONE),
    "입력": ({"입력": "가?", "출력": "나"}, ONE),
    "문제": ({"문제": "가?", "정답": "나"}, ONE),
    "Q": ({"Q": "가?", "A": "나"}, ONE),
    "text": ({"text": "가? 나<|endoftext|>"}, [Turn("text", "가? 나")]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_talk(name):
    row, turns = FORMS[name]
    assert forms.read_row(row, columns.require_form(row, "a.json"), 1, "a.json") == turns


BAD = {
    "도구": ({"conversations": [shared("human", "가?"), shared("function_call", "f"), shared("gpt", "나")]},
            "function_call"),
    "tool": ({"messages": [said("user", "가?"), said("tool", "맑음"), said("assistant", "나")]}, "tool"),
    "developer": ({"messages": [said("developer", "짧게"), *LIST[1:3]]}, "developer.*system으로"),
    "빈 목록": ({"conversations": []}, "빈 목록"),
    "없는 목록": ({"conversations": None}, "목록이 아니다"),
    "수": ({"질문": "3+4?", "답변": 7}, "답변 열이 글이 아니다.*따옴표"),
    "KTO의 나쁜 답": ({"prompt": "가?", "completion": "나", "label": False}, "label이 False"),
    "KTO의 대화": ({"prompt": [said("user", "가?")], "completion": [said("assistant", "나")], "label": "False"},
               "label이 False"),
    "없음": ({"question": "가?", "answer": None}, "answer.*글을 적거나"),
    "NaN": ({"question": float("nan"), "answer": "나"}, "question.*글을 적거나"),
    "값이 수": ({"conversations": [shared("human", 3), shared("gpt", "나")]}, "value"),
    "값이 없음": ({"conversations": [shared("human", None), shared("gpt", "나")]}, "value"),
    "그림": ({"messages": [said("user", [{"type": "image_url"}]), LIST[2]]}, "글이 아니다"),
    "history": ({"instruction": "가?", "output": "나", "history": ["가?", "나"]}, "history"),
    "history의 짝": ({"instruction": "가?", "output": "나", "history": [["가?"]]}, "history"),
    "빈 history의 글": ({"instruction": "가?", "output": "나", "history": [["가?", ""]]}, "history"),
    "system이 둘": ({"system": "짧게", "conversations": [shared("system", "길게"), shared("human", "가?"),
                                                     shared("gpt", "나")]}, "system"),
    "system이 수": ({"system": 3, "messages": LIST[1:]}, "system"),
    "목록과 글": ({"prompt": LIST[:1], "completion": "나"}, "질문 없는 답"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_line_with_its_number_and_the_way_out(name):
    row, words = BAD[name]
    with pytest.raises(UsageError, match=f"a.json의 7번째 행.*{words}.*--check_data") as error:
        forms.read_row(row, columns.require_form(row, "a.json"), 7, "a.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names, guess", [
    (("instuction", "ouput"), "instuction -> instruction.*ouput -> output"), (("Mesages",), "messages"),
    (("converstions", "id"), "conversations"), (("질뭄", "답변"), "질문"), (("qestion", "answers"), "question.*answer"),
])
def test_columns_that_are_almost_right_are_asked_about(names, guess):
    with pytest.raises(UsageError, match=f"혹시.*{guess}") as error:
        columns.require_form(names, "a.json")
    assert all(name in str(error.value) for name in names)


def test_columns_far_from_any_form_are_only_named():
    with pytest.raises(UsageError, match="열을 알 수 없다: 가나다, xyzzy|xyzzy, 가나다") as error:
        columns.require_form(("가나다", "xyzzy"), "a.json")
    assert "혹시" not in str(error.value)


def read(path) -> list[dict]:
    return [row for _, row in rows.read_rows(path)]


CELLS = [{"질문": "물은, 왜\n\"얼음\"이 되나?", "답변": "온도가 내려가서다.\n끝"}, {"질문": "3+4?", "답변": "7"}]


@pytest.mark.parametrize("encoding", ["cp949", "utf-8-sig", "utf-8"])
def test_a_korean_csv_keeps_quotes_commas_and_newlines(tmp_path, encoding):
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(CELLS[0]))
    writer.writeheader()
    writer.writerows(CELLS)
    (tmp_path / "a.csv").write_bytes(stream.getvalue().encode(encoding))
    assert read(tmp_path / "a.csv") == CELLS


@pytest.mark.parametrize("mark, encoding", [(";", "utf-8-sig"), ("\t", "utf-16"), ("\t", "cp949")])
def test_what_excel_saves_with_other_separators_is_the_same(tmp_path, mark, encoding):
    text = f'질문{mark}답변\n"가, {mark}?"{mark}"나, 다"\n'
    (tmp_path / "a.csv").write_text(text, encoding=encoding)
    assert list(rows.read_rows(tmp_path / "a.csv")) == [(1, {"질문": f"가, {mark}?", "답변": "나, 다"})]


def test_nan_in_a_csv_is_an_empty_cell(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n가?,나\n다?,NaN\n", encoding="utf-8")
    _, row = read(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="2번째 행.*answer"):
        forms.read_row(row, columns.require_form(row, "a.csv"), 2, "a.csv")


def write_xlsx(path, table: list[list]) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for line in table:
        book.active.append(line)
    book.save(path)


def test_an_excel_sheet_is_read_as_it_looks(tmp_path):
    write_xlsx(tmp_path / "a.xlsx", [["질문", " 답변", None, "번호"], ["가\n나?", 7, None, 1], [None] * 4,
                                     ["다?", 0.5, None, 2.0], ["라?", None, None, 3]])
    assert list(rows.read_rows(tmp_path / "a.xlsx")) == [
        (1, {"질문": "가\n나?", "답변": "7", "번호": "1"}), (3, {"질문": "다?", "답변": "0.5", "번호": "2"}),
        (4, {"질문": "라?", "답변": None, "번호": "3"})]


def test_an_excel_file_is_trained_like_a_csv(tmp_path, encoder):
    write_xlsx(tmp_path / "a.xlsx", [["질문", "답변"], ["가?", "나"], ["3+4?", 7]])
    (tmp_path / "a.csv").write_text("질문,답변\n가?,나\n3+4?,7\n", encoding="utf-8")
    one, other = (dataset.load_documents(tmp_path / name, Prompter(), encoder, 64, END, str(tmp_path / "cache"))
                  for name in ("a.xlsx", "a.csv"))
    assert one.tokens.tolist() == other.tokens.tolist() and one.found == other.found == {}


@pytest.mark.parametrize("table, words", [([["질문", "질문"], ["가", "나"]], "같은 열"), ([["질문", "답변"]], "비었다"),
                                          ([], "비었다")])
def test_an_excel_sheet_without_rows_or_with_equal_columns_is_refused(tmp_path, table, words):
    write_xlsx(tmp_path / "a.xlsx", table)
    with pytest.raises(UsageError, match=words):
        read(tmp_path / "a.xlsx")


def test_a_missing_openpyxl_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(UsageError, match="pip install openpyxl"):
        read(tmp_path / "a.xlsx")


@pytest.mark.parametrize("layout", [{}, {"indent": 2}])
@pytest.mark.parametrize("before", [{}, {"version": "1.0", "count": 2, "ok": True}])
@pytest.mark.parametrize("after", [{}, {"license": "자유"}])
def test_rows_wrapped_in_an_object_are_read(tmp_path, layout, before, after):
    some = [{"question": f"{n}?", "answer": f"{n}]}}"} for n in range(3)]
    (tmp_path / "a.json").write_text(json.dumps({**before, "data": some, **after}, **layout), encoding="utf-8")
    assert read(tmp_path / "a.json") == some


@pytest.mark.parametrize("content", [
    '{"data": [{"text": "가"}], "test": [{"text": "나"}]}', '{"data": [{"text": "가"}]',
    '{"data": [{"text": "가"}]}\n{"data": [{"text": "나"}]}'])
def test_what_follows_a_wrapped_array_is_not_dropped(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="1번째 행에서 배열이 끝났는데"):
        read(tmp_path / "a.json")


@pytest.fixture(scope="module")
def encoder(tiny_neox):
    return Encoder(load_tokenizer(tiny_neox), END)


def load(folder, encoder, some: list[dict], cutoff_len: int = 512, **settings):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in some), encoding="utf-8")
    return dataset.load_documents(path, Prompter(), encoder, cutoff_len, END, str(folder / "cache"), **settings)


def test_unused_columns_are_named(tmp_path, encoder):
    some = [{"질문": "가?", "답변": "나", "출처": "책"}, {"질문": "다?", "답변": "라", "점수": 3}]
    documents = load(tmp_path, encoder, some)
    assert documents.found["unused"]["note"] == "점수, 출처"
    assert any("쓰지 않는 열 [점수, 출처]" in line for line in check.short_lines(documents.found))


def test_system_and_history_columns_are_trained(tmp_path, encoder):
    row = {"instruction": "다?", "output": "라", "history": [["가?", "나"]], "system": "짧게"}
    documents = load(tmp_path, encoder, [row, {"messages": None, **row}])
    expected, = encoder.encode_batch(Prompter().talk(TWO))
    assert documents.document(0)[0].tolist() == expected[0]
    assert documents.document(0)[1].tolist() == [mark == 1 for mark in expected[1]]


def exchanges(n: int) -> list[dict]:
    return [turn for number in range(n)
            for turn in (said("user", f"{number}번 질문?"), said("assistant", f"{number}번"))]


@pytest.mark.parametrize("n", [2, 7, 40, 3000])
@pytest.mark.parametrize("cutoff_len", [48, 130])
def test_a_long_talk_is_cut_at_a_turn_from_the_front_and_keeps_its_system(tmp_path, encoder, n, cutoff_len):
    documents = load(tmp_path, encoder, [{"messages": [said("system", "짧게"), *exchanges(n)]}], cutoff_len)
    tokens = documents.document(0)[0].tolist()
    lengths = {}
    for kept in range(1, min(n, cutoff_len // 2) + 1):
        row = {"messages": [said("system", "짧게"), *exchanges(n)[-2 * kept :]]}
        turns = forms.read_row(row, columns.choose_form(row), 1, "")
        (lengths[kept], _), = encoder.encode_batch(Prompter().talk(turns))
    most = max(kept for kept, ids in lengths.items() if len(ids) <= cutoff_len)
    assert tokens == lengths[most] and documents.n_cut == 0
    assert documents.found.get("cut_talk", {}).get("note", "주고받음 0번") == f"주고받음 {n - most:,}번"
    assert check.short_lines(documents.found) == ([] if most == n else [
        f"  길어서 앞의 주고받음을 덜어 낸 대화(system은 남긴다) [주고받음 {n - most:,}번] 1개: 1번째 행"])


def test_a_single_exchange_that_is_too_long_is_cut_inside(tmp_path, encoder):
    talk = [*exchanges(3), said("user", "긴 답?"), said("assistant", "길다 " * 60)]
    documents = load(tmp_path, encoder, [{"messages": talk}], 48)
    tokens, answer = documents.document(0)
    last, = encoder.encode_batch(Prompter().talk([Turn("user", "긴 답?"), Turn("assistant", "길다 " * 60)]))
    assert tokens.tolist() == [*last[0][:47], END] and answer[-1] and documents.n_cut == 1


def test_the_window_never_asks_for_the_whole_of_an_endless_talk(encoder):
    """몇천 번 주고받은 대화에서도 블록에 들어갈 만큼만 글로 만든다."""
    asked = []

    class Counting(Prompter):
        def talk(self, turns):
            asked.append(len(turns))
            return super().talk(turns)

    turns = [turn for number in range(5000) for turn in (Turn("user", f"{number}?"), Turn("assistant", "네"))]
    window = Window(Counting(), encoder, 128)
    document, = window.documents(turns)
    assert len(encoder.encode_batch([document])[0][0]) <= 128 and max(asked) < 300 and len(asked) < 20
    assert window.dropped == 5000 - len(document)
