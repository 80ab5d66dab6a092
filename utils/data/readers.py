"""데이터 파일의 형식마다의 리더: 바이트에서 글자를 거쳐 행으로. 파일이 아무리 커도 한 번에 한 행만 메모리에 둔다."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from utils.data.encoding import MAX_ROW_CHARS, BadRow, detect_encoding, refuse_row, require_whole
from utils.data.tables import is_table, read_csv, read_xlsx
from utils.data.texts import END_TOKEN
from utils.errors import UsageError, first_line, json_reason

_CHUNK = 1 << 20
_GAP = re.compile(r"[ \t\r\n]*")
_STRING = r'"(?:[^"\\]|\\.)*"'
_SCALAR = rf"{_STRING}\s*:\s*(?:{_STRING}|-?[\d.]+|true|false|null)\s*"
# {"version": "1.0", "data": [행, ...]}처럼 행의 배열을 객체로 감싼 파일의 앞과 뒤
_WRAPPER = re.compile(rf'\{{\s*(?:{_SCALAR},\s*)*"(?:data|rows|train|examples|items)"\s*:\s*(?=\[)')
_WRAPPER_END = re.compile(rf"\s*(?:,\s*{_SCALAR})*\}}\s*")


def read_json(path: Path, on_bad: BadRow | None = None) -> Iterator[tuple[int, object]]:
    """배열 하나(`{"data": [...]}`로 감싸도 된다)이거나, 줄마다 객체가 하나인 JSON. 번호는 원소나 줄의 번호다.

    Args:
        on_bad: 주면 깨진 줄을 (번호, 이유)으로 알리고 건너뛴다. 배열은 깨진 자리에서 끝난다.

    Raises:
        UsageError: 올바른 JSON이 아니고 `on_bad`가 없다.
    """
    on_bad = on_bad or refuse_row(path)
    with path.open(encoding=detect_encoding(path)) as stream:
        head = stream.read(_CHUNK).lstrip()
        stream.seek(0)
        wrapper = _WRAPPER.match(head)
        if head.startswith("[") or wrapper:
            yield from _read_array(stream, path, on_bad, wrapper.end() if wrapper else None)
        else:
            yield from _read_lines(stream, path, on_bad)


def read_parquet(path: Path, on_bad: BadRow | None = None) -> Iterator[tuple[int, dict]]:
    """parquet 파일의 행. 번호는 행의 번호다."""
    import pyarrow
    import pyarrow.parquet

    require_whole(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = "덜 받았거나 다른 파일이다" if "magic bytes" in str(error) else first_line(error)
        (on_bad or refuse_row(path))(number + 1, f"{number + 1}번째 행부터 올바른 parquet이 아니다: {reason}")


def read_txt(path: Path, on_bad: BadRow | None = None) -> Iterator[tuple[int, dict]]:
    """끝 토큰이 하나라도 있으면 그것으로, 없으면 빈 줄로 글을 나눈다. 번호는 글의 번호다.

    첫 줄에 질문과 답의 열이 탭 따위로 나뉘어 있으면(엑셀의 "유니코드 텍스트") 표로 읽는다.
    """
    encoding = detect_encoding(path)
    if is_table(path, encoding):
        yield from read_csv(path, on_bad)
        return
    with path.open(encoding=encoding) as stream:
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


READERS = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".tsv": read_csv, ".xlsx": read_xlsx,
           ".parquet": read_parquet, ".txt": read_txt}
BINARY = (".parquet", ".xlsx")  # 글자의 인코딩이 따로 없는 형식


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
                row = json.loads(line.removeprefix("\ufeff"))  # BOM이 있는 파일들을 이어 붙이면 가운데에도 있다
            except (ValueError, RecursionError) as error:
                on_bad(number, f"{number}번째 줄이 올바른 JSON이 아니다: {json_reason(error)}. 한 줄에 객체 하나를 "
                               "적거나 모두 [ ]로 감싼다")
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
                    return on_bad(number + 1, f"{number + 1}번째 행이 올바른 JSON이 아니다: {json_reason(error)}")
                buffer, at = buffer[at:] + more, 0
                continue
            number, after_comma = number + 1, False
            yield number, value


def _may_continue(error: Exception, end: int, start: int) -> bool:
    """글이 중간에 끊겨서 난 오류인가. 그렇다면 더 읽고 다시 푼다."""
    if not isinstance(error, json.JSONDecodeError) or end - start > MAX_ROW_CHARS:
        return False
    return error.msg.startswith("Unterminated") or error.pos > end - 16
