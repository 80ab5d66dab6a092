"""데이터 파일은 어떻게 망가져 있어도 행이 되거나, 파일과 자리를 말하는 한 줄의 거절이 된다."""

import csv
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.data import columns, dataset, forms, readers, rows
from utils.errors import UsageError
from utils.prompter import Prompter

pytestmark = pytest.mark.quick

ROW = {"text": "### 질문: 물은 왜 어나요?\n\n### 답변: 온도가 낮아지기 때문입니다.<|endoftext|>"}
LINE = json.dumps(ROW, ensure_ascii=False)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


def fuzz(n: int):
    """입력 n가지를 만들어 보는 설정."""
    return settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def read(folder, name: str, content: str | bytes) -> list[tuple[int, dict]]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(rows.read_rows(path))


def pieces_of(row: dict, number: int = 1) -> list[tuple[str, str]]:
    """행 하나를 default 템플릿의 조각으로."""
    said = forms.read_row(row, columns.require_form(row, "a.json"), number, "a.json")
    return dataset.say_row(Prompter(), said, number, "a.json")[1][0]


def refuse(folder, name: str, content: str | bytes) -> str:
    with pytest.raises(UsageError) as error:
        read(folder, name, content)
    message = str(error.value)
    assert name in message and "\n" not in message, message
    return message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp949"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_usual_encoding_gives_the_same_rows(tmp_path, encoding, end):
    assert read(tmp_path, "rows.json", (LINE + end + end + LINE).encode(encoding)) == [(1, ROW), (3, ROW)]
    assert read(tmp_path, "rows.csv", f'text{end}"물은, 왜"{end}'.encode(encoding)) == [(1, {"text": "물은, 왜"})]


def test_files_with_a_bom_may_be_joined(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\ufeff{LINE}\n\ufeff{LINE}\n", encoding="utf-8")
    assert [row for _, row in rows.read_rows(tmp_path / "a.jsonl")] == [json.loads(LINE)] * 2


@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"separators": (",", ":")}])
@pytest.mark.parametrize("n", [1, 3, 5000])
def test_array_gives_the_same_rows_as_lines(tmp_path, layout, n):
    many = [{**ROW, "n": number, "nested": [1, {"a": "]"}]} for number in range(n)]
    assert [row for _, row in read(tmp_path, "rows.json", json.dumps(many, **layout))] == many
    assert [row for _, row in read(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, many)))] == many


def test_text_is_divided_by_the_end_token_or_else_by_blank_lines(tmp_path):
    by_token = read(tmp_path, "a.txt", "가\n\n나<|endoftext|>\n다<|endoftext|>")
    assert by_token == [(1, {"text": "가\n\n나"}), (2, {"text": "다"})]
    by_blank = read(tmp_path, "b.txt", "가\n나\n\n\n  \r\n다\n")
    assert by_blank == [(1, {"text": "가\n나"}), (2, {"text": "다"})]


def test_parquet_keeps_messages(tmp_path):
    import pyarrow
    import pyarrow.parquet

    row = {"messages": [{"role": "user", "content": "가?"}, {"role": "assistant", "content": "나"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3), tmp_path / "rows.parquet")
    read_back = list(rows.read_rows(tmp_path / "rows.parquet"))
    assert read_back == [(1, row), (2, row), (3, row)]
    assert pieces_of(read_back[0][1]) == [("### 질문: 가?\n\n### 답변:", " 나")]


@pytest.mark.parametrize("name, content, named", [
    ("a.json", "", "비었다"),
    ("a.json", " \n\n ", "비었다"),
    ("a.json", "[]", "비었다"),
    ("a.json", LINE + "\n{\"text\": \n", "2번째 줄"),
    ("a.json", LINE + "\n\n[1]\n", "3번째 행이 객체"),
    ("a.json", f"[{LINE}, {LINE[:-5]}", "2번째 행"),
    ("a.json", f"[{LINE}, {LINE}", "3번째 행"),
    ("a.json", f"[{LINE} {LINE}]", "쉼표"),
    ("a.json", f"[{LINE}, ]", "2번째 행"),
    ("a.json", f"[{LINE}]\n[{LINE}]", "뒤에 다른 글"),
    ("a.json", f"[{LINE}, 3]", "2번째 행이 객체"),
    ("a.json", "[" * 100_000, "1번째 행"),
    ("a.jsonl", '{"a":' * 100_000, "1번째 줄"),
    ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "1번째 줄"),
    ("a.jsonl", "{\n\"text\": \"가\"\n}", "1번째 줄"),
    ("a.jsonl", LINE.encode() + b"\n" + LINE.encode()[:30] + b"\xff\n", "2번째 줄"),
    ("a.jsonl", LINE.encode("utf-16")[:-1], "UTF-8로 다시 저장"),
    ("a.jsonl", bytes(range(128, 256)) * 10, "UTF-8"),
    ("a.csv", "text,text\n가,나\n", "같은 열"),
    ("a.csv", "text,b\n가,나\n가\n", "2번째 행의 칸이 1개"),
    ("a.csv", "text\n\"가\n", "1번째 행"),
    ("a.csv", "text\n", "비었다"),
    ("a.parquet", b"PAR1" + b"\0" * 40, "parquet"),
    ("a.parquet", LFS, "git lfs pull"),
    ("a.json", LFS, "git lfs pull"),
    ("a.jsonl", b"\x1f\x8b\x08\0" + bytes(20), "압축 파일(.gz)"),
    ("a.txt", "  \n\n<|endoftext|>", "비었다"),
    ("a.xlsx", "가", "xlsx"),
])
def test_broken_file_is_refused_by_place(tmp_path, name, content, named):
    assert named in refuse(tmp_path, name, content)


def test_syntax_error_early_in_a_big_array_is_found_without_reading_on(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text(f"[{LINE}, {{\"text\" 3}}, " + ", ".join([LINE] * 50_000) + "]", encoding="utf-8")
    monkeypatch.setattr(readers, "MAX_ROW_CHARS", 1 << 16)
    with pytest.raises(UsageError, match="2번째 행"):
        list(rows.read_rows(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_endless_row_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "MAX_ROW_CHARS", 1 << 21)
    opening = {"a.json": "[", "a.jsonl": "", "a.txt": ""}[name]
    refuse(tmp_path, name, opening + '{"text": "' + "가" * (1 << 22))


def test_bad_rows_can_be_counted_instead(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{LINE}\n{{bad\n3\n{LINE}\n", encoding="utf-8")
    bad = []
    good = list(rows.read_rows(tmp_path / "a.jsonl", on_bad=lambda number, reason: bad.append(number)))
    assert [number for number, _ in good] == [1, 4] and bad == [2, 3]


@pytest.mark.parametrize("path, named", [
    ("none.json", "지금 폴더"), ("none.JSONL", "지금 폴더"), ("a/b/c", "지금 폴더"), (".", "폴더"),
    ("가\0나.json", "지금 폴더"),
    ("KoAlpaca_v1.1a.json", "download-koalpaca"), ("faq", r"혹시 faq\.CSV\?"), ("faqs.csv", r"혹시 faq\.CSV\?"),
    ("polyglot-ko-skill", r"polyglot-ko-skills\.json\?"),
])
def test_missing_data_is_refused(path, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faq.CSV").touch()
    with pytest.raises(UsageError, match=named):
        rows.require_data(path)


def test_hub_id_without_internet_is_one_line():
    with pytest.raises(UsageError, match="hub에서 데이터를 받지 못했다") as error:
        list(rows.read_rows("beomi/none-such-data-set"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("row, pieces", [
    ({"text": ROW["text"]}, [("### 질문: 물은 왜 어나요?\n\n### 답변:", " 온도가 낮아지기 때문입니다.")]),
    ({"text": "표시가 없는 글<|endoftext|>\n<|endoftext|>"}, [("", "표시가 없는 글")]),
    ({"instruction": "가?", "output": "나<|endoftext|>"}, [("### 질문: 가?\n\n### 답변:", " 나")]),
    ({"instruction": "가?", "input": None, "response": "나"}, [("### 질문: 가?\n\n### 답변:", " 나")]),
    ({"instruction": "가?", "input": float("nan"), "response": "나"}, [("### 질문: 가?\n\n### 답변:", " 나")]),
    ({"instruction": "가?", "input": "맥", "output": "나", "text": "x"},
     [("### 질문: 가?\n\n### 맥락: 맥\n\n### 답변:", " 나")]),
    ({"prompt": "가?", "completion": "나"}, [("### 질문: 가?\n\n### 답변:", " 나")]),
    ({"messages": [{"role": "system", "content": "짧게"}, {"role": "user", "content": "가?"},
                   {"role": "assistant", "content": "나"}, {"role": "user", "content": "다?"},
                   {"role": "assistant", "content": "라"}]},
     [("### 질문: 짧게\n\n가?\n\n### 답변:", " 나"), ("### 질문: 다?\n\n### 답변:", " 라")]),
    ({"text": "\u1100\u1161 \u1112\u1161\u11ab"}, [("", "가 한")]),
])
def test_columns_choose_the_form(row, pieces):
    assert pieces_of(row) == pieces


@pytest.mark.parametrize("row, named", [
    ({"text": None}, "text"), ({"text": ""}, "text"), ({"text": 3}, "int"), ({"text": ["가"]}, "list"),
    ({"text": "<|endoftext|>"}, "text"), ({"text": "### 질문: 가\n\n### 답변: <|endoftext|>"}, "text"),
    ({"text": "\ud800"}, "surrogate"), ({"instruction": "가", "output": 42}, "int"),
    ({"instruction": {"a": 1}, "output": "가"}, "dict"), ({"instruction": "가", "output": " "}, "output"),
    ({"instruction": "가", "output": "나", "input": {"a": 1}}, "input"),
    ({"instruction": "가", "output": float("nan")}, "output"),
    ({"prompt": "가", "completion": None}, "completion"), ({"messages": "가"}, "messages"),
    ({"messages": None}, "messages"), ({"messages": []}, "assistant"), ({"messages": [3]}, "messages"),
    ({"messages": [{"role": "user", "content": "가"}]}, "assistant"), ({"messages": [{"content": "가"}]}, "role"),
    ({"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}, "list"),
    ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "가"}]}, "content"),
])
def test_row_without_its_text_is_refused_by_number(row, named):
    with pytest.raises(UsageError) as error:
        pieces_of(row, 7)
    assert named in str(error.value) and "a.json의 7번째 행" in str(error.value)


def test_unknown_columns_are_named():
    with pytest.raises(UsageError, match="번호, 이름"):
        columns.require_form(["번호", "이름"], "a.json")


def consume(path, content: bytes) -> None:
    """행으로 읽고 조각으로 바꾼다. UsageError가 아닌 예외는 그대로 새어 나간다."""
    path.write_bytes(content)
    form = None
    try:
        for number, row in rows.read_rows(path):
            form = form or columns.require_form(row, path)
            said = forms.read_row(row, form, number, path)
            assert all(prompt + answer for prompt, answer in Prompter().talk(said)[0])
    except UsageError as error:
        assert str(path) in str(error)


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                      lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=3), each, max_size=3),
                      max_leaves=6)
names = st.sampled_from(["text", "instruction", "input", "output", "response", "prompt", "completion", "messages", "x"])
messages = st.lists(st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "x"]) | values,
                                                        "content": st.text() | values}), max_size=4)
objects = st.dictionaries(names, st.text(max_size=20) | values | messages, max_size=5)


@st.composite
def mutated_files(draw):
    """올바른 파일을 한 인코딩으로 쓰고 몇 군데를 바이트 단위로 망가뜨린다."""
    some = draw(st.lists(objects | st.just(ROW), max_size=4))
    texts = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in some]
    whole = "[" + ", ".join(texts) + "]" if draw(st.booleans()) else "\n".join(texts)
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "cp949"]))
    content = bytearray(whole.encode(encoding, "replace"))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 9))] = draw(st.binary(max_size=6))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@fuzz(1500)
@given(content=mutated_files())
def test_any_json_file_is_read_or_refused(tmp_path_factory, content):
    consume(tmp_path_factory.getbasetemp() / "fuzz.json", content)


@fuzz(1200)
@given(row=objects)
def test_any_object_is_read_or_refused(tmp_path_factory, row):
    consume(tmp_path_factory.getbasetemp() / "fuzz.jsonl", json.dumps(row).encode())


@fuzz(700)
@given(table=st.lists(st.lists(st.text(max_size=8) | names, max_size=4), max_size=5), noise=st.binary(max_size=4))
def test_any_csv_file_is_read_or_refused(tmp_path_factory, table, noise):
    stream = io.StringIO()
    csv.writer(stream).writerows([*table, ["끝"]])
    consume(tmp_path_factory.getbasetemp() / "fuzz.csv", stream.getvalue().encode("utf-8", "replace") + noise)


@fuzz(500)
@given(content=st.binary(max_size=60) | st.text().map(lambda text: text.encode("utf-8", "replace")))
def test_any_text_file_is_read_or_refused(tmp_path_factory, content):
    consume(tmp_path_factory.getbasetemp() / "fuzz.txt", content)


@fuzz(300)
@given(at=st.integers(0, 600), junk=st.binary(min_size=1, max_size=8), cut=st.integers(0, 600))
def test_any_damaged_parquet_file_is_read_or_refused(tmp_path_factory, at, junk, cut):
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW] * 3), sink)
    content = bytearray(sink.getvalue())
    content[at : at + len(junk)] = junk
    consume(tmp_path_factory.getbasetemp() / "fuzz.parquet", bytes(content[: len(content) - cut]))
