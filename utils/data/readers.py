"""데이터 파일의 형식마다의 리더: 바이트에서 글자를 거쳐 행으로. 파일이 아무리 커도 한 번에 한 행만 메모리에 둔다."""

import codecs
import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from utils.data.texts import END_TOKEN
from utils.errors import UsageError

MAX_ROW_CHARS = 1 << 26
_CHUNK = 1 << 20
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_HANGUL = re.compile("[가-힣]")
_GAP = re.compile(r"[ \t\r\n]*")
_STRING = r'"(?:[^"\\]|\\.)*"'
_SCALAR = rf"{_STRING}\s*:\s*(?:{_STRING}|-?[\d.]+|true|false|null)\s*"
# {"version": "1.0", "data": [행, ...]}처럼 행의 배열을 객체로 감싼 파일의 앞과 뒤
_WRAPPER = re.compile(rf'\{{\s*(?:{_SCALAR},\s*)*"(?:data|rows|train|examples|items)"\s*:\s*(?=\[)')
_WRAPPER_END = re.compile(rf"\s*(?:,\s*{_SCALAR})*\}}\s*")
_NAN = ("nan", "NaN")  # pandas가 빈 칸을 적는 글자
BadRow = Callable[[int, str], None]


def detect_encoding(path: Path) -> str:
    """BOM이 있으면 그것을, 없으면 UTF-8, UTF-16, CP949 가운데 끝까지 읽히는 것을 고른다.

    Raises:
        UsageError: 어느 것으로도 읽히지 않는다. UTF-8 파일의 일부가 깨졌으면 그 줄의 번호를 말한다.
    """
    with path.open("rb") as stream:
        head = stream.read(4)
    named = next((encoding for bom, encoding in _BOMS if head.startswith(bom)), None)
    if named is None and b"\0" in head[:2]:
        named = "utf-16-be" if head.startswith(b"\0") else "utf-16-le"
    broken_line, has_hangul = _first_broken_line(path, named or "utf-8")
    if broken_line is None:
        return named or "utf-8"
    if named is None and not has_hangul and _first_broken_line(path, "cp949")[0] is None:
        return "cp949"
    raise UsageError(f"{path}의 {broken_line}번째 줄의 글자를 {named or 'UTF-8'}로 읽을 수 없다. UTF-8로 다시 저장한다")


def read_json(path: Path, on_bad: BadRow | None = None) -> Iterator[tuple[int, object]]:
    """배열 하나(`{"data": [...]}`로 감싸도 된다)이거나, 줄마다 객체가 하나인 JSON. 번호는 원소나 줄의 번호다.

    Args:
        on_bad: 주면 깨진 줄을 (번호, 이유)으로 알리고 건너뛴다. 배열은 깨진 자리에서 끝난다.

    Raises:
        UsageError: 올바른 JSON이 아니고 `on_bad`가 없다.
    """
    on_bad = on_bad or _refuse(path)
    with path.open(encoding=detect_encoding(path)) as stream:
        head = stream.read(_CHUNK).lstrip()
        stream.seek(0)
        wrapper = _WRAPPER.match(head)
        if head.startswith("[") or wrapper:
            yield from _read_array(stream, path, on_bad, wrapper.end() if wrapper else None)
        else:
            yield from _read_lines(stream, path, on_bad)


def read_csv(path: Path, on_bad: BadRow | None = None) -> Iterator[tuple[int, dict]]:
    """첫 줄이 열 이름인 CSV. 번호는 열 이름을 뺀 행의 번호다. 첫 줄에 쉼표가 없으면 탭이나 세미콜론으로 나눈다."""
    on_bad = on_bad or _refuse(path)
    csv.field_size_limit(MAX_ROW_CHARS)
    with path.open(encoding=detect_encoding(path), newline="") as stream:
        head = stream.readline(_CHUNK)
        mark = next((mark for mark in ",\t;" if mark in head), ",")
        stream.seek(0)
        reader, number = csv.reader(stream, strict=True, delimiter=mark), 0
        try:
            columns = next(reader, None) or []
            if len(set(columns)) < len(columns):
                raise UsageError(f"{path}에 이름이 같은 열이 있다: {', '.join(columns)}")
            for values in reader:
                if not values:
                    continue
                number += 1
                if len(values) == len(columns):
                    yield number, {name: None if value in _NAN else value
                                   for name, value in zip(columns, values, strict=True)}
                else:
                    on_bad(number, f"{number}번째 행의 칸이 {len(values)}개다(열은 {len(columns)}개)")
        except csv.Error as error:
            on_bad(number + 1, f"{number + 1}번째 행이 올바른 CSV가 아니다: {error}")


def read_parquet(path: Path, on_bad: BadRow | None = None) -> Iterator[tuple[int, dict]]:
    """parquet 파일의 행. 번호는 행의 번호다."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        (on_bad or _refuse(path))(number + 1, f"{number + 1}번째 행부터 올바른 parquet이 아니다: {reason}")


def read_txt(path: Path, on_bad: BadRow | None = None) -> Iterator[tuple[int, dict]]:
    """끝 토큰이 하나라도 있으면 그것으로, 없으면 빈 줄로 글을 나눈다. 번호는 글의 번호다."""
    with path.open(encoding=detect_encoding(path)) as stream:
        by_token = any(END_TOKEN in line for line in _lines(stream, path))
        stream.seek(0)
        number, held, size = 0, [], 0
        for line in _lines(stream, path):
            *finished, rest = line.split(END_TOKEN) if by_token else [line] if line.strip() else ["", ""]
            for part in finished:
                text = "".join([*held, part]).strip()
                held, size = [], 0
                if text:
                    number += 1
                    yield number, {"text": text}
            held.append(rest)
            size += len(rest)
            if size > MAX_ROW_CHARS:
                raise UsageError(f"{path}의 {number + 1}번째 글이 너무 길다. 빈 줄이나 {END_TOKEN}로 글을 나눈다")
        if text := "".join(held).strip():
            yield number + 1, {"text": text}


def read_xlsx(path: Path, on_bad: BadRow | None = None) -> Iterator[tuple[int, dict]]:
    """엑셀 파일의 첫 시트. 첫 줄이 열 이름이고, 번호는 그 아래 행의 번호다(엑셀의 줄 번호보다 하나 작다).

    수는 보이는 대로 글로 바꾸고, 수식은 저장된 값을 쓴다. 빈 행은 건너뛴다.
    """
    try:
        import openpyxl
    except ImportError:
        raise UsageError(f"엑셀 파일을 읽으려면 openpyxl이 있어야 한다({path}): pip install openpyxl") from None
    try:
        with contextlib.closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
            table = book.worksheets[0].iter_rows(values_only=True)
            names = [str(name).strip() if name is not None else "" for name in next(table, ())]
            named = [name for name in names if name]
            if len(set(named)) < len(named):
                raise UsageError(f"{path}에 이름이 같은 열이 있다: {', '.join(named)}")
            for number, values in enumerate(table, 1):
                row = {name: _cell(value) for name, value in zip(names, values, strict=False) if name}
                if any(value is not None for value in row.values()):
                    yield number, {**dict.fromkeys(named), **row}
    except UsageError:
        raise
    except Exception as error:  # zip, XML, 엑셀의 형식마다 제 오류를 낸다
        raise UsageError(f"{path}가 올바른 엑셀 파일(.xlsx)이 아니다({type(error).__name__}). 엑셀에서 "
                         "다시 저장한다") from None


def _cell(value: object) -> object:
    """칸의 값. 수는 글로 바꾼다. 날짜처럼 보이는 글이 따로 있는 값은 그대로 두어 행을 읽을 때 거절하게 한다."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


READERS = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".parquet": read_parquet, ".txt": read_txt,
           ".xlsx": read_xlsx}
BINARY = (".parquet", ".xlsx")  # 글자의 인코딩이 따로 없는 형식


def _first_broken_line(path: Path, encoding: str) -> tuple[int | None, bool]:
    """(읽히지 않는 첫 줄의 번호, 그 앞에 한글이 있었는가). 끝까지 읽히면 번호가 None이다."""
    decoder, line, has_hangul = codecs.getincrementaldecoder(encoding)(), 1, False
    with path.open("rb") as stream:
        while True:
            chunk = stream.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeError as error:
                good = getattr(error, "object", b"")[: getattr(error, "start", 0)]
                return line + good.count(b"\n"), has_hangul or bool(_HANGUL.search(good.decode(encoding, "ignore")))
            has_hangul = has_hangul or bool(_HANGUL.search(text))
            line += text.count("\n")
            if not chunk:
                return None, has_hangul


def _refuse(path: Path) -> BadRow:
    def refuse(number: int, reason: str) -> None:
        raise UsageError(f"{path}의 {reason}")
    return refuse


def _lines(stream: TextIO, path: Path) -> Iterator[str]:
    number = 0
    while line := stream.readline(MAX_ROW_CHARS):
        number += 1
        if len(line) == MAX_ROW_CHARS:
            raise UsageError(f"{path}의 {number}번째 줄이 너무 길다(한 줄은 {MAX_ROW_CHARS:,}글자까지)")
        yield line


def _read_lines(stream: TextIO, path: Path, on_bad: BadRow) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(_lines(stream, path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                on_bad(number, f"{number}번째 줄이 올바른 JSON이 아니다: {_reason(error)}")
                continue
            yield number, row


def _read_array(stream: TextIO, path: Path, on_bad: BadRow, wrapped: int | None) -> Iterator[tuple[int, object]]:
    """큰 배열을 통째로 올리지 않고 원소 하나씩 푼다. `wrapped`는 배열을 감싼 객체에서 배열이 시작되는 자리다."""
    decoder, number, after_comma = json.JSONDecoder(), 0, True
    buffer = stream.read(_CHUNK).lstrip()
    at = (wrapped or 0) + 1
    while True:
        at = _GAP.match(buffer, at).end()
        if at == len(buffer):
            buffer, at = stream.read(_CHUNK), 0
            if not buffer:
                return on_bad(number + 1, f"{number + 1}번째 행에서 배열이 닫히지 않고 끝났다(덜 받은 파일)")
        elif buffer[at] == "]" and (number == 0 or not after_comma):
            rest = buffer[at + 1 :] + stream.read(_CHUNK)
            if wrapped is not None:
                end = _WRAPPER_END.match(rest)
                rest = rest[end.end() :] if end else "닫히지 않았다"
            if rest.strip() or any(line.strip() for line in _lines(stream, path)):
                on_bad(number + 1, f"{number}번째 행에서 배열이 끝났는데 뒤에 다른 글이 있거나 덜 받은 파일이다")
            return
        elif buffer[at] == "," and not after_comma:
            at, after_comma = at + 1, True
        elif not after_comma:
            return on_bad(number + 1, f"{number}번째 행 뒤에 쉼표가 없다(올바른 JSON이 아니다)")
        else:
            try:
                value, at = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:
                # 값이 버퍼의 끝에서 잘렸을 수 있으면 남은 만큼(두 배가 되게) 더 읽는다
                left = len(buffer) - at
                more = stream.read(max(_CHUNK, left)) if _may_continue(error, len(buffer), at) else ""
                if not more:
                    return on_bad(number + 1, f"{number + 1}번째 행이 올바른 JSON이 아니다: {_reason(error)}")
                buffer, at = buffer[at:] + more, 0
                continue
            number, after_comma = number + 1, False
            yield number, value


def _may_continue(error: Exception, end: int, start: int) -> bool:
    """글이 중간에 끊겨서 난 오류인가. 그렇다면 더 읽고 다시 푼다."""
    if not isinstance(error, json.JSONDecodeError) or end - start > MAX_ROW_CHARS:
        return False
    return error.msg.startswith("Unterminated") or error.pos > end - 16


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
