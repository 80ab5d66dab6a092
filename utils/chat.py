"""토크나이저에 든 대화 템플릿: 대화를 글로 만들고, 그 글에서 모델이 말해야 하는 자리를 정한다.

템플릿은 모델과 함께 온 프로그램이라 무엇이든 할 수 있다. 그래서 묻는 글(add_generation_prompt)이 정말로 배울 글의
앞부분인지, 글이 빠지거나 바뀌지 않았는지를 행마다 본다. torch와 transformers를 맨 위에서 부르지 않는다.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from utils.chat_settings import CHAT, THINKS, read_settings
from utils.errors import UsageError
from utils.turns import Joined, Pieces, Turn, Unlearned, filled

THOUGHTS, THOUGHTS_END = "<think>", "</think>"
# 글 속에 글자로 적힌 특수 토큰을 가르는 표시. 이 자리에서 나누어 토큰화하면 특수 토큰이 되지 않는다. 유니코드가 글자로
# 쓰지 않기로 한 번호라 글에 나오지 않는다
GUARD = "\ufdd0"
_PROBE = "여기까지"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SPACE = re.compile(rf"[\s{GUARD}]+")


class CannotSay(UsageError):
    """대화 템플릿이 이 대화를 글로 만들지 못하거나 글을 바꾼다. 데이터 검사에서의 종류는 template이다."""

    kind = "template"


@dataclass(frozen=True)
class _Said:
    """답 하나를 만드는 글.

    Attributes:
        told: 그 답까지의 글 전체.
        start: 답이 시작되는 글자의 자리. told[:start]가 모델에게 묻는 글이다.
        end: 답의 끝 토큰까지의 자리.
        spans: [start, end) 가운데 배울 자리들. `{% generation %}`이 있는 템플릿이 정한다.
        learned: 배우는 답인지.
    """

    told: str
    start: int
    end: int
    spans: tuple[tuple[int, int], ...]
    learned: bool


class ChatPrompter:
    """토크나이저에 든 대화 템플릿을 쓰는 `Prompter`. 다른 모델의 instruct 형식을 그대로 따른다.

    Args:
        template: {"name": "chat"}과 그 설정(`chat_settings`). 없는 설정은 템플릿의 기본값이다.
        unwrap: 한 글로 된 행을 질문과 답으로 푼다. 풀 수 없으면 None이다.

    Raises:
        UsageError: 토크나이저에 대화 템플릿이 없거나, 설정의 값이 틀렸다.
    """

    name = CHAT

    def __init__(self, tokenizer, template: dict | None = None,
                 unwrap: Callable[[str], list[Turn] | None] = lambda text: None):
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("이 모델의 토크나이저에는 대화 템플릿이 없다. --prompt_template default를 쓴다")
        written = tokenizer.chat_template
        written = written if isinstance(written, str) else written.get("default", "")  # 이름마다 하나씩 둔 것도 있다
        self.template, self._variables, self._source = read_settings(template or {}, written)
        self._tokenizer = tokenizer
        self._unwrap = unwrap
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
        self._has_marks = bool(_MARKS.search(written))
        self._header, self._trail = self._probe()
        self.end_tokens = end_tokens(tokenizer, self._trail)

    def prompt(self, instruction: str, input: str = "") -> str:
        """답이 시작되기 직전까지의 글."""
        return self._asked([Turn("user", instruction, input=input)]).replace(GUARD, "")

    def read(self, turns: list[Turn]) -> list[Turn]:
        """템플릿에 맞추어 읽은 글들. 다른 틀로 적힌 글(`### 질문: …`)은 질문과 답으로 푼다."""
        return (self._unwrap(turns[0].text) or turns) if turns[0].role == "text" else turns

    def talk(self, turns: Sequence[Turn]) -> list[Pieces]:
        """대화 하나의 문서들. 마지막이 user면 묻는 글 하나다.

        보통은 대화 전체가 문서 하나다. 앞의 답이 다음 차례에서 다른 글이 되는 템플릿(앞의 생각을 지우는 Qwen3, system을
        마지막 질문에 붙이는 Mistral)에서는 배우는 답마다 문서 하나를 두어, 그 답을 물을 때의 글로 배운다.

        Raises:
            CannotSay: 템플릿이 이 대화를 받지 않거나, 글을 빼거나 바꾼다.
        """
        if turns[0].role == "text":
            return [[("", turns[0].text)]]
        said = self._every_answer(turns)
        if turns[-1].role == "user":
            text = self._asked(turns)
            self._require_kept(turns, text)
            return [Joined(_pieces(text, _begun(text, said.values()), len(text)))]
        whole, _ = self._render(turns)
        self._require_kept(turns, whole)
        answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
        kept = _begun(whole, said.values())
        if self.end_tokens and len(kept) == len(answers):
            return [Joined(_pieces(whole, kept, len(whole)))]
        return [self._alone(turns, place, said) for place in answers if turns[place].learned]

    def split(self, text: str) -> None:
        """질문과 답이 한 글로 된 행은 나누지 않는다."""
        return None

    def _alone(self, turns: Sequence[Turn], place: int, said: dict[int, _Said]) -> Pieces:
        """`place`의 답만 배우는 문서. 그 앞의 글은 질문까지 배울 때에도 마지막 질문만 배운다."""
        last = said[place]
        self._require_kept(turns[: place + 1], last.told)
        asked = last.told[: last.start]
        end = len(last.told) if self.end_tokens else last.end
        history = [each for before, each in said.items() if before < place]
        muted = 0  # 이 앞의 글자는 질문까지 배울 때에도 배우지 않는다
        if history:
            question = self._content(turns[place - 1]).strip()
            muted = max(asked.rfind(question), 0)
        read = [replace(each, learned=False) for each in _begun(asked, history)]
        return Joined(_pieces(last.told, [*read, last], end, muted), open_end=not self.end_tokens)

    def _every_answer(self, turns: Sequence[Turn]) -> dict[int, _Said]:
        """답의 자리 -> 그 답을 만드는 글. 배우지 않는 답은 템플릿이 바꾸어도 된다."""
        found = {}
        for place, turn in enumerate(turns):
            if turn.role == "assistant":
                try:
                    found[place] = self._said(turns[: place + 1])
                except CannotSay:
                    if turns[-1].role == "assistant" and turn.learned:
                        raise
        return found

    def _said(self, turns: Sequence[Turn]) -> _Said:
        asked = self._asked(turns[:-1])
        told, marks = self._render(turns, marks=self._has_marks)
        if not told.startswith(asked):
            advice = "system을 첫 질문에 합치거나 " if turns[0].role == "system" else ""
            if THINKS in self._variables:
                advice += f"{THOUGHTS}로 적은 생각이 든 답이면 enable_thinking을 true로 하거나 "
            raise CannotSay("토크나이저의 대화 템플릿이 답이 있을 때와 물을 때의 앞글을 다르게 적어, 배운 대로 물을 "
                            f"수 없다. {advice}--prompt_template default를 쓴다")
        start, text_end = len(asked), len(told) - len(self._trail)
        if text_end < start or told[text_end:] != self._trail:
            probe = self._text([*turns[:-1], Turn("assistant", _PROBE)])
            trail = probe.rpartition(_PROBE)[2] if probe.startswith(asked) else ""
            text_end = len(told) - len(trail)
            if text_end < start or told[text_end:] != trail:
                raise CannotSay("토크나이저의 대화 템플릿이 답의 뒤에 놓는 글이 답마다 달라 끝을 정할 수 없다. "
                                "--prompt_template default를 쓴다")
        answer = _squeezed(turns[-1].text)
        if _squeezed(asked).endswith(THOUGHTS):  # 생각의 시작을 묻는 글에 적는 템플릿
            answer = answer.removeprefix(THOUGHTS)
        if answer not in _squeezed(told[start:text_end]):
            raise CannotSay("토크나이저의 대화 템플릿이 답의 글을 빼거나 바꾼다(생각을 지우는 템플릿일 수 있다). "
                            f"답에서 {THOUGHTS_END} 앞의 생각을 빼거나 --prompt_template default를 쓴다")
        ending = re.match(rf"\s*(?:{self._special.pattern})+", told[text_end:])
        end = text_end + (ending.end() if ending else 0)
        spans = [(max(first, start), min(last, end)) for first, last in marks if first < end and last > start]
        if spans and spans[-1][1] >= len(told[:text_end].rstrip()):
            spans[-1] = (spans[-1][0], end)  # 끝 토큰이 표시 밖에 있어도 모델이 말해야 한다
        return _Said(told, start, end, tuple(spans) or ((start, end),), turns[-1].learned)

    def _asked(self, turns: Sequence[Turn]) -> str:
        """답이 시작되기 직전까지의 글. 끝의 공백은 답에 속한다."""
        return (self._text(turns, ask=True) + self._header).rstrip(" ")

    def _text(self, turns: Sequence[Turn], ask: bool = False) -> str:
        return self._render(turns, ask)[0]

    def _render(self, turns: Sequence[Turn], ask: bool = False,
                marks: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """(글, `{% generation %}`이 표시한 자리들). `marks`가 False면 자리는 비어 있다."""
        messages = [{"role": turn.role, "content": self._content(turn)} for turn in turns]
        try:
            if marks:
                from transformers.utils.chat_template_utils import render_jinja_template

                texts, places = render_jinja_template(
                    [messages], chat_template=self._source, return_assistant_tokens_mask=True,
                    **{**self._tokenizer.special_tokens_map, **self._variables})
                return texts[0], list(places[0])
            return self._tokenizer.apply_chat_template(messages, chat_template=self._source or None, tokenize=False,
                                                       add_generation_prompt=ask, **self._variables), []
        except Exception as error:  # 템플릿은 모델과 함께 온 프로그램이라 무슨 오류든 낼 수 있다
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            said = ", ".join(turn.role for turn in turns[:6]) + (", ..." if len(turns) > 6 else "")
            advice = "system을 첫 질문에 합치거나 " if turns[0].role == "system" else ""
            raise CannotSay(f"토크나이저의 대화 템플릿이 이 대화({said})를 받지 않는다({reason}). {advice}"
                            "--prompt_template default를 쓴다") from None

    def _content(self, turn: Turn) -> str:
        """글자로 적힌 특수 토큰을 가른 글. 질문에 딸린 글은 빈 줄 하나를 두고 뒤에 붙는다."""
        question, context = filled(turn)
        text = f"{question}\n\n{context}" if context else question
        def guarded(found: re.Match) -> str:
            return found[0][0] + GUARD + found[0][1:]

        return self._special.sub(guarded, text.replace(GUARD, ""))

    def _probe(self) -> tuple[str, str]:
        """(묻는 글에 더 적어야 할 답의 표제, 템플릿이 답 뒤에 놓는 글). 템플릿을 쓸 수 없으면 빈 글들이다."""
        question, answer = Turn("user", "가"), Turn("assistant", _PROBE)
        try:
            plain, asked = self._text([question]), self._text([question], ask=True)
            told = self._text([question, answer])
        except UsageError:
            return "", ""  # 행이나 질문을 만들 때 그 이유를 말한다
        before, found, trail = told.rpartition(_PROBE)
        # add_generation_prompt를 모르는 템플릿이면 답의 표제를 손수 적는다
        ignores = found and plain == asked and before.startswith(plain)
        return (before[len(plain) :].rstrip(" ") if ignores else ""), (trail if found else "")

    def _require_kept(self, turns: Sequence[Turn], text: str) -> None:
        """system과 user의 글이 모두 남아 있는지. 말없이 버리는 템플릿이 있다."""
        squeezed = _squeezed(text)
        for turn in turns:
            if turn.role != "assistant" and _squeezed(self._content(turn)) not in squeezed:
                raise CannotSay(f"토크나이저의 대화 템플릿이 {turn.role}의 글을 빼거나 바꾼다. 그 글을 질문에 합치거나 "
                                "--prompt_template default를 쓴다")


def end_tokens(tokenizer, trail: str) -> list[str]:
    """템플릿이 답 바로 뒤에 놓는 끝 토큰들. `trail`은 답 뒤의 글이다."""
    special = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special),
                     key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    found, at = [], len(trail) - len(trail.lstrip())
    while match := pattern.match(trail, at):
        found.append(match[0])
        at = match.end()
    return found


def _begun(text: str, said: Iterable[_Said]) -> list[_Said]:
    """물을 때의 글 그대로 `text`에 남아 있는 답들."""
    return [each for each in said if text.startswith(each.told[: each.end])]


def _pieces(text: str, said: Sequence[_Said], end: int, muted: int = 0) -> Pieces:
    """글을 (배우지 않을 글, 배울 글)들로. `muted` 앞의 글은 질문까지 배울 때에도 배우지 않는다."""
    pieces: Pieces = []
    at = 0
    for each in said:
        for first, last in each.spans:
            before = max(at, min(muted, first))
            if before > at:
                pieces.append(Unlearned(("", text[at:before])))
            piece = text[before:first], text[first:last]
            pieces.append(piece if each.learned else Unlearned(piece))
            at = last
    if at < end:
        pieces.append((text[at:end], ""))
    return pieces


def _squeezed(text: str) -> str:
    return _SPACE.sub("", text)
