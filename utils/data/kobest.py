"""KoBEST의 다섯 시험을 읽는다. 어느 시험인지는 열 이름이 정한다: hub의 열이나, 저장소에서 받은 TSV의 열."""

import contextlib
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.data.encoding import MAX_ROW_CHARS, detect_encoding
from utils.data.readers import READERS
from utils.data.rows import read_rows
from utils.errors import UsageError, why

KOBEST, KOBEST_HUB = "kobest", "skt/kobest_v1"
WORDS = {"true": 1, "false": 0}  # 정답을 참과 거짓으로 적은 것
PARTS = ("test", "dev", "valid")  # 폴더에서 고르는 차례
TRAIN = "train"


def is_on_hub(name: str) -> bool:
    """hub에서 받는 KoBEST의 이름인지."""
    return name in (KOBEST, KOBEST_HUB)


@dataclass(frozen=True)
class Asked:
    """템플릿 없이 물을 글, 보기들, 정답인 보기의 번호(0부터)."""

    text: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """시험 하나를 읽는 법. 글의 모양은 lm-evaluation-harness의 kobest 과제와 같다.

    Attributes:
        columns: hub의 열 이름들. 마지막이 정답이다.
        in_tsv: 저장소에서 내려받은 TSV의 열 이름들. `columns`와 같은 차례다.
        ask: 행에서 물을 글.
        options: 행에서 보기들.
        first: TSV의 정답이 세기 시작하는 수.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    in_tsv: tuple[str, ...]
    ask: Callable[[dict], str]
    options: Callable[[dict], tuple[str, ...]]
    first: int = 0
    by_length: bool = False

    def read(self, row: dict) -> Asked:
        """hub의 열 이름으로 적힌 행에서 물을 것.

        Raises:
            ValueError: 정답이 아닌 열이 비었거나, 정답이 보기의 번호가 아니다.
        """
        for name in self.columns[:-1]:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f"{name} 열이 글이 아니거나 비었다")
        text, options, label = self.ask(row), self.options(row), str(row[self.columns[-1]]).strip()
        answer = options.index(label) if label in options else _number(label)
        if not 0 <= answer < len(options):
            raise ValueError(f"정답({label})이 보기의 번호가 아니다")
        return Asked(text, options, answer)

    def renamed(self, row: dict) -> dict | None:
        """hub의 열 이름으로 고친 행. 이 시험의 행이 아니면 None이다."""
        if row.keys() >= set(self.columns):
            return row
        if not row.keys() >= set(self.in_tsv):
            return None
        renamed = {name: row[old] for name, old in zip(self.columns, self.in_tsv, strict=True)}
        with contextlib.suppress(ValueError):  # 번호가 아닌 정답은 물을 것을 읽을 때 말한다
            renamed[self.columns[-1]] = _number(renamed[self.columns[-1]]) - self.first
        return renamed


def _because(question: str) -> str:
    """COPA에서 묻는 것(원인이나 결과)을 잇는 말."""
    words = {"원인": "왜냐하면", "결과": "그래서"}
    if question.strip() not in words:
        raise ValueError(f"question 열이 {', '.join(words)} 가운데 하나가 아니다({question[:40]})")
    return words[question.strip()]


def _number(label: object) -> int:
    """정답으로 적힌 수. 참과 거짓은 1과 0이다.

    Raises:
        ValueError: 정수가 아니다.
    """
    text = str(label).strip()
    with contextlib.suppress(ValueError):
        number = float(WORDS.get(text.lower(), text))
        if number.is_integer():
            return int(number)
    raise ValueError(f"정답({text[:40]})이 보기의 번호가 아니다")


_ENDINGS = ("ending_1", "ending_2", "ending_3", "ending_4")
TASKS = (
    Task("boolq", "BoolQ", ("paragraph", "question", "label"), ("Text", "Question", "Answer"),
         lambda row: f"{row['paragraph']} 질문: {row['question']} 답변: ", lambda row: ("아니오", "예")),
    Task("copa", "COPA", ("premise", "question", "alternative_1", "alternative_2", "label"),
         ("sentence", "question", "1", "2", "Answer"),
         lambda row: f"{row['premise']}  {_because(row['question'])}",
         lambda row: (row["alternative_1"], row["alternative_2"]), first=1),
    Task("hellaswag", "HellaSwag", ("context", *_ENDINGS, "label"),
         ("context", "choice1", "choice2", "choice3", "choice4", "label"),
         lambda row: f"문장: {row['context']}", lambda row: tuple(row[name] for name in _ENDINGS), by_length=True),
    Task("sentineg", "SentiNeg", ("sentence", "label"), ("Text", "Label"),
         lambda row: f"문장: {row['sentence']} 긍부정:", lambda row: ("부정", "긍정")),
    Task("wic", "WiC", ("word", "context_1", "context_2", "label"), ("Target", "SENTENCE1", "SENTENCE2", "ANSWER"),
         lambda row: (f"문장1: {row['context_1']} 문장2: {row['context_2']} "
                      f"두 문장에서 {row['word']}가 같은 뜻으로 쓰였나?"), lambda row: ("아니오", "예")),
)


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
    problem = UsageError(f"KoBEST의 파일이 없는 폴더다: {folder}. .tsv, .jsonl, .parquet이 든 폴더를 적는다")
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
            problem = error
            continue
        rank = (PARTS.index(part) if part else len(PARTS), len(where.stem), str(where))  # 작은 것을 고른다
        if task is not None and (task.name not in found or rank < found[task.name][0]):
            found[task.name] = rank, task, file
    if not found:
        raise problem
    return {found[task.name][1]: found[task.name][2] for task in TASKS if task.name in found}


def _part(where: Path) -> str | None:
    """파일이 데이터의 어느 부분인지. 이름에 없으면 가까운 폴더의 이름에서 찾는다."""
    names = [where.stem.lower(), *(name.lower() for name in reversed(where.parts[:-1]))]
    return next((part for name in names for part in (TRAIN, *PARTS) if part in name), None)


def _rows(file: Path) -> Iterator[dict]:
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
                if len(values) == len(row) and all(values):  # 값이 빈 행은 hub의 것에도 없다
                    yield row
    except csv.Error as error:
        raise UsageError(f"{file}의 {number + 1}번째 행이 올바른 TSV가 아니다: {error}") from None
    except OSError as error:
        raise UsageError(f"시험의 파일을 읽지 못했다: {file} ({why(error)})") from None
