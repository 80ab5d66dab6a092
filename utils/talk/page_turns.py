"""페이지의 대화 하나: 브라우저가 들고 있다가 물을 때마다 보내는 말들. 서버에는 남지 않는다."""

import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from utils.errors import UsageError
from utils.talk.guard import MAX_CHARS, check_text
from utils.turns import Turn

EMPTY_ANSWER = "(빈 답)"
MAX_SAID = 400  # 말의 수
MAX_TALK = 8 * MAX_CHARS  # 대화 전체의 글자 수. 본문의 한계(guard.MAX_BODY)에 넉넉히 든다
# 보이지 않는 글자. HTML과 그림과 mermaid로 읽힐 자리에 끼우면 글자 그대로 보이고, 복사할 때는 page.js가 뺀다
JOINER = "\u2060"
_LIVE = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)|(?:```|~~~)[ \t]*(?=mermaid)", re.IGNORECASE)


@dataclass
class Said:
    """말 하나.

    Attributes:
        role: "user"나 "assistant".
        good: 사람이 고른 답이면 True, 나쁘다고 한 답이면 False.
        draft: 사람이 답을 고쳐 썼으면 모델이 처음에 한 답, 나쁘다고 하고 다시 답하게 했으면 그 앞의 답.
        other: 나란히 비교한 모델의 답. 비교하지 않았으면 None이고, 빈 글은 그 모델이 빈 답을 한 것이다.
    """

    role: str
    text: str
    good: bool | None = None
    draft: str = ""
    other: str | None = None


@dataclass
class Talk:
    """대화 하나. `id`는 내 기록에서 같은 대화를 알아보는 이름이다."""

    id: str = ""
    system: str = ""
    model: str = ""
    said: list[Said] = field(default_factory=list)

    def to_json(self) -> dict:
        return asdict(self)

    def cut(self, index: int) -> "Talk":
        """`index`번째 말부터 버린 대화."""
        return Talk(self.id or secrets.token_hex(8), self.system, self.model, self.said[:index])

    def last_question(self) -> int:
        """마지막 질문의 자리. 없으면 0이다."""
        return max((place for place, said in enumerate(self.said) if said.role == "user"), default=0)

    def turns(self, other: bool = False) -> list[Turn]:
        """모델이 읽을 말들. `other`면 비교하는 모델이 제가 한 답을 이어 읽는다."""
        system = [Turn("system", self.system)] if self.system.strip() else []
        return system + [Turn(said.role, said.other if other and said.other else said.text) for said in self.said]

    def shown(self, other: bool = False) -> list[dict]:
        """Chatbot에 보일 말들. 비교한 모델의 빈 답을 다른 모델의 답으로 채우지 않는다."""
        texts = [said.other if other and said.other is not None else said.text for said in self.said]
        return [{"role": said.role, "content": [{"type": "text", "text": inert(text or EMPTY_ANSWER)}]}
                for said, text in zip(self.said, texts, strict=True)]

    def marks(self) -> list[str | None]:
        """답마다의 엄지: Chatbot의 feedback_value."""
        names = {True: "Like", False: "Dislike", None: None}
        return [names[said.good] for said in self.said if said.role == "assistant"]


def read_talk(value: object) -> Talk:
    """브라우저가 보낸 대화를 다시 본다.

    Raises:
        UsageError: 대화의 모양이 아니거나 너무 길다.
    """
    if value is None:
        return Talk()
    try:
        talk = Talk(**{**value, "said": [Said(**said) for said in value.get("said", [])]})
    except (TypeError, AttributeError):
        raise UsageError("저장된 대화를 읽지 못했어요. 새 대화를 시작해 주세요") from None
    fits = all(isinstance(text, str) for text in (talk.id, talk.system, talk.model))
    for place, said in enumerate(talk.said):
        fits &= said.role == ("assistant" if place % 2 else "user") and said.good in (None, True, False)
        fits &= all(isinstance(text, str) for text in (said.text, said.draft, said.other or ""))
    if not fits or len(talk.id) > 64 or len(talk.model) > 200:
        raise UsageError("저장된 대화를 읽지 못했어요. 새 대화를 시작해 주세요")
    check_text(시스템=talk.system)
    n_chars = sum(len(said.text + said.draft + (said.other or "")) for said in talk.said)
    if len(talk.said) > MAX_SAID or n_chars > MAX_TALK:
        raise UsageError("대화가 너무 길어요. 새 대화를 시작해 주세요")
    return talk


def inert(text: str) -> str:
    """Markdown으로 그려도 HTML도 그림도 되지 않는 글."""
    return _LIVE.sub(lambda found: found[0] + JOINER, text)


def plain(text: object) -> str:
    """`inert`하기 전의 글. Chatbot이 글이나 글 조각의 목록으로 돌려준다."""
    if isinstance(text, list):
        text = "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in text)
    return text.replace(JOINER, "") if isinstance(text, str) else ""


def shorten(turns: Sequence[Turn]) -> list[Turn]:
    """가장 오래된 질문과 답 하나를 뺀 말들. system은 남긴다. 더 뺄 것이 없으면 빈 목록이다."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    rest = list(turns[len(system) + 2 :])
    return system + rest if rest else []
