"""시험 문항: KoBEST의 다섯 시험과, 사용자가 고른 파일의 행. 어느 시험인지는 열 이름이 정한다."""

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.data.dataset import say_row
from utils.data.forms import read_row, require_form
from utils.data.readers import READERS, detect_encoding
from utils.data.rows import fetch, read_rows
from utils.errors import UsageError
from utils.turns import Pieces, Turn

KOBEST, KOBEST_HUB = "kobest", "skt/kobest_v1"
OPTIONS = "options"  # 사용자의 행에서 보기들이 든 열
FALSE_WORDS = ("False", "false", "0", "아니오")


@dataclass(frozen=True)
class Item:
    """문항 하나.

    Attributes:
        options: 보기들. 정답과 똑같이 답하는지를 보는 문항이면 정답 하나뿐이다.
        answer: 정답인 보기의 번호. 0부터.
        asked: 보기마다, 그 보기를 답으로 적은 행의 조각들. 학습 데이터의 행과 같은 길로 만든다.
        text: 템플릿 없이 물으면 보기가 이어질 글. 그때 `asked`는 비어 있다.
    """

    options: tuple[str, ...]
    answer: int
    asked: tuple[Pieces, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Exam:
    """시험 하나. `by_length`면 로그 가능도를 보기의 글자 수로 나눈 점수도 낸다."""

    name: str
    title: str
    items: list[Item]
    by_length: bool = False


@dataclass(frozen=True)
class Task:
    """KoBEST의 시험 하나를 읽는 법. 글의 모양은 lm-evaluation-harness의 kobest 과제와 같다.

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


_ENDINGS = ("ending_1", "ending_2", "ending_3", "ending_4")
_BECAUSE = {"원인": "왜냐하면", "결과": "그래서"}
TASKS = (
    Task("boolq", "BoolQ", ("paragraph", "question", "label"), ("Text", "Question", "Answer"),
         lambda row: f"{row['paragraph']} 질문: {row['question']} 답변: ", lambda row: ("아니오", "예")),
    Task("copa", "COPA", ("premise", "question", "alternative_1", "alternative_2", "label"),
         ("sentence", "question", "1", "2", "Answer"),
         lambda row: f"{row['premise']}  {_BECAUSE[row['question'].strip()]}",
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


def is_kobest(name: str) -> bool:
    """hub에서 받는 KoBEST의 이름인지."""
    return name in (KOBEST, KOBEST_HUB)


def load_exams(name: str, prompter, cache_dir: str | None = None) -> list[Exam]:
    """`--eval`이나 `--eval_task`에 적힌 시험들.

    Args:
        name: "kobest"나 "skt/kobest_v1"이면 hub의 test 부분, 폴더면 그 안의 KoBEST 파일들, 파일이면 사용자의 행이다.
        prompter: 물을 글을 프롬프트로 바꾸는 것. None이면 글을 그대로 쓴다(lm-evaluation-harness와 같다).

    Raises:
        UsageError: 없거나, 아는 열이 없거나, 정답이 보기에 없다.
    """
    if is_kobest(name):
        return [make_exam(task, fetch(KOBEST_HUB, "test", cache_dir, task.name), prompter, KOBEST_HUB)
                for task in TASKS]
    if Path(name).is_dir():
        return _from_folder(Path(name), prompter)
    if not Path(name).is_file():
        raise UsageError(f"시험이 없다: {name}. kobest, KoBEST의 파일이 든 폴더, 내 행의 파일 가운데 하나를 적는다")
    return [_from_file(name, prompter)]


def make_exam(task: Task, rows: Iterable[dict], prompter, source: str | Path) -> Exam:
    """행들로 만든 시험 하나.

    Raises:
        UsageError: 열이 비었거나 정답이 보기의 번호가 아니다. 행의 번호를 말한다.
    """
    items = []
    for number, row in enumerate(rows, 1):
        try:
            answer = _number(row[task.columns[-1]])
            options = task.options(row)
            if not 0 <= answer < len(options):
                raise ValueError(f"정답 {answer}")
            text = task.ask(row)
        except (KeyError, ValueError, AttributeError) as error:
            raise UsageError(f"{source}의 {number}번째 {task.title} 문항을 읽을 수 없다: {error}") from None
        if prompter is None:
            items.append(Item(options, answer, text=text))
        else:
            rows_asked = ({"instruction": text, "output": option} for option in options)
            items.append(Item(options, answer, tuple(_pieces(asked, number, source, prompter) for asked in rows_asked)))
    return Exam(task.name, f"KoBEST {task.title}", items, task.by_length)


def _pieces(row: dict, number: int, source: str | Path, prompter) -> Pieces:
    return _said(row, number, source, prompter)[1]


def _said(row: dict, number: int, source: str | Path, prompter) -> tuple[list[Turn], Pieces]:
    """행의 글들과, 그 조각들. 여러 번 주고받은 행이면 마지막 답까지다."""
    turns, documents = say_row(prompter, read_row(row, require_form(row, source), number, source), number, source)
    return turns, documents[-1]


def _number(label: object) -> int:
    """정답의 번호. 참과 거짓은 1과 0이다."""
    text = str(label).strip()
    return 0 if text in FALSE_WORDS else 1 if text in ("True", "true") else int(text)


def _from_folder(folder: Path, prompter) -> list[Exam]:
    """폴더 안의 KoBEST 파일들. 시험마다 test, dev(validation), 그 밖의 차례로 하나를 고르고 train은 쓰지 않는다."""
    found: dict[str, tuple[tuple, Path, list[dict]]] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in (".tsv", *READERS) or "train" in file.stem.lower():
            continue
        part = read_task(file)
        if part is None:
            continue
        task, rows = part
        stem = file.stem.lower()
        part_of = 0 if "test" in stem else 1 if "dev" in stem or "valid" in stem else 2
        rank = (part_of, len(stem), stem)  # 작은 것을 고른다: test, 검증, 나머지. 그다음은 짧은 이름
        if task.name not in found or rank < found[task.name][0]:
            found[task.name] = rank, file, rows
    if not found:
        raise UsageError(f"KoBEST의 파일이 없는 폴더다: {folder}. .tsv, .jsonl, .parquet이 든 폴더를 적는다")
    chosen = [(task, *found[task.name]) for task in TASKS if task.name in found]
    return [make_exam(task, rows, prompter, file) for task, _, file, rows in chosen]


def read_task(file: Path) -> tuple[Task, list[dict]] | None:
    """KoBEST의 파일이면 (어느 시험인지, hub의 열 이름으로 고친 행들). 다른 파일이면 None."""
    rows = list(_rows(file))
    task = next((task for task in TASKS if rows and _renamed(task, rows[0]) is not None), None)
    return None if task is None else (task, [_renamed(task, row) for row in rows])


def _rows(file: Path) -> Iterator[dict]:
    if file.suffix.lower() != ".tsv":
        for _, row in read_rows(file):
            yield row
        return
    with file.open(encoding=detect_encoding(file), newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t"):
            if all(value not in (None, "") for value in row.values()):  # 값이 빈 행은 hub의 것에도 없다
                yield row


def _renamed(task: Task, row: dict) -> dict | None:
    """hub의 열 이름으로 고친 행. 이 시험의 행이 아니면 None이다."""
    if row.keys() >= set(task.columns):
        return row
    if row.keys() >= set(task.in_tsv):
        renamed = {name: row[old] for name, old in zip(task.columns, task.in_tsv, strict=True)}
        label = renamed[task.columns[-1]]
        return {**renamed, task.columns[-1]: str(int(label) - task.first) if task.first else label}
    return None


def _from_file(name: str, prompter) -> Exam:
    """사용자의 행. 학습 데이터와 같은 열이고, options 열이 있으면 정답이 그 가운데 하나다."""
    items = []
    for number, row in read_rows(name):
        options = row.pop(OPTIONS, None)
        turns, whole = _said(row, number, name, prompter)
        if options is None:
            right = turns[-1].text if turns[-1].role == "assistant" else whole[-1][1]
            items.append(Item((right.strip(),), 0, (whole,)))
            continue
        columns = require_form(row, name).columns
        column = columns.get("answer", next(iter(columns.values())))
        right = row[column]
        if not isinstance(options, list) or right not in options or not all(isinstance(each, str) for each in options):
            raise UsageError(f"{name}의 {number}번째 행의 {OPTIONS}가 정답({str(right)[:40]})이 든 글의 목록이 아니다")
        asked = tuple(_pieces({**row, column: option}, number, name, prompter) for option in options)
        items.append(Item(tuple(options), options.index(right), asked))
    return Exam(Path(name).stem, Path(name).name, items)
