"""템플릿과 글 사이의 변환. 학습, 추론, 병합, 테스트가 모두 여기에 묻고, 프롬프트를 만드는 다른 자리는 없다.

표준 라이브러리만 쓴다.
"""

import json
import re
from pathlib import Path

from utils.errors import UsageError
from utils.turns import Turn as Turn

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
CHAT = "chat"
EXAMPLES = (  # (질문, 맥락). 함께 든 데모가 배워서 답할 줄 아는 것들이다
    ("존댓말로 바꿔 줘: 나는 어제 도서관에서 책을 읽었어.", ""),
    ("{x}가 뭐지?", "AI"),
    ("숫자를 읽어 줘: 3,482", ""),
)
_REQUIRED = ("name", "prompt_no_input", "prompt_input", "answer_marker")
_SLOT = re.compile(r"\{(instruction|input)\}")
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")


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
        if input and _PLACEHOLDER.search(instruction):
            instruction, input = fill_placeholder(instruction, input), ""
        form = self.template["prompt_input" if input else "prompt_no_input"]
        values = {"instruction": instruction, "input": input}
        return _SLOT.sub(lambda slot: values[slot.group(1)], form)

    def render(self, instruction: str, input: str, output: str) -> str:
        """질문과 답을 이은 글. 끝 토큰은 토큰을 만드는 쪽이 붙인다."""
        return self.prompt(instruction, input) + output

    def pieces(self, instruction: str, input: str, output: str) -> tuple[str, str]:
        """따로 토큰화할 두 조각. 학습과 추론의 토큰이 같도록, 답 앞의 공백은 답에 속한다."""
        return shift_space(self.prompt(instruction, input), output)

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


class ChatPrompter:
    """토크나이저에 든 대화 템플릿을 쓰는 `Prompter`. 다른 모델의 instruct 형식을 그대로 따른다."""

    name = CHAT

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("이 모델의 토크나이저에는 대화 템플릿이 없다. --prompt_template default를 쓴다")
        self._tokenizer = tokenizer
        self.template = {"name": CHAT}

    def prompt(self, instruction: str, input: str = "") -> str:
        if input and _PLACEHOLDER.search(instruction):
            instruction, input = fill_placeholder(instruction, input), ""
        content = f"{instruction}\n\n{input}" if input else instruction
        messages = [{"role": "user", "content": content}]
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # 템플릿은 모델과 함께 온 프로그램이라 무슨 오류든 낼 수 있다
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UsageError(f"토크나이저의 대화 템플릿이 질문을 받지 않는다({reason}). "
                             "--prompt_template default를 쓴다") from None

    def render(self, instruction: str, input: str, output: str) -> str:
        return self.prompt(instruction, input) + output

    def pieces(self, instruction: str, input: str, output: str) -> tuple[str, str]:
        return shift_space(self.prompt(instruction, input), output)

    def split(self, text: str) -> None:
        return None


def make_prompter(template: str | Path | dict, tokenizer=None) -> Prompter | ChatPrompter:
    """이름이 `chat`이면 토크나이저의 대화 템플릿을, 아니면 파일이나 dict의 템플릿을 쓴다."""
    name = template.get("name") if isinstance(template, dict) else str(template)
    return ChatPrompter(tokenizer) if name == CHAT else Prompter(template)


def fill_placeholder(instruction: str, input: str) -> str:
    """질문 안의 모든 `{...}`를 input으로 바꾼다. 역슬래시와 중괄호도 글자 그대로 들어간다."""
    return _PLACEHOLDER.sub(lambda _: input, instruction)


def shift_space(prompt: str, answer: str) -> tuple[str, str]:
    """프롬프트 끝의 공백을 답의 앞으로 옮긴다. BPE 토큰은 앞의 공백을 단어에 붙이기 때문이다."""
    body = prompt.rstrip(" ")
    return body, prompt[len(body) :] + answer


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
        raise UsageError(f"템플릿 {path}가 올바른 JSON이 아니다: {error}") from None


def _check_template(template: dict) -> None:
    name = template.get("name", "?") if isinstance(template, dict) else "?"
    if not isinstance(template, dict) or not all(isinstance(template.get(key), str) for key in _REQUIRED):
        raise UsageError(f"템플릿 '{name}'에는 문자열 {', '.join(_REQUIRED)}이 모두 있어야 한다")
    for form, slots in (("prompt_no_input", {"instruction"}), ("prompt_input", {"instruction", "input"})):
        if set(_SLOT.findall(template[form])) != slots:
            raise UsageError(f"템플릿 '{name}'의 {form}에는 {{{'}, {'.join(sorted(slots))}}}가 있어야 한다")
        marker = template["answer_marker"].rstrip(" ")
        if not marker or not template[form].rstrip(" ").endswith(marker):
            raise UsageError(f"템플릿 '{name}'의 {form}은 answer_marker로 끝나야 한다")
