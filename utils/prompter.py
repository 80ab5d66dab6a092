"""템플릿과 글 사이의 변환. 학습, 추론, 병합, 테스트가 모두 여기에 묻고, 프롬프트를 만드는 다른 자리는 없다.

표준 라이브러리만 쓴다.
"""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from utils.chat import ChatPrompter
from utils.chat_settings import CHAT, DATE
from utils.errors import UsageError, json_reason
from utils.turns import Pieces, Turn, Unlearned, filled, shift_space

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
EXAMPLES = (  # (질문, 맥락). 함께 든 데모가 배워서 답할 줄 아는 것들이다
    ("존댓말로 바꿔 줘: 나는 어제 도서관에서 책을 읽었어.", ""),
    ("{x}가 뭐지?", "AI"),
    ("숫자를 읽어 줘: 3,482", ""),
)
_REQUIRED = ("name", "prompt_no_input", "prompt_input", "answer_marker")
_SLOT = re.compile(r"\{(instruction|input)\}")


class Prompter:
    """템플릿 하나로 질문을 글로 만들고, 글을 질문과 답으로 나눈다.

    Args:
        template: 템플릿의 이름(`templates/이름.json`), json 파일의 경로, 또는 이미 읽은 dict.

    Raises:
        UsageError: 템플릿이 없거나 형식에 맞지 않는다.
    """

    def __init__(self, template: str | Path | dict = "default"):
        self.template = template if isinstance(template, dict) else _read_template(template)
        _check_template(self.template)
        self.name: str = self.template["name"]
        self.answer_marker: str = self.template["answer_marker"]

    def prompt(self, instruction: str, input: str = "") -> str:
        """답이 시작되기 직전까지의 글. `{...}` 자리가 있으면 input을 그 자리에 글자 그대로 넣는다."""
        return self._wrap(*filled(Turn("user", instruction, input=input)))

    def _wrap(self, instruction: str, input: str) -> str:
        form = self.template["prompt_input" if input else "prompt_no_input"]
        values = {"instruction": instruction, "input": input}
        return _SLOT.sub(lambda slot: values[slot.group(1)], form)

    def talk(self, turns: Sequence[Turn]) -> list[Pieces]:
        """대화 하나의 문서들. 문서는 따로 토큰화할 (프롬프트, 답)들이고, 이 템플릿에서는 늘 하나다.

        system의 글은 빈 줄 하나를 두고 첫 질문의 앞에 붙고, 주고받음마다 질문의 틀이 되풀이된다. 마지막이 user면 그
        조각의 답은 비어 있다.
        """
        pieces: Pieces = []
        system = asked = ""
        for turn in turns:
            if turn.role == "text":
                pieces.append(self.split(turn.text) or ("", turn.text))
            elif turn.role == "system":
                system = f"{turn.text}\n\n"
            elif turn.role == "user":
                question, context = filled(turn)
                asked, system = self._wrap(system + question, context), ""
            else:
                piece = shift_space(asked, turn.text)
                pieces.append(piece if turn.learned else Unlearned(piece))
        if turns[-1].role == "user":
            pieces.append(shift_space(asked, ""))
        return [pieces]

    def read(self, turns: list[Turn]) -> list[Turn]:
        """템플릿에 맞추어 읽은 글들. 한 글로 된 행도 이 템플릿에서는 그대로다."""
        return turns

    def unwrap(self, text: str) -> list[Turn] | None:
        """이 틀로 적힌 글을 질문과 답으로 푼다. 다른 글이면 None이다."""
        for form in ("prompt_input", "prompt_no_input"):
            shape = re.escape(self.template[form].rstrip(" "))
            for slot in ("instruction", "input"):
                shape = shape.replace(re.escape(f"{{{slot}}}"), f"(?P<{slot}>.*?)")
            found = re.match(shape, text, re.DOTALL)
            if found and not any(self.answer_marker.rstrip(" ") in value for value in found.groupdict().values()):
                asked = Turn("user", found["instruction"], input=found.groupdict().get("input", ""))
                return [asked, Turn("assistant", text[found.end() :].lstrip(" "))]
        return None

    def split(self, text: str) -> tuple[str, str] | None:
        """질문과 답이 한 글로 된 행을 두 조각으로 나눈다. 답이 시작되는 표시가 없으면 None이다.

        첫 표시에서 나눈다. 답 안에 `### `가 다시 나와도 답의 일부다.
        """
        at = text.find(self.answer_marker)
        if at < 0:
            return None
        start = at + len(self.answer_marker)
        spaces = len(text[start:]) - len(text[start:].lstrip(" "))
        return shift_space(text[: start + spaces], text[start + spaces :])


def make_prompter(template: str | Path | dict, tokenizer=None, date: str | None = None) -> Prompter | ChatPrompter:
    """이름이 `chat`이면 토크나이저의 대화 템플릿을, 아니면 파일이나 dict의 템플릿을 쓴다.

    Args:
        date: 템플릿이 날짜를 적으면 그 날짜("2026-11-29"). 템플릿이 스스로 정했거나 None이면 쓰지 않는다.
    """
    if str(template) == CHAT:
        template = {"name": CHAT}
    content = template if isinstance(template, dict) else _read_template(template)
    if isinstance(content, dict) and content.get("name") == CHAT:
        return ChatPrompter(tokenizer, {DATE: date, **content} if date else content, unwrap)
    return Prompter(template)


def unwrap(text: str) -> list[Turn] | None:
    """이 폴더의 틀 가운데 하나로 적힌 글을 질문과 답으로 푼다. 어느 틀도 아니면 None이다."""
    found = (prompter.unwrap(text) for prompter in _shipped())
    return next((turns for turns in found if turns), None)


@functools.cache
def _shipped() -> tuple[Prompter, ...]:
    return tuple(Prompter(path.stem) for path in sorted(TEMPLATES.glob("*.json")))


def _read_template(template: str | Path) -> dict:
    path = Path(template)
    if path.suffix != ".json":
        path = TEMPLATES / f"{template}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError:
        names = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.json")))
        raise UsageError(f"템플릿 '{template}'을 읽지 못했다. 쓸 수 있는 이름: {names}, {CHAT}") from None
    except ValueError as error:
        raise UsageError(f"템플릿이 올바른 JSON이 아니다: {path}. {json_reason(error)}") from None


def _check_template(template: dict) -> None:
    name = template.get("name", "?") if isinstance(template, dict) else "?"
    if not isinstance(template, dict) or not all(isinstance(template.get(key), str) for key in _REQUIRED):
        raise UsageError(f"템플릿 '{name}'에는 문자열 {', '.join(_REQUIRED)}이 모두 있어야 한다")
    for form, slots in (("prompt_no_input", {"instruction"}), ("prompt_input", {"instruction", "input"})):
        if set(_SLOT.findall(template[form])) != slots:
            raise UsageError(f"템플릿 '{name}'의 {form}에는 {{{'}, {'.join(sorted(slots))}}}가 있어야 한다")
        marker = template["answer_marker"].rstrip(" ")
        if not marker or not template[form].rstrip(" ").endswith(marker):
            raise UsageError(f"템플릿 '{name}'에서 이 항목은 answer_marker로 끝나야 한다: {form}")
