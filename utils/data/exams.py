"""시험 문항: KoBEST의 다섯 시험과, 사용자가 고른 파일의 행. 어느 시험인지는 열 이름이 정한다."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.data.columns import Form, require_form
from utils.data.dataset import say_row
from utils.data.forms import ADVICE, read_row, unpacked
from utils.data.kobest import KOBEST_HUB, TASKS, Task, is_on_hub
from utils.data.kobest_files import choose_files, find_task, read_task
from utils.data.preferences import plain
from utils.data.rows import fetch, read_rows
from utils.data.talks import BadTurns
from utils.data.texts import compose, strip_end
from utils.errors import UsageError
from utils.turns import Pieces, Turn

OPTIONS = ("options", "choices", "보기")  # 사용자의 행에서 보기들이 든 열
_ONE_OPTION = re.compile(r"(?:보기|선택지|선지|option|choice)_?(?:\d+|[①-⑩a-e])|[a-e]")  # 보기 하나씩의 열: 보기1, A
MARKS = "\n|;/,"  # 표의 한 칸에 적은 보기들을 가르는 것. 앞의 것부터 본다


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
    """시험 하나.

    Attributes:
        by_length: 로그 가능도를 보기의 글자 수로 나눈 점수도 낸다.
        source: KoBEST면 문항이 든 파일이나 hub의 이름. dev와 test의 성적을 가려 읽게 기록에 남긴다.
    """

    name: str
    title: str
    items: list[Item]
    by_length: bool = False
    source: str = ""


def is_kobest(name: str) -> bool:
    """KoBEST인지: hub에서 받는 이름이거나, 폴더이거나, KoBEST의 파일 하나다."""
    return is_on_hub(name) or Path(name).is_dir() or (Path(name).is_file() and find_task(Path(name)) is not None)


def load_exams(name: str, prompter, cache_dir: str | None = None) -> list[Exam]:
    """`--eval`이나 `--eval_task`에 적힌 시험들.

    Args:
        name: 폴더면 그 안의 KoBEST 파일들, 파일이면 KoBEST의 파일 하나이거나 사용자의 행이고, 그런 이름의 폴더가 없는
            "kobest"나 "skt/kobest_v1"이면 hub의 test 부분이다.
        prompter: 물을 글을 프롬프트로 바꾸는 것. None이면 글을 그대로 쓴다(lm-evaluation-harness와 같다).

    Raises:
        UsageError: 없거나, 아는 열이 없거나, 정답이 보기에 없다.
    """
    path = Path(name)
    if is_on_hub(name) and not path.exists():
        return [make_exam(task, fetch(KOBEST_HUB, "test", cache_dir, task.name), prompter, KOBEST_HUB)
                for task in TASKS]
    if path.is_dir():
        return [make_exam(task, read_task(file, task), prompter, file) for task, file in choose_files(path).items()]
    if not path.is_file():
        raise UsageError(f"시험이 없다: {name}. kobest, KoBEST의 파일이 든 폴더, 내 행의 파일 가운데 하나를 적는다")
    if (task := find_task(path)) is not None:
        return [make_exam(task, read_task(path, task), prompter, path)]
    return [Exam(path.name, path.name, _own_items(name, prompter))]


def make_exam(task: Task, rows: Iterable[dict], prompter, source: str | Path) -> Exam:
    """행들로 만든 시험 하나.

    Raises:
        UsageError: 열이 비었거나 정답이 보기의 번호가 아니다. 행의 번호를 말한다.
    """
    items = []
    for number, row in enumerate(rows, 1):
        try:
            read = task.read(row)
        except ValueError as error:
            raise UsageError(f"{source}의 {number}번째 {task.title} 문항을 읽을 수 없다: {error}") from None
        if prompter is None:
            items.append(Item(read.options, read.answer, text=read.text))
        else:
            items.append(_choice([Turn("user", read.text)], read.options, read.answer, number, source, prompter))
    return Exam(task.name, f"KoBEST {task.title}", items, task.by_length, Path(source).name)


def _choice(before: list[Turn], options: tuple[str, ...], answer: int, number: int, source: str | Path,
            prompter) -> Item:
    """앞의 글들 다음에 보기를 답으로 하나씩 적어 본 문항."""
    asked = tuple(say_row(prompter, [*before, Turn("assistant", option)], number, source)[1][-1] for option in options)
    return Item(options, answer, asked)


def _own_items(source: str, prompter) -> list[Item]:
    """사용자의 행들. 학습 데이터와 같은 열이고, 첫 행의 열이 꼴을 정한다.

    Raises:
        UsageError: 질문과 답의 행이 아니다. 보기에 정답이 없다. 어느 행인지 말한다.
    """
    items, form = [], None
    for number, row in read_rows(source):
        form = form or _own_form(row, source)
        try:
            items.append(_own_item(row, form, number, source, prompter))
        except BadTurns as error:  # 고치는 플래그는 학습의 것이다
            raise UsageError(str(error).removesuffix(f". {ADVICE}")) from None
    return items


def _own_form(row: dict, source: str) -> Form:
    apart = [str(name) for name in row if _ONE_OPTION.fullmatch(plain(str(name)))]
    if len(apart) > 1:
        raise UsageError(f"{source}의 보기가 여러 열({', '.join(apart)})에 나뉘어 있다. {OPTIONS[0]} 열 하나에 "
                         "`긍정|부정`이나 목록으로 적고, 정답의 열에는 고른 보기의 글을 적는다")
    form = require_form([name for name in row if plain(str(name)) not in OPTIONS], source)
    if form.is_preference:
        raise UsageError(f"{source}의 행은 선호 쌍이라 시험이 되지 않는다. 질문과 답을 적는다")
    return form


def _own_item(row: dict, form: Form, number: int, source: str, prompter) -> Item:
    """사용자의 행 하나. 보기의 열이 있으면 정답이 그 가운데 하나다."""
    listed = next((name for name in row if plain(str(name)) in OPTIONS and row[name] not in (None, "")), None)
    rest = {name: value for name, value in row.items() if plain(str(name)) not in OPTIONS}
    said = read_row(rest, form, number, source)
    turns, documents = say_row(prompter, said, number, source)
    whole = documents[-1]
    if not whole[0][0].strip():
        raise UsageError(f"{source}의 {number}번째 행은 질문이 없는 글이라 시험이 되지 않는다")
    if listed is None:
        right = turns[-1].text if turns[-1].role == "assistant" else whole[-1][1]
        return Item((right.strip(),), 0, (whole,))
    options, right = _read_options(row[listed]), said[-1].text.strip()
    if said[-1].role != "assistant" or right not in options:
        raise UsageError(f"{source}의 {number}번째 행의 {listed} 열이 서로 다른 글의 목록이 아니거나 거기에 "
                         f"정답({right[:40]})이 없다")
    return _choice(said[:-1], options, options.index(right), number, source, prompter)


def _read_options(value: object) -> tuple[str, ...]:
    """보기들. 서로 다른 글 둘 이상의 목록이거나 그것을 `긍정|부정`처럼 적은 글이 아니면 비어 있다."""
    listed = unpacked(value)
    if isinstance(listed, str):
        mark = next((mark for mark in MARKS if mark in listed), None)
        listed = mark and listed.split(mark)
    if not isinstance(listed, list) or not all(isinstance(each, str) and each.strip() for each in listed):
        return ()
    options = tuple(compose(strip_end(each)).strip() for each in listed)
    return options if len(set(options)) == len(options) > 1 else ()
