"""데이터의 행에서 (질문, 답) 조각으로. 형식을 따로 적지 않아도 열 이름이 형식을 정한다."""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from utils import hub
from utils.data.readers import END_TOKEN, READERS, BadRow
from utils.errors import UsageError
from utils.paths import looks_like_hub_id

SUFFIXES = tuple(READERS)
DOWNLOAD_KOALPACA = "python ko-datasets/download-koalpaca.py"
FORMS = ("text", "instruction(+input)+output|response", "prompt+completion", "messages")
_JAMO = re.compile("[\u1100-\u11ff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
Pieces = list[tuple[str, str]]
# 공개된 형식들이 쓰는 이름 -> 뜻
ROLES = {"system": "system", "user": "user", "human": "user",
         **dict.fromkeys(("assistant", "model", "gpt", "bot", "chatgpt"), "assistant")}


class Unlearned(tuple):
    """앞선 대화로 읽기만 하고 답을 배우지 않는 (프롬프트, 답)."""


@dataclass(frozen=True)
class Turn:
    """질문과 답 한 번. `learned`가 False면 답을 배우지 않는다(weight 0)."""

    question: str
    answer: str
    learned: bool = True


class BadTurns(UsageError):
    """대화를 읽을 수 없다. `kind`는 데이터 검사에서의 종류다."""

    def __init__(self, message: str, kind: str = "roles"):
        super().__init__(message)
        self.kind = kind


def read_rows(data_path: str | Path, cache_dir: str | None = None,
              on_bad: BadRow | None = None) -> Iterator[tuple[int, dict]]:
    """(행 번호, 열 -> 값)을 하나씩 준다. 번호는 1부터이고, 줄마다 객체가 하나인 파일에서는 줄 번호다.

    Args:
        on_bad: 주면 읽을 수 없는 행을 (번호, 이유)으로 알리고 건너뛴다.

    Raises:
        UsageError: 파일이 없거나 비었다. `on_bad`가 없으면 형식이 깨진 첫 행의 번호도 말한다.
    """
    path, empty = Path(data_path), True
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"읽을 수 없는 데이터 형식이다: {path} (쓸 수 있는 형식: {', '.join(SUFFIXES)})")
        try:
            for number, row in READERS[path.suffix.lower()](path, on_bad):
                empty = False
                if isinstance(row, dict):
                    yield number, row
                elif on_bad is None:
                    raise UsageError(f"{path}의 {number}번째 행이 객체({{...}})가 아니다")
                else:
                    on_bad(number, f"{number}번째 행이 객체({{...}})가 아니다")
        except OSError as error:
            raise UsageError(f"데이터 파일을 읽지 못했다: {path} ({error.strerror or error})") from None
    else:
        for number, row in enumerate(load_hub(str(data_path), cache_dir), 1):
            empty = False
            yield number, row
    if empty:
        raise UsageError(f"데이터가 비었다: {data_path}")


def require_data(data_path: str | Path) -> None:
    """데이터 파일이 있는지 본다. 없으면 받거나 만드는 명령을 말한다."""
    path = Path(data_path)
    if path.is_dir():
        raise UsageError(f"데이터로 폴더를 적었다: {path}. 그 안의 파일({', '.join(SUFFIXES)}) 하나를 적는다")
    if not path.is_file() and (path.suffix.lower() in SUFFIXES or not looks_like_hub_id(data_path)):
        raise UsageError(f"데이터 파일이 없다: {data_path}. KoAlpaca를 받는 명령: {DOWNLOAD_KOALPACA}")


def load_hub(name: str, cache_dir: str | None = None):
    """hub의 데이터를 받아 `datasets.Dataset`(디스크에 둔 행)으로 돌려준다. train 부분만 쓴다.

    Raises:
        UsageError: 없거나, 로그인이 필요하거나, 인터넷이 끊겼거나, 받다가 그쳤다.
    """
    import datasets

    require_data(name)
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, split="train", cache_dir=cache_dir)
    except Exception as error:  # hub의 오류는 종류가 많고 모두 사용자가 고칠 일이다
        raise hub.refusal("데이터를", name, error, cache_dir, data=True) from None


def segmenter(columns: set[str], prompter, source: str | Path) -> Callable[[int, dict], Pieces]:
    """열 이름을 보고 행을 [(프롬프트, 답), ...] 조각으로 바꾸는 함수를 고른다. 끝 토큰은 답에 들지 않는다.

    돌려주는 함수는 (행 번호, 행)을 받고, 행에 글이 없으면 파일과 번호를 담은 UsageError를 올린다.

    Raises:
        UsageError: 아는 형식의 열이 없다. 있는 열의 이름을 말한다.
    """
    names = choose_columns(columns)
    if names == ("messages",):
        return lambda number, row: _from_messages(row, number, prompter, source)
    if names == ("text",):
        def from_text(number: int, row: dict) -> Pieces:
            text = strip_end(_field(row, "text", number, source))
            prompt, answer = prompter.split(text) or ("", text)
            return [(prompt, _require(answer, "text의 답", number, source))]
        return from_text
    if names:
        question, answer = names

        def from_fields(number: int, row: dict) -> Pieces:
            extra = row.get("input") if question == "instruction" else None
            if extra is not None and not isinstance(extra, str):
                raise UsageError(f"{source}의 {number}번째 행의 input이 글이 아니다({type(extra).__name__})")
            output = _require(strip_end(_field(row, answer, number, source)), answer, number, source)
            return [prompter.pieces(_field(row, question, number, source), clean(extra or "", number, source), output)]
        return from_fields
    found = ", ".join(sorted(map(str, columns))) or "없음"
    raise UsageError(f"{source}의 열을 알 수 없다: {found}. 쓸 수 있는 열: {' / '.join(FORMS)}")


def choose_columns(columns: set[str]) -> tuple[str, ...]:
    """쓸 열의 이름. (질문, 답)이거나 ("messages",)이거나 ("text",)이고, 아는 형식이 없으면 ()다."""
    for names in (("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("messages",),
                  ("text",)):
        if columns.issuperset(names):
            return names
    return ()


def strip_end(text: str) -> str:
    """글 끝의 끝 토큰 글자를 뗀다. 끝 토큰은 토큰을 만들 때 한 번만 붙인다."""
    while (stripped := text.rstrip()).endswith(END_TOKEN):
        text = stripped.removesuffix(END_TOKEN)
    return text


def clean(text: str, number: int, source: str | Path) -> str:
    """풀어쓴 한글(NFD)을 모아쓰고, 글자가 될 수 없는 값이 있으면 거절한다."""
    if _SURROGATE.search(text):
        raise UsageError(f"{source}의 {number}번째 행에 짝 없는 surrogate(\\ud800 따위)가 있어 글로 쓸 수 없다")
    return compose(text)


def compose(text: str) -> str:
    """풀어쓴 한글(NFD)만 모아쓴다. 토크나이저는 모아쓴 한글로 배웠다."""
    if unicodedata.is_normalized("NFC", text) or not _JAMO.search(text):
        return text
    return unicodedata.normalize("NFC", text)


def _field(row: dict, name: str, number: int, source: str | Path) -> str:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{source}의 {number}번째 행의 {name}이 글이 아니다({type(value).__name__})")
    return clean(_require(value or "", name, number, source), number, source)


def _require(text: str, name: str, number: int, source: str | Path) -> str:
    if not text.strip():
        raise UsageError(f"{source}의 {number}번째 행에 {name}이 없거나 비었다. "
                         "--check_data True로 모두 찾고 --repair_data로 고칠 수 있다")
    return text


def _from_messages(row: dict, number: int, prompter, source: str | Path) -> Pieces:
    try:
        turns, waiting = read_turns(row.get("messages"))
        if waiting is not None or not turns:
            raise BadTurns("의 끝에 assistant의 답이 없다. 답을 적거나 그 질문을 뺀다")
        if not any(turn.learned for turn in turns):
            raise BadTurns("의 답이 모두 weight 0이어서 배울 답이 없다. 행을 뺀다")
    except BadTurns as error:
        advice = "--check_data True로 모두 찾고 --repair_data로 뺀다"
        raise BadTurns(f"{source}의 {number}번째 행의 messages{error}. {advice}", error.kind) from None
    pieces: Pieces = []
    for turn in turns:
        question, answer = (clean(text, number, source) for text in (turn.question, turn.answer))
        piece = prompter.pieces(question, "", answer)
        pieces.append(piece if turn.learned else Unlearned(piece))
    return pieces


def read_turns(messages: object) -> tuple[list[Turn], str | None]:
    """(질문과 답의 짝들, 답을 기다리는 마지막 질문 또는 None). 맨 앞의 system은 첫 질문의 앞에 붙는다.

    공개된 이름만 정해진 뜻으로 읽는다. 모르는 role, 도구의 글, 글이 아닌 content, 어긋난 차례는 짐작하지 않고 거절한다.

    Args:
        messages: {role, content}의 목록. assistant에는 OpenAI 미세조정 파일의 weight(0이나 1)가 있을 수 있다.

    Raises:
        BadTurns: 읽을 수 없다. 말은 "의 3번째 글의 ..."처럼 목록의 이름 뒤에 이어진다.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadTurns("가 {role, content}의 목록이 아니다")
    turns: list[Turn] = []
    system, question = "", None
    for place, message in enumerate(messages, 1):
        role, content = _read_message(message, place)
        if role == "system":
            if place > 1:
                raise BadTurns(f"의 {place}번째 글이 system이다. system은 맨 앞에 하나만 둔다")
            system = f"{content}\n\n"
        elif role == "user":
            if question is not None:
                raise BadTurns(f"의 {place}번째 글이 또 user다. 잇달은 질문은 하나로 합친다")
            question, system = system + content, ""
        elif question is None:
            raise BadTurns(f"의 {place}번째 글이 질문 없는 답이다. 앞에 user의 질문을 두거나 잇달은 답을 하나로 합친다")
        else:
            turns.append(Turn(question, content, _weight(message, place) != 0))
            question = None
    if system:
        raise BadTurns("에 system만 있고 user의 질문이 없다", "empty")
    return turns, question


def _read_message(message: dict, place: int) -> tuple[str, str]:
    """글 하나의 (system이나 user나 assistant, 글)."""
    if not isinstance(message.get("role"), str):
        raise BadTurns(f"의 {place}번째 글에 role이 없다")
    role, content = ROLES.get(message["role"]), message.get("content")
    if role is None or message.get("tool_calls") or message.get("function_call"):
        what = f"role이 {message['role']}" if role is None else "도구를 부르는 글"
        raise BadTurns(f"의 {place}번째 글은 {what}이라 읽지 않는다. 그 행을 빼거나 {', '.join(ROLES)}만 남긴다")
    if content is not None and not isinstance(content, str):
        raise BadTurns(f"의 {place}번째 글의 content가 글이 아니다({type(content).__name__})")
    content = strip_end(content or "") if role == "assistant" else content or ""
    if not content.strip():
        raise BadTurns(f"의 {place}번째 글의 content가 없거나 비었다", "empty")
    if role != "assistant" and message.get("weight") is not None:
        raise BadTurns(f"의 {place}번째 글은 {role}인데 weight가 있다. weight는 assistant의 글에만 적는다")
    return role, content


def _weight(message: dict, place: int) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadTurns(f"의 {place}번째 글의 weight가 {weight!r}이다. 0(배우지 않는다)이나 1(배운다)을 적는다")
    return weight
