"""행에서 차례대로 말한 글(`Turn`)들로: 꼴(`Form`)이 말하는 열을 읽는다."""

import json
from collections.abc import Callable
from pathlib import Path

from utils.data import preferences
from utils.data.columns import Form, choose_form
from utils.data.kobest import Task
from utils.data.talks import BadTurns, read_turns, require_answers
from utils.data.texts import SURROGATE, compose, strip_end
from utils.errors import UsageError
from utils.turns import Turn

SIDES = ("chosen", "rejected")  # 선호 쌍에서 답의 차례. 문서도 이 차례로 놓인다
KTO = ("prompt", "completion")  # label이 True인 좋은 답과 False인 나쁜 답을 함께 적는 공개된 꼴(KTO)의 열
ADVICE = "--check_data True로 모두 찾고 --repair_data로 고치거나 뺀다"


def read_row(row: dict, form: Form, number: int, source: str | Path) -> list[Turn]:
    """행 하나의 글들. 마지막은 배울 답이거나, role이 "text"인 글 하나다. 끝 토큰의 글자는 떼어 낸다.

    Raises:
        BadTurns: 행에 글이 없거나 읽을 수 없다. 파일과 행의 번호와 고치는 법을 말한다.
    """
    return _read_checked(lambda: (_read(row, form),), number, source)[0]


def read_pair(row: dict, form: Form, number: int, source: str | Path) -> tuple[list[Turn], list[Turn]]:
    """선호 쌍 하나의 (고른 답으로 끝나는 글들, 버린 답으로 끝나는 글들). 마지막 답 말고는 같고, 그것만 배운다.

    Raises:
        BadTurns: `read_row`와 같다.
    """
    def read() -> tuple[list[Turn], list[Turn]]:
        if form.exam is not None:
            return preferences.join_pair(_exam(row, form.exam), _exam(row, form.exam, wrong=1))
        return preferences.join_pair(*(_read_side(row, form, side) for side in SIDES))

    return _read_checked(read, number, source)


def require_alike(row: dict, form: Form, number: int, source: str | Path) -> None:
    """행이 파일의 꼴과 같은 종류인지 본다.

    Raises:
        UsageError: 선호 쌍과 보통 행이 한 파일에 섞여 있다.
    """
    if form.exam is not None:
        return  # 다른 행은 그 문항으로 읽다가 걸린다
    if form.is_preference:
        written = [name for name, value in row.items() if preferences.is_written(value)]
        # 한쪽 답만 빈 선호 쌍은 섞인 것이 아니다. 읽으면서 무엇이 비었는지 말한다
        mixed = not {form.columns[side] for side in SIDES} & set(written) and choose_form(written) is not None
    else:
        mixed = preferences.holds_pair(row)
    if not mixed:
        return
    kinds = ("선호 쌍", "보통 행") if form.is_preference else ("보통 행", "선호 쌍")
    raise UsageError(f"{source}에 선호 쌍과 보통 행이 섞여 있다: 앞은 {kinds[0]}인데 {number}번째는 {kinds[1]}이다. 한 "
                     "번에 하나만 배우므로 두 파일로 나누어 따로 학습한다")


def _read_checked(read: Callable[[], tuple], number: int, source: str | Path) -> tuple[list[Turn], ...]:
    """`read`가 읽은 글들의 한글을 모아쓴다. 쓸 수 없으면 어느 행인지 말한다."""
    try:
        said = read()
        for turn in (turn for turns in said for turn in turns):
            if SURROGATE.search(turn.text + turn.input):
                raise BadTurns("에 짝 없는 surrogate(\\ud800 따위)가 있어 글로 쓸 수 없다", "missing")
    except BadTurns as error:
        raise BadTurns(f"{source}의 {number}번째 행{error}. {ADVICE}", error.kind) from None
    return tuple([Turn(turn.role, compose(turn.text), turn.learned, compose(turn.input)) for turn in turns]
                 for turns in said)


def _read_side(row: dict, form: Form, side: str) -> list[Turn]:
    """선호 쌍의 한쪽: 질문의 글들에 그 답을 이은 것."""
    columns, name = form.columns, form.columns[side]
    value = unpacked(row.get(name))
    value = [value] if isinstance(value, dict) else value  # 글 하나를 {from, value}로 적었다
    if preferences.is_whole_talk(value):
        try:
            turns = preferences.read_whole_talk(value)
        except BadTurns as error:
            raise BadTurns(f"의 {name}{error}", error.kind) from None
        asked = row.get(columns.get("question"))
        if isinstance(asked, str) and asked.strip() and not any(turn.text.strip() == asked.strip() for turn in turns):
            raise BadTurns(f"의 {columns['question']} 열의 글이 {name}의 대화에 없다. 하나만 남긴다")
        return _with_system(turns, row, columns)
    answer = Form({**{meaning: name for meaning, name in columns.items() if meaning not in SIDES}, "answer": name})
    if "question" in columns:
        return _read({**row, name: value}, answer)
    if "talk" not in columns:
        raise BadTurns(f"의 {name} 열은 답뿐인데 질문의 열이 없다. prompt 열에 질문을 적는다", "missing")
    said = value if isinstance(value, list) else [{"role": "assistant", "content": value}]
    asked = unpacked(row.get(columns["talk"]))
    return _with_system(_talk([*asked, *said] if isinstance(asked, list) else asked, columns["talk"]), row, columns)


def _read(row: dict, form: Form) -> list[Turn]:
    columns = form.columns
    if form.exam is not None:
        return _exam(row, form.exam)
    if "text" in columns:
        return [Turn("text", strip_end(_text(row, columns["text"], strip=True)))]
    if "talk" in columns:
        turns = _talk(row.get(columns["talk"]), columns["talk"])
    else:
        turns = _history(row, columns.get("history")) + _pair(row, columns)
    return _with_system(turns, row, columns)


def _exam(row: dict, task: Task, wrong: int = 0) -> list[Turn]:
    """KoBEST의 문항: 시험이 묻는 글과 정답. `wrong`을 주면 정답에서 그만큼 다음의 보기."""
    try:
        asked = task.read(task.renamed(row) or row)
    except ValueError as error:
        raise BadTurns(f"을 {task.title}의 문항으로 읽을 수 없다: {error}", "missing") from None
    return [Turn("user", asked.text), Turn("assistant", asked.options[(asked.answer + wrong) % len(asked.options)])]


def _with_system(turns: list[Turn], row: dict, columns: dict[str, str]) -> list[Turn]:
    """system의 열이 있으면 앞에 둔 글들."""
    system = _optional(row, columns.get("system"))
    if system and turns[0].role == "system":
        raise BadTurns(f"의 system이 {columns['system']} 열과 대화에 모두 있다. 하나만 둔다")
    return [Turn("system", system), *turns] if system else turns


def _pair(row: dict, columns: dict[str, str]) -> list[Turn]:
    asked, answered = columns["question"], columns["answer"]
    if (asked, answered) == KTO and str(row.get("label")).strip().lower() == "false":
        raise BadTurns("의 label이 False다(나쁜 답). 나쁜 답은 따라 배우지 않도록 그 행을 뺀다", "disliked")
    if isinstance(row.get(asked), list) or isinstance(row.get(answered), list):  # 대화의 목록으로 적은 두 열
        question = row[asked] if isinstance(row.get(asked), list) else [{"role": "user", "content": row.get(asked)}]
        answer = row[answered] if isinstance(row.get(answered), list) else [
            {"role": "assistant", "content": row.get(answered)}]
        return _talk([*question, *answer], f"{asked}+{answered}")
    context = _optional(row, columns.get("input"))
    return [Turn("user", _text(row, asked), input=context), Turn("assistant", _text(row, answered, strip=True))]


def _talk(value: object, name: str) -> list[Turn]:
    try:
        return require_answers(read_turns(unpacked(value)))
    except BadTurns as error:
        raise BadTurns(f"의 {name}{error}", error.kind) from None


def _history(row: dict, name: str | None) -> list[Turn]:
    """앞서 주고받은 [[질문, 답], ...]. 없으면 비어 있다."""
    value = unpacked(row.get(name)) if name else None
    if value is None or value == [] or _is_nan(value) or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
            for pair in value):
        raise BadTurns(f"의 {name} 열이 [[질문, 답], ...]의 꼴이 아니다")
    if not all(text.strip() for pair in value for text in pair):
        raise BadTurns(f"의 {name} 열에 빈 글이 있다. 글을 적거나 그 짝을 뺀다", "empty")
    return [Turn(role, strip_end(text) if role == "assistant" else text) for pair in value
            for role, text in zip(("user", "assistant"), pair, strict=True)]


def _text(row: dict, name: str, strip: bool = False) -> str:
    value = row.get(name)
    if value is not None and not isinstance(value, str) and not _is_nan(value):
        raise BadTurns(f"의 {name} 열이 글이 아니다({type(value).__name__}). 따옴표로 감싼 글을 적는다", "missing")
    text = value if isinstance(value, str) else ""
    text = strip_end(text) if strip else text
    if not text.strip():
        raise BadTurns(f"의 {name} 열이 없거나 비었다. 글을 적거나 그 행을 뺀다",
                       "empty" if isinstance(value, str) else "missing")
    return text


def _optional(row: dict, name: str | None) -> str:
    """있으면 쓰는 열의 글. 빈 칸은 없는 것과 같다."""
    value = row.get(name) if name else None
    if value is None or _is_nan(value):
        return ""
    if not isinstance(value, str):
        raise BadTurns(f"의 {name} 열이 글이 아니다({type(value).__name__}). 글을 적거나 비워 둔다", "missing")
    return value if value.strip() else ""


def unpacked(value: object) -> object:
    """CSV나 엑셀의 칸에 JSON으로 적은 목록이면 푼 것, 아니면 그대로."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and value != value
