"""데이터 파일을 행의 흐름으로 읽고, 행을 (질문, 답) 조각으로 바꾼다. 열 이름이 형식을 정한다."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.errors import UsageError
from utils.modelfolder import looks_like_hub_id

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
DOWNLOAD_KOALPACA = "python ko-datasets/download-koalpaca.py"
END_TOKEN = "<|endoftext|>"
FORMS = ("text", "instruction(+input)+output|response", "prompt+completion", "messages")
_CHUNK = 1 << 20


def read_rows(data_path: str | Path, cache_dir: str | None = None) -> Iterator[tuple[int, dict]]:
    """(행 번호, 열 -> 값)을 하나씩 준다. 번호는 1부터이고, 줄마다 객체가 하나인 파일에서는 줄 번호다.

    Raises:
        UsageError: 파일이 없거나 비었거나 형식이 깨졌다. 깨진 줄의 번호를 말한다.
    """
    path = Path(data_path)
    if path.is_file():
        reader = {".csv": _read_csv, ".parquet": _read_parquet, ".txt": _read_txt}.get(path.suffix.lower(), _read_json)
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"읽을 수 없는 데이터 형식이다: {path} (쓸 수 있는 형식: {', '.join(SUFFIXES)})")
        rows = reader(path)
    else:
        rows = _read_hub(str(data_path), cache_dir)
    empty = True
    for number, row in rows:
        empty = False
        if not isinstance(row, dict):
            raise UsageError(f"{data_path}의 {number}번째 행이 객체({{...}})가 아니다")
        yield number, row
    if empty:
        raise UsageError(f"데이터가 비었다: {data_path}")


def require_data(data_path: str | Path) -> None:
    """데이터 파일이 있는지 본다. 없으면 받거나 만드는 명령을 말한다."""
    if not Path(data_path).is_file() and (Path(data_path).suffix in SUFFIXES or not looks_like_hub_id(data_path)):
        raise UsageError(f"데이터 파일이 없다: {data_path}. KoAlpaca를 받는 명령: {DOWNLOAD_KOALPACA}")


def segmenter(columns: set[str], prompter, source: str | Path) -> Callable[[int, dict], list[tuple[str, str]]]:
    """열 이름을 보고 행을 [(프롬프트, 답), ...] 조각으로 바꾸는 함수를 고른다. 답마다 끝 토큰이 붙는다.

    Raises:
        UsageError: 아는 형식의 열이 없다. 있는 열의 이름을 말한다.
    """
    answer = next((name for name in ("output", "response") if name in columns), None)
    if "instruction" in columns and answer:
        return lambda number, row: [
            prompter.pieces(_field(row, "instruction", number, source), str(row.get("input") or ""),
                            strip_end(_field(row, answer, number, source)))]
    if {"prompt", "completion"} <= columns:
        return lambda number, row: [
            prompter.pieces(_field(row, "prompt", number, source), "",
                            strip_end(_field(row, "completion", number, source)))]
    if "messages" in columns:
        return lambda number, row: _messages(row, number, prompter, source)
    if "text" in columns:
        def from_text(number: int, row: dict) -> list[tuple[str, str]]:
            text = strip_end(_field(row, "text", number, source))
            return [prompter.split(text) or ("", text)]
        return from_text
    found = ", ".join(sorted(columns)) or "없음"
    raise UsageError(f"{source}의 열을 알 수 없다: {found}. 쓸 수 있는 열: {' / '.join(FORMS)}")


def strip_end(text: str) -> str:
    """글 끝의 끝 토큰 글자를 뗀다. 끝 토큰은 토큰을 만들 때 한 번만 붙인다."""
    while text.rstrip().endswith(END_TOKEN):
        text = text.rstrip()[: -len(END_TOKEN)]
    return text


def detect_encoding(path: Path) -> str:
    """BOM이 있으면 그것을, 없으면 UTF-8과 CP949 가운데 끝까지 읽히는 것을 고른다.

    Raises:
        UsageError: 어느 것으로도 읽히지 않는다.
    """
    with path.open("rb") as stream:
        head = stream.read(4)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    for encoding in ("utf-8-sig", "cp949"):
        try:
            with path.open(encoding=encoding) as stream:
                while stream.read(_CHUNK):
                    pass
            return encoding
        except UnicodeError:
            continue
    raise UsageError(f"{path}의 글자를 읽을 수 없다. UTF-8로 저장한다")


def _field(row: dict, name: str, number: int, source: str | Path) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{source}의 {number}번째 행에 {name}이 없거나 비었다")
    return value


def _messages(row: dict, number: int, prompter, source: str | Path) -> list[tuple[str, str]]:
    pieces, question = [], ""
    try:
        for message in row["messages"]:
            if message["role"] == "assistant":
                pieces.append(prompter.pieces(question, "", strip_end(message["content"])))
                question = ""
            else:
                question = f"{question}\n\n{message['content']}" if question else message["content"]
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"{source}의 {number}번째 행의 messages에 role과 content가 없다") from None
    if not pieces:
        raise UsageError(f"{source}의 {number}번째 행의 messages에 assistant의 답이 없다")
    return pieces


def _read_json(path: Path) -> Iterator[tuple[int, object]]:
    encoding = detect_encoding(path)
    with path.open(encoding=encoding) as stream:
        start = stream.read(_CHUNK).lstrip()[:1]
        stream.seek(0)
        if start == "[":
            yield from _read_array(stream, path)
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise UsageError(f"{path}의 {number}번째 줄이 올바른 JSON이 아니다: {error.args[0]}") from None


def _read_array(stream, path: Path) -> Iterator[tuple[int, object]]:
    """큰 배열을 통째로 올리지 않고 원소 하나씩 푼다."""
    decoder, buffer, number = json.JSONDecoder(), stream.read(_CHUNK).lstrip()[1:], 0
    while True:
        buffer = buffer.lstrip(" \r\n\t,")
        if buffer.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(buffer)
        except ValueError as error:
            more = stream.read(max(_CHUNK, len(buffer)))
            if not more:
                raise UsageError(f"{path}의 {number + 1}번째 행이 올바른 JSON이 아니다: {error.args[0]}") from None
            buffer += more
            continue
        number += 1
        yield number, value
        buffer = buffer[end:]


def _read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding=detect_encoding(path), newline="") as stream:
        try:
            yield from enumerate(csv.DictReader(stream, strict=True), 1)
        except csv.Error as error:
            raise UsageError(f"{path}가 올바른 CSV가 아니다: {error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path}가 올바른 parquet이 아니다: {error}") from None


def _read_txt(path: Path) -> Iterator[tuple[int, dict]]:
    """끝 토큰이 있으면 그것으로, 없으면 빈 줄로 글을 나눈다."""
    text = path.read_text(encoding=detect_encoding(path))
    parts = text.split(END_TOKEN) if END_TOKEN in text else text.split("\n\n")
    documents = (part.strip() for part in parts)
    yield from enumerate(({"text": document} for document in documents if document), 1)


def _read_hub(name: str, cache_dir: str | None) -> Iterator[tuple[int, dict]]:
    import datasets

    require_data(name)
    try:
        split = datasets.load_dataset(name, split="train", cache_dir=cache_dir)
    except Exception as error:  # hub의 오류는 종류가 많고 모두 사용자가 고칠 일이다
        reason = type(error).__name__
        raise UsageError(f"hub에서 데이터를 받지 못했다: {name} ({reason}). 이름과 인터넷을 확인한다") from None
    yield from enumerate(split, 1)
