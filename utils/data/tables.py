"""표로 된 데이터 파일의 리더: CSV와 엑셀. 한 줄이 열 이름이고 그 아래가 행이다.

열 이름은 아는 이름이 있는 첫 줄이다. 그 위의 제목과 빈 줄은 읽지 않는다. 이름 없는 열과 모두 빈 행도 읽지 않는다.
"""

import contextlib
import csv
import datetime
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from utils.data.columns import choose_form
from utils.data.encoding import MAX_ROW_CHARS, BadRow, detect_encoding, refuse_row
from utils.errors import UsageError

TITLE_ROWS = 10  # 열 이름을 이 줄 안에서 찾는다
TAB_ROWS = 3  # 앞의 이만큼의 줄에 탭이 같은 수로 들었으면 표로 본다
MARKS = (",", "\t", ";", "|")
_MARK_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # 엑셀이 읽는, 칸을 나누는 글자를 적은 첫 줄
_NAN = ("nan", "NaN")  # pandas가 빈 칸을 적는 글자
_HEAD_CHARS = 1 << 16
_CSV_WORDS = {  # csv 모듈의 오류 -> 사람의 말
    "expected after": "큰따옴표로 감싼 칸 뒤에 글이 더 있다. 글 속의 큰따옴표는 두 개(\"\")로 적는다",
    "unexpected end": "큰따옴표가 닫히지 않고 파일이 끝났다", "field larger": "칸 하나가 너무 길다"}
_OLD_EXCEL = b"\xd0\xcf\x11\xe0"  # .xls이거나 암호를 건 .xlsx
# 엑셀의 표시 형식에서 자리를 맞추는 빈칸과 색, 그 뒤의 (앞에 붙는 글, 정수, 소수, %, 뒤에 붙는 글)
_FORMAT_NOISE = re.compile(r"_.|\*.|\\(?=.)|\[(?!\$)[^\]]*\]")
_LITERAL = r'((?:"[^"]*"|[^#0?.,%@"A-Za-z])*)'
_FORMAT = re.compile(rf"{_LITERAL}([#0][#0,]*)(\.0+)?(%?){_LITERAL}")


def read_csv(path: Path, on_bad: BadRow | None = None) -> Iterator[tuple[int, dict]]:
    """CSV의 행. 쉼표, 탭, 세미콜론, | 가운데 열 이름을 나누는 것으로 나눈다. 번호는 열 이름 아래의 차례다."""
    on_bad = on_bad or refuse_row(path)
    csv.field_size_limit(MAX_ROW_CHARS)
    with path.open(encoding=detect_encoding(path), newline="") as stream:
        mark = _find_mark(stream)
        names, table = _split_header(_parse(stream, mark), path)
        for number, values in enumerate(table, 1):
            if isinstance(values, csv.Error):
                words = next((words for part, words in _CSV_WORDS.items() if part in str(values)), str(values))
                on_bad(number, f"{number}번째 행이 올바른 CSV가 아니다: {words}")
            elif any(value.strip() for value in values):
                if len(values) < len(names) or any(values[len(names) :]):
                    advice = ". 쉼표가 든 글은 큰따옴표로 감싼다" if len(values) > len(names) and mark == "," else ""
                    on_bad(number, f"{number}번째 행의 칸이 {len(values)}개다(열은 {len(names)}개){advice}")
                else:
                    yield number, {name: None if value in _NAN else value
                                   for name, value in zip(names, values, strict=False) if name}


def is_table(path: Path, encoding: str) -> bool:
    """첫 줄에 질문과 답의 열이 나뉘어 적혔거나, 앞의 줄마다 탭이 같은 수로 든 글 파일인가."""
    with path.open(encoding=encoding, newline="") as stream:
        head = [stream.readline(_HEAD_CHARS) for _ in range(TAB_ROWS)]
    forms = (choose_form(_cells(head[0], mark)) for mark in MARKS)
    tabs = {line.count("\t") for line in head}
    return any(form is not None and "answer" in form.columns for form in forms) or (len(tabs) == 1 and 0 not in tabs)


def read_xlsx(path: Path, on_bad: BadRow | None = None) -> Iterator[tuple[int, dict]]:
    """엑셀 파일의 시트 하나: 아는 열 이름이 있는 첫 시트. 번호는 열 이름 아래의 차례다.

    수와 날짜는 글로 바꾸고, 수식은 저장된 값을 쓴다.
    """
    with _open_book(path) as book:
        table = _choose_sheet(book).iter_rows()
        names, rows = _split_header(([_text(cell) for cell in row] for row in table), path)
        named = [name for name in names if name]
        for number, values in enumerate(rows, 1):
            row = {name: value for name, value in zip(names, values, strict=False) if name}
            if any(value is not None for value in row.values()):
                yield number, {**dict.fromkeys(named), **row}


def unread_sheets(path: Path) -> list[str]:
    """엑셀 파일에서 읽지 않는 시트들. 빈 시트는 세지 않는다."""
    with _open_book(path) as book:
        chosen = _choose_sheet(book)
        return [sheet.title for sheet in book.worksheets if sheet is not chosen and any(map(any, _head(sheet)))]


@contextlib.contextmanager
def _open_book(path: Path) -> Iterator:
    """엑셀 파일을 연다. 읽는 동안의 오류도 한 줄로 말한다."""
    try:
        import openpyxl
    except ImportError:
        raise UsageError(f"엑셀 파일을 읽으려면 openpyxl이 있어야 한다({path}): pip install openpyxl") from None
    with path.open("rb") as stream:
        if stream.read(4) == _OLD_EXCEL:
            raise UsageError(f"암호를 걸었거나 옛 형식(.xls)인 엑셀 파일이다: {path}. 엑셀에서 암호 없이 .xlsx로 다시 "
                             "저장한다")
    try:
        with contextlib.closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
            yield book
    except (UsageError, GeneratorExit):
        raise
    except Exception as error:  # zip, XML, 엑셀의 형식마다 제 오류를 낸다
        raise UsageError(f"올바른 엑셀 파일(.xlsx)이 아니다: {path} ({type(error).__name__}). 엑셀에서 "
                         "다시 저장한다") from None


def _choose_sheet(book):
    """아는 열 이름이 있는 첫 시트. 없으면 무엇이라도 적힌 첫 시트다."""
    sheets = book.worksheets
    known = (sheet for sheet in sheets if any(choose_form(map(_name, row)) for row in _head(sheet)))
    written = (sheet for sheet in sheets if any(map(any, _head(sheet))))
    return next(known, None) or next(written, sheets[0])


def _head(sheet) -> list[tuple]:
    return list(sheet.iter_rows(max_row=TITLE_ROWS, values_only=True))


def _split_header(table: Iterable[list], path: Path) -> tuple[list[str], Iterator[list]]:
    """(열 이름, 그 아래의 줄들). 이름 없는 열은 빈 글이다.

    Raises:
        UsageError: 이름이 같은 열이 있다.
    """
    table = iter(table)
    first = list(islice(table, TITLE_ROWS))
    rows = [list(map(_name, row)) if isinstance(row, list) else [] for row in first]
    written = next((at for at, row in enumerate(rows) if any(row)), 0)
    at = next((at for at, row in enumerate(rows) if choose_form(row)), written)
    names = rows[at] if rows else []
    named = [name for name in names if name]
    if twice := {name for name in named if named.count(name) > 1}:
        raise UsageError(f"{path}에 이름이 같은 열이 있다: {', '.join(sorted(twice))}. 하나만 남기거나 이름을 바꾼다")
    return names, chain(first[at + 1 :], table)


def _name(value: object) -> str:
    return "" if value is None else str(value).strip()


def _parse(stream, mark: str) -> Iterator[list[str] | csv.Error]:
    """줄마다 칸들이나 그 줄의 오류. 오류 뒤의 줄도 읽는다."""
    reader = csv.reader(stream, strict=True, delimiter=mark)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield error


def _find_mark(stream) -> str:
    """칸을 나누는 글자. 스트림은 표가 시작되는 자리에 둔다."""
    head = [stream.readline(_HEAD_CHARS) for _ in range(TITLE_ROWS)]
    stream.seek(0)
    if told := _MARK_LINE.fullmatch(head[0]):
        stream.readline()
        return told[1]
    known = (mark for line in head for mark in MARKS if choose_form(_cells(line, mark)))
    present = (mark for mark in MARKS[:3] if mark in head[0])
    return next(known, None) or next(present, ",")


def _cells(line: str, mark: str) -> list[str]:
    return [cell.strip().strip('"').strip() for cell in line.split(mark)]


def _text(cell) -> str | None:
    """칸의 글. 빈 칸은 None이다."""
    value = cell.value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        return _shown_number(value, cell.number_format)
    if isinstance(value, datetime.datetime):
        return value.strftime("%Y-%m-%d" if value.time() == datetime.time() else "%Y-%m-%d %H:%M")
    if isinstance(value, datetime.time):
        return value.strftime("%H:%M")
    return None if value is None else str(value)


def _shown_number(value: float, number_format: str) -> str:
    """엑셀에서 보이는 수: 쉼표, 소수의 자리, %, 원 같은 단위. 모르는 표시 형식이면 값 그대로다."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    section = re.sub(r"\[\$([^\]-]*)[^\]]*\]", r"\1", _FORMAT_NOISE.sub("", number_format.split(";")[0]))
    found = _FORMAT.fullmatch(section)
    if found is None or (number_format == "0" and whole == value and isinstance(whole, int)):
        return str(whole)
    before, digits, decimals, percent, after = found.groups()
    comma = "," if "," in digits else ""
    number = f"{value:{comma}.{len(decimals or '.') - 1}{percent or 'f'}}"
    return f"{before}{number}{after}".replace('"', "").strip()
