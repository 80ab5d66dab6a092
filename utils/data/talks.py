"""대화 하나를 차례대로 말한 글(`Turn`)들로: 공개된 이름만 그 뜻대로 읽고, 모르는 것은 짐작하지 않고 거절한다."""

from utils.data.texts import strip_end
from utils.errors import UsageError
from utils.turns import Turn

# 공개된 형식들이 쓰는 이름 -> 뜻
ROLES = {"system": "system", "user": "user", "human": "user",
         **dict.fromkeys(("assistant", "model", "gpt", "bot", "chatgpt"), "assistant")}

READ_KEYS = ("role", "content", "from", "value", "weight")  # 글 하나에서 읽는 것


class BadTurns(UsageError):
    """행이나 대화를 읽을 수 없다. `kind`는 데이터 검사에서의 종류다."""

    def __init__(self, message: str, kind: str = "roles"):
        super().__init__(message)
        self.kind = kind


def read_turns(messages: object) -> list[Turn]:
    """차례가 맞는 글들: (있으면) system 하나, 그 뒤로 user와 assistant가 번갈아. 마지막은 user나 assistant다.

    공개된 이름만 정해진 뜻으로 읽는다. 모르는 role, 도구의 글, 글이 아닌 content, 어긋난 차례는 짐작하지 않고 거절한다.

    Args:
        messages: {role, content}나 ShareGPT의 {from, value}의 목록. content는 글이거나 {"type": "text"} 조각의
            목록이다. assistant에는 OpenAI 미세조정 파일의 weight(0이나 1)가 있을 수 있다.

    Raises:
        BadTurns: 읽을 수 없다. 말은 "의 3번째 글의 ..."처럼 목록의 이름 뒤에 이어진다.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadTurns("가 {role, content}의 목록이 아니다. [{\"role\": \"user\", \"content\": \"...\"}, ...]로 적는다")
    if not messages:
        raise BadTurns("가 빈 목록이다. user의 질문과 assistant의 답을 적거나 그 행을 뺀다", "empty")
    turns: list[Turn] = []
    for place, message in enumerate(messages, 1):
        turn = _read_message(message, place)
        before = turns[-1].role if turns else None
        if turn.role == "system" and place > 1:
            raise BadTurns(f"의 {place}번째 글이 system이다. system은 맨 앞에 하나만 둔다")
        if turn.role == "user" and before == "user":
            raise BadTurns(f"의 {place}번째 글이 또 user다. 잇달은 질문은 하나로 합친다")
        if turn.role == "assistant" and before != "user":
            raise BadTurns(f"의 {place}번째 글이 질문 없는 답이다. 앞에 user의 질문을 두거나 잇달은 답을 하나로 합친다")
        turns.append(turn)
    if turns[-1].role == "system":
        raise BadTurns("에 system만 있고 user의 질문이 없다", "empty")
    return turns


def require_answers(turns: list[Turn]) -> list[Turn]:
    """배울 답으로 끝나는 대화인지 보고 그대로 돌려준다.

    Raises:
        BadTurns: 마지막이 답이 아니거나, 모든 답이 weight 0이다.
    """
    if turns[-1].role != "assistant":
        raise BadTurns("의 끝에 assistant의 답이 없다. 답을 적거나 그 질문을 뺀다")
    if not any(turn.role == "assistant" and turn.learned for turn in turns):
        raise BadTurns("의 답이 모두 weight 0이어서 배울 답이 없다. 행을 뺀다")
    return turns


def _read_message(message: dict, place: int) -> Turn:
    share = message.get("role") is None and message.get("from") is not None
    name_key, text_key = ("from", "value") if share else ("role", "content")
    name, content = message.get(name_key), message.get(text_key)
    if not isinstance(name, str):
        raise BadTurns(f"의 {place}번째 글에 {name_key}이 없다. system, user, assistant 가운데 하나를 적는다")
    role = ROLES.get(name)
    if role is None or message.get("tool_calls") or message.get("function_call"):
        what = f"{name_key}이 {name}" if role is None else "도구를 부르는 글"
        advice = "system으로 고친다" if name == "developer" else f"그 행을 빼거나 {', '.join(ROLES)}만 남긴다"
        raise BadTurns(f"의 {place}번째 글은 {what}이라 읽지 않는다. {advice}")
    text = join_parts(content)
    if text is not None and not isinstance(text, str):
        raise BadTurns(f"의 {place}번째 글의 {text_key}가 글이 아니다({type(content).__name__}). 따옴표로 감싼 글을 "
                       "적는다")
    text = strip_end(text or "") if role == "assistant" else text or ""
    if not text.strip():
        raise BadTurns(f"의 {place}번째 글의 {text_key}가 없거나 비었다. 글을 적거나 그 행을 뺀다", "empty")
    return Turn(role, text, _is_learned(message, role, place))


def join_parts(content: object) -> object:
    """글 조각({"type": "text", "text": ...})의 목록이면 이은 글, 아니면 받은 그대로."""
    if isinstance(content, list) and content and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content):
        return "".join(part["text"] for part in content)
    return content


def _is_learned(message: dict, role: str, place: int) -> bool:
    weight = message.get("weight")
    if weight is None:
        return True
    if role != "assistant":
        raise BadTurns(f"의 {place}번째 글은 {role}인데 weight가 있다. weight는 assistant의 글에만 적는다")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadTurns(f"의 {place}번째 글의 weight가 {weight!r}이다. 0(배우지 않는다)이나 1(배운다)을 적는다")
    return weight != 0
