"""데이터의 행에서 (질문, 답) 조각으로. 형식을 따로 적지 않아도 열 이름이 형식을 정한다."""

from collections.abc import Callable, Iterator
from pathlib import Path

from utils import hub
from utils.data.readers import READERS, BadRow
from utils.data.talks import BadTurns, read_turns, require_answers
from utils.data.texts import SURROGATE, compose, strip_end
from utils.errors import UsageError
from utils.paths import looks_like_hub_id

SUFFIXES = tuple(READERS)
DOWNLOAD_KOALPACA = "python ko-datasets/download-koalpaca.py"
FORMS = ("text", "instruction(+input)+output|response", "prompt+completion", "messages")
Pieces = list[tuple[str, str]]


class Unlearned(tuple):
    """앞선 대화로 읽기만 하고 답을 배우지 않는 (프롬프트, 답)."""


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


def clean(text: str, number: int, source: str | Path) -> str:
    """풀어쓴 한글(NFD)을 모아쓰고, 글자가 될 수 없는 값이 있으면 거절한다."""
    if SURROGATE.search(text):
        raise UsageError(f"{source}의 {number}번째 행에 짝 없는 surrogate(\\ud800 따위)가 있어 글로 쓸 수 없다")
    return compose(text)


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
        turns = require_answers(read_turns(row.get("messages")))
    except BadTurns as error:
        advice = "--check_data True로 모두 찾고 --repair_data로 뺀다"
        raise BadTurns(f"{source}의 {number}번째 행의 messages{error}. {advice}", error.kind) from None
    pieces: Pieces = []
    system = question = ""
    for turn in turns:
        text = clean(turn.text, number, source)
        if turn.role == "system":
            system = f"{text}\n\n"
        elif turn.role == "user":
            question, system = system + text, ""
        else:
            piece = prompter.pieces(question, "", text)
            pieces.append(piece if turn.learned else Unlearned(piece))
    return pieces
