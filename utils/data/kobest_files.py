"""KoBEST의 파일: 어느 시험인지 알고, 행들을 읽고, 폴더에서 고른다."""

import csv
from collections.abc import Iterator
from pathlib import Path

from utils.data.encoding import MAX_ROW_CHARS, detect_encoding
from utils.data.kobest import TASKS, Task
from utils.data.readers import READERS
from utils.data.rows import read_rows
from utils.errors import UsageError, why

PARTS = ("test", "dev", "valid")  # 폴더에서 고르는 차례
TRAIN = "train"


def find_task(file: Path) -> Task | None:
    """KoBEST의 파일이면 어느 시험인지. 첫 행만 본다.

    Raises:
        UsageError: 첫 행을 읽을 수 없다.
    """
    first = next(_rows(file), None) if file.suffix.lower() in READERS else None
    return next((task for task in TASKS if first is not None and task.renamed(first) is not None), None)


def read_task(file: Path, task: Task) -> list[dict]:
    """시험의 행들을 hub의 열 이름으로.

    Raises:
        UsageError: 읽을 수 없거나 열이 다른 행이 있다.
    """
    rows = []
    for number, row in enumerate(_rows(file), 1):
        renamed = task.renamed(row)
        if renamed is None:
            raise UsageError(f"{file}의 {number}번째 행은 {task.title}의 문항이 아니다. 열: {', '.join(map(str, row))}")
        rows.append(renamed)
    return rows


def choose_files(folder: Path) -> dict[Task, Path]:
    """폴더에서 시험마다 고른 파일. test, dev(validation), 그 밖의 차례이고, train과 다른 데이터의 파일은 쓰지 않는다.

    Raises:
        UsageError: 쓸 파일이 없다. 이름은 시험의 것인데 읽을 수 없는 파일이 있다.
    """
    found: dict[str, tuple[tuple, Task, Path]] = {}
    unread = ""
    for file in sorted(folder.rglob("*")):
        where = file.relative_to(folder)
        part = _part(where)
        if part == TRAIN or any(name.startswith(".") for name in where.parts) or not file.is_file():
            continue
        try:
            task = find_task(file)
        except UsageError as error:
            if any(task.name in str(where).lower() for task in TASKS):
                raise
            unread = f" 읽지 못한 것: {error}"
            continue
        rank = (PARTS.index(part) if part else len(PARTS), len(where.stem), str(where))  # 작은 것을 고른다
        if task is not None and (task.name not in found or rank < found[task.name][0]):
            found[task.name] = rank, task, file
    if not found:
        raise UsageError(f"KoBEST의 파일이 없는 폴더다(학습용 train은 시험하지 않는다): {folder}. .tsv, .jsonl, "
                         f".parquet이 든 폴더를 적는다.{unread}")
    return {found[task.name][1]: found[task.name][2] for task in TASKS if task.name in found}


def _part(where: Path) -> str | None:
    """파일이 데이터의 어느 부분인지. 이름에 없으면 가까운 폴더의 이름에서 찾는다."""
    names = [where.stem.lower(), *(name.lower() for name in reversed(where.parts[:-1]))]
    return next((part for name in names for part in (TRAIN, *PARTS) if part in name), None)


def _rows(file: Path) -> Iterator[dict]:
    """파일의 행. 공개된 TSV의 글에는 감싸지 않은 큰따옴표가 있어, 엄격한 `read_csv`로 읽지 않는다."""
    if file.suffix.lower() != ".tsv":
        for _, row in read_rows(file):
            yield row
        return
    csv.field_size_limit(MAX_ROW_CHARS)
    number = 0
    try:
        with file.open(encoding=detect_encoding(file), newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream, delimiter="\t"), 1):
                values = [value for value in row.values() if isinstance(value, str)]
                if any("\t" in value and "\n" in value for value in values):
                    raise UsageError(f'{file}의 {number}번째 행에 닫히지 않은 큰따옴표(")가 있다')
                if None in row:
                    raise UsageError(f"{file}의 {number}번째 행의 칸이 열보다 많다")
                if None in row.values():
                    raise UsageError(f"{file}의 {number}번째 행의 칸이 열보다 적다(덜 받은 파일일 수 있다)")
                if all(values):  # 값이 빈 행은 hub의 것에도 없다
                    yield row
    except csv.Error as error:
        raise UsageError(f"{file}의 {number + 1}번째 행이 올바른 TSV가 아니다: {error}") from None
    except OSError as error:
        raise UsageError(f"시험의 파일을 읽지 못했다: {file} ({why(error)})") from None
