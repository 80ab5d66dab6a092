"""엑셀과 CSV를 사람이 만든 그대로 읽는다: 제목, 빈 줄, 이름 없는 열, 여러 시트, 수와 날짜."""

import datetime

import pytest

from utils.data import check, dataset, rows
from utils.data.encoder import Encoder
from utils.errors import UsageError
from utils.model.tokenizer import load_tokenizer
from utils.prompter import Prompter

pytestmark = pytest.mark.quick
openpyxl = pytest.importorskip("openpyxl")

ROW = {"질문": "가?", "답변": "나"}


def write(path, content: str | bytes):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path) -> list[dict]:
    return [row for _, row in rows.read_rows(path)]


@pytest.mark.parametrize("name, content", [
    ("제목이 있는 표.csv", "우리 가게 FAQ,\n,\n질문,답변\n가?,나\n"),
    ("제목과 탭.csv", "FAQ, 2026\t\n질문\t답변\n가?\t나\n"),
    ("이름 없는 열.csv", "질문,답변,,\n가?,나,,\n,,,\n"),
    ("앞의 빈 열.csv", ",질문,답변\n,가?,나\n"),
    ("모자란 헤더.csv", "질문,답변\n가?,나,,,\n"),
    ("빈 행.csv", "질문,답변\n\n,\n가?,나\n , \n"),
    ("sep.csv", "sep=;\n질문;답변\n가?;나\n"),
    ("sep.csv", '"sep=\t"\n질문\t답변\n가?\t나\n'),
    ("세로줄.csv", "질문|답변\n가?|나\n"),
    ("탭.tsv", "질문\t답변\n가?\t나\n"),
    ("유니코드 텍스트.txt", "질문\t답변\n가?\t나\n".encode("utf-16")),
    ("탭으로 분리.txt", "질문\t답변\r\n가?\t나\r\n".encode("cp949")),
    ("맥.csv", "질문,답변\r가?,나\r"),
    ("띄어쓰기.csv", " 질문 , 답변 \n가?,나\n"),
])
def test_a_table_is_read_as_people_make_it(tmp_path, name, content):
    assert read(write(tmp_path / name, content)) == [ROW]


def test_a_tab_file_with_unknown_columns_is_no_text(tmp_path):
    """NSMC의 ratings_train.txt는 표다. 한 글로 배우지 않고 열을 묻는다."""
    path = write(tmp_path / "ratings.txt", "id\tdocument\tlabel\n1\t좋아요\t1\n2\t싫어요\t0\n")
    assert [row["document"] for row in read(path)] == ["좋아요", "싫어요"]


@pytest.mark.parametrize("text", ["가\t나\n다\n", "질문, 답변이 있는 글.\n다음 줄\n", "text\n가\n"])
def test_a_text_file_stays_text(tmp_path, text):
    assert read(write(tmp_path / "a.txt", text)) == [{"text": text.strip()}]


@pytest.mark.parametrize("name, content, words", [
    ("a.csv", "질문,답변\n배송비는?,3,200원\n", "1번째 행의 칸이 3개.*큰따옴표로 감싼다"),
    ("a.csv", '질문,답변\n가?,"나" 다\n', '1번째 행.*두 개\\(""\\)로 적는다'),
    ("a.csv", '질문,답변\n가?,"나\n', "1번째 행.*닫히지 않고"),
    ("a.csv", "질문,답변,답변\n가?,나,다\n", "같은 열이 있다: 답변\\."),
    ("a.csv", b"PK\3\4" + bytes(50), "압축 파일"),
    ("a.csv", b"\xd0\xcf\x11\xe0" + bytes(50), "옛 엑셀"),
    ("a.xlsx", b"\xd0\xcf\x11\xe0" + bytes(50), "암호"),
    ("a.xls", b"\xd0\xcf\x11\xe0" + bytes(50), ".xlsx로 다시 저장"),
    ("a.json", '{\n "질문": "가",\n "답변": "나"\n}', "1번째 줄.*큰따옴표로 감싼 이름.*모두 \\[ \\]로 감싼다"),
    ("a.json", '[{"질문": "가", "답변" "나"}]', "1번째 행.*콜론이 있어야"),
])
@pytest.mark.parametrize("counting", [False, True])
def test_what_cannot_be_read_is_told_in_korean(tmp_path, name, content, words, counting):
    """행을 세기만 할 때도, 읽은 행이 없으면 같은 이유를 말한다."""
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError, match=words):
        list(rows.read_rows(path, on_bad=(lambda number, reason: None) if counting else None))


def test_rows_after_a_broken_row_are_read(tmp_path):
    path = write(tmp_path / "a.csv", '질문,답변\n가?,"나" 다\n가?,나\n라?,마,바\n가?,나\n')
    bad = []
    assert list(rows.read_rows(path, on_bad=lambda number, reason: bad.append(number))) == [(2, ROW), (4, ROW)]
    assert bad == [1, 3]


CELLS = [(7, "General", "7"), (7.0, "0", "7"), (0.5, "General", "0.5"), (0.05, "0%", "5%"), (0.125, "0.0%", "12.5%"),
         (3200, "#,##0", "3,200"), (3200, '#,##0"원"', "3,200원"), (3200, '"₩"#,##0', "₩3,200"),
         (3200, "[$₩-412]#,##0;[Red]-[$₩-412]#,##0", "₩3,200"), (1234.5, "#,##0.00", "1,234.50"),
         (3200, "_-* #,##0_-;-* #,##0_-", "3,200"), (2.0, "0.00E+00", "2"), (True, "General", "TRUE"),
         (datetime.date(2020, 3, 1), "yyyy-mm-dd", "2020-03-01"),
         (datetime.datetime(2020, 3, 1, 9, 30), "yyyy-mm-dd h:mm", "2020-03-01 09:30"),
         (datetime.time(9, 30), "h:mm", "09:30")]


def test_numbers_and_dates_become_what_the_sheet_shows(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["질문", "답변"])
    for place, (value, number_format, _) in enumerate(CELLS, 2):
        book.active.append([f"{place}?", value])
        book.active.cell(place, 2).number_format = number_format
    book.save(tmp_path / "a.xlsx")
    assert [row["답변"] for row in read(tmp_path / "a.xlsx")] == [shown for _, _, shown in CELLS]


def test_the_sheet_with_the_columns_is_read_and_the_others_are_named(tmp_path, tiny_neox):
    book = openpyxl.Workbook()
    book.active.title = "표지"
    book.active.append(["우리 가게"])
    for title in ("배송", "환불"):
        sheet = book.create_sheet(title)
        for line in (["자주 묻는 질문", None], [], ["질문", "답변"], ["가?", "나"]):
            sheet.append(line)
        sheet.merge_cells("A1:B1")
    book.create_sheet("빈 시트")
    book.save(tmp_path / "a.xlsx")
    assert read(tmp_path / "a.xlsx") == [ROW]
    documents = dataset.load_documents(tmp_path / "a.xlsx", Prompter(), Encoder(load_tokenizer(tiny_neox), 2), 64, 2,
                                       str(tmp_path / "cache"))
    assert any("[표지, 환불] 2개" in line for line in check.short_lines(documents.found))


def test_the_first_reason_is_told_beside_the_count(tmp_path, tiny_neox):
    path = write(tmp_path / "a.csv", "문의,답\n배송비는?,3,200원\n가?,나\n")
    documents = dataset.load_documents(path, Prompter(), Encoder(load_tokenizer(tiny_neox), 2), 64, 2,
                                       str(tmp_path / "cache"), skip_bad=True)
    lines = "\n".join(check.short_lines(documents.found))
    assert "칸이 3개다(열은 2개). 쉼표가 든 글은" in lines and "질문과 답으로 읽은 열 [문의, 답]" in lines


def test_a_file_without_a_usable_row_says_why(tmp_path, tiny_neox):
    path = write(tmp_path / "a.json", '[{"질문": "전화?", "답변": 1588}]')
    with pytest.raises(UsageError, match="1번째 행의 답변 열이 글이 아니다"):
        dataset.load_documents(path, Prompter(), Encoder(load_tokenizer(tiny_neox), 2), 64, 2, str(tmp_path / "cache"),
                               skip_bad=True)
