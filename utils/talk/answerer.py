"""모델 하나로 하는 답: 질문의 토큰, 나오는 글, 가능도. 줄(`line.Line`)에 서서 한 번에 하나만 만든다."""

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from utils.chat_settings import CHAT
from utils.data.encoder import Encoder
from utils.data.texts import SURROGATE, compose
from utils.decode.decoder import Decoder, Stats
from utils.decode.likelihood import Likelihood, Pair
from utils.decode.textstream import Opening, TextStream
from utils.errors import UsageError
from utils.sampling import Sampling
from utils.talk.line import Line, Task
from utils.turns import Turn, as_talk

REASONS = {"stop": "스스로 멈춤", "length": "최대 길이에 닿음", "cancelled": "사용자가 멈춤", "error": "오류로 멈춤"}


class TooLong(UsageError):
    """질문이 모델이 읽을 수 있는 길이를 넘는다."""


@dataclass(eq=False)
class Answer:
    """만들고 있거나 다 만든 답 하나.

    Attributes:
        input_ids: 질문의 토큰.
        tuned: False면 어댑터를 끄고 기반 모델이 답한다.
        top: 적으면 답이 끝난 뒤 질문과 답의 모든 토큰의 가능도를, 자리마다 이만큼의 그럴듯한 토큰과 함께 잰다.
        read_only: 답을 만들지 않고 질문의 가능도만 잰다.
        raw: 글을 이어 쓴다. 나온 글에서 첫머리의 공백과 빈 생각을 빼지 않는다.
        head: `input_ids`의 앞에 붙인, 받은 글에는 없는 글머리의 토큰의 수.
        stop: 켜면 한 토큰 안에 멈춘다.
        text: 지금까지 나온 글. 완성된 음절만 들어 있다.
        ids: 지금까지 나온 토큰.
        finish_reason: 끝난 이유. 끝나기 전에는 None이다. "stop", "length", "cancelled", "error".
        likelihood, end_ids: `top`을 적었으면 질문과 답과 끝 토큰을 이은 글의 가능도와, 그 끝 토큰(없으면 빈 목록).
        error: 답을 만들지 못한 이유.
        session: 물은 브라우저의 session_hash.
        cleared: 사용자가 화면을 지웠다. 따라가던 페이지는 빈 값을 마지막으로 보낸다.
    """

    input_ids: list[int]
    settings: Sampling
    tuned: bool = True
    top: int | None = None
    read_only: bool = False
    raw: bool = False
    head: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    finish_reason: str | None = None
    likelihood: Likelihood | None = None
    end_ids: list[int] = field(default_factory=list)
    error: str = ""
    session: str = ""
    cleared: bool = False


class Answerer:
    """모델 하나로 답한다. 여러 스레드가 함께 불러도 된다.

    Args:
        say: 알림과 작업 스레드의 오류를 알릴 곳.
        line: 설 줄. 어댑터만 다르고 모델을 함께 쓰는 Answerer들은 줄도 함께 선다. 없으면 새로 만든다.
    """

    def __init__(self, decoder: Decoder, tokenizer, prompter, end_id: int, say: Callable[[str], None],
                 can_compare: bool = False, line: Line | None = None):
        self.prompter = prompter
        self.can_compare = can_compare
        self._decoder = decoder
        self.tokenizer = tokenizer
        self.end_id = end_id
        self.encoder = Encoder(tokenizer, end_id, decoder.n_rows)
        self._say = say
        self._encoding = threading.Lock()
        self.line = Line(say) if line is None else line

    @property
    def context(self) -> int:
        return self._decoder.context

    def ask(self, instruction: str, input: str = "") -> list[int]:
        """질문의 토큰. 학습할 때와 똑같이 만든다.

        Raises:
            UsageError: 질문이 비었거나, 답할 자리가 남지 않을 만큼 길거나, 모델이 모르는 토큰이 나온다.
        """
        return self.ask_talk(as_talk(instruction, input))

    def ask_talk(self, turns: Sequence[Turn]) -> list[int]:
        """대화 전체의 토큰. 학습할 때와 똑같이 만든다. 마지막은 user의 질문이다.

        Args:
            turns: (있으면) system 하나, 그 뒤로 user와 assistant가 번갈아. `talks.read_turns`가 이 꼴을 준다.

        Raises:
            UsageError: 질문이 비었거나, 템플릿이 이 대화를 받지 않거나, 너무 길거나, 모델이 모르는 토큰이 나온다.
        """
        turns = [replace(turn, text=compose(turn.text), input=compose(turn.input)) for turn in turns]
        if not turns or turns[-1].role != "user":
            raise UsageError("대화의 마지막은 user의 질문이어야 한다")
        if not turns[-1].text.strip():
            raise UsageError("질문이 비어 있다. 질문을 적는다")
        if any(SURROGATE.search(turn.text + turn.input) for turn in turns):
            raise UsageError("질문에 글자가 될 수 없는 값(짝 없는 surrogate)이 들어 있다. UTF-8로 적는다")
        with self._encoding:
            return self._fitting(self.encoder.encode_asked(self.prompter.talk(turns)[0]))

    def continue_text(self, text: str) -> list[int]:
        """템플릿 없이 이어 쓸 글의 토큰."""
        if not text.strip():
            raise UsageError("이어 쓸 글이 비어 있다")
        with self._encoding:
            return self._fitting(self.encoder.encode_prompt(text, special=self.prompter.name == CHAT))

    def added_head(self, text: object, ids: list[int]) -> int:
        """`continue_text`가 글 앞에 붙인 토큰의 수. 글이 아니거나 글머리의 토큰을 적은 글이면 0이다."""
        head = self.encoder.head
        if not head or not isinstance(text, str) or ids[: len(head)] != head:
            return 0
        return 0 if text.startswith(self.tokenizer.decode(head)) else len(head)

    def continue_tokens(self, ids: list[int]) -> list[int]:
        """이어 쓸 글을 토큰 번호로 받는다. 아무것도 더하지 않는다."""
        unknown = [number for number in ids if not 0 <= number < self._decoder.n_rows]
        if unknown:
            raise UsageError(f"모델에 없는 토큰 번호다: {unknown[0]}. 0에서 {self._decoder.n_rows - 1}까지 적는다")
        return self._fitting(ids)

    def likelihoods(self, name: str, pairs: Sequence[Pair],
                    told: Callable[[int], None] = lambda count: None) -> list[Likelihood]:
        """문맥마다 이어지는 글의 로그 가능도. `name`이 "base"면 어댑터를 끈다. 줄을 서지 않으므로 페이지 없이 쓴다.

        Args:
            told: forward마다 잰 글의 수를 받는다.
        """
        self._decoder.use_adapter(name != "base")
        return self._decoder.likelihoods(pairs, told=told)

    def pieces(self, answer: Answer) -> Iterator[str]:
        """답을 만들며 완성된 음절을 내놓는다. 답 앞의 공백과 빈 생각은 뺀다. 한 번에 하나만 불러야 한다."""
        self._decoder.use_adapter(answer.tuned)
        stream, opening = self._spelling(answer)
        made = () if answer.read_only else self._decoder.stream(answer.input_ids, answer.settings, answer.stop)
        for token in made:
            answer.ids.append(token)
            answer.stats = self._decoder.stats
            piece = opening.push(stream.push(token))
            if piece:
                answer.text += piece
                yield piece
        if self._decoder.notice:
            self._say(self._decoder.notice)
        rest = opening.push(stream.flush()) + opening.flush()
        if rest:
            answer.text += rest
            yield rest
        answer.stats = self._decoder.stats
        reason = "length" if answer.read_only else self._decoder.finish_reason
        if answer.top is not None:
            answer.end_ids = [self._decoder.end_token] if reason == "stop" else []
            ids = answer.input_ids + answer.ids + answer.end_ids
            if len(ids) > 1:  # 토큰 하나뿐이면 잴 것이 없다
                answer.likelihood = self._decoder.likelihood(ids, answer.top)
        answer.finish_reason = reason  # 이것이 적히면 다 된 것이다

    def together(self, answers: Sequence[Answer]) -> None:
        """설정과 모델(`tuned`)이 같은 답들을 한꺼번에 만든다. 줄을 서지 않으므로 페이지 없이 쓴다."""
        self._decoder.use_adapter(answers[0].tuned)
        replies = self._decoder.answer_many([answer.input_ids for answer in answers], answers[0].settings)
        if self._decoder.notice:
            self._say(self._decoder.notice)
        for answer, reply in zip(answers, replies, strict=True):
            stream, opening = self._spelling(answer)
            text = "".join(stream.push(token) for token in reply.ids) + stream.flush()
            answer.ids, answer.text = reply.ids, opening.push(text) + opening.flush()
            answer.finish_reason = reply.finish_reason

    def submit(self, *answers: Answer) -> None:
        """답들을 줄 끝에 세운다. 함께 세운 답들은 잇달아 만든다.

        Raises:
            Busy: 이미 여덟이 기다리고 있다.
        """
        self.line.submit(*(self.task(answer) for answer in answers))

    def task(self, answer: Answer) -> Task:
        """줄에 세울 일 하나. 다른 어댑터의 것과 함께 세울 때 쓴다."""
        return Task(self._make, answer)

    def ahead(self, answer: Answer) -> int:
        """이 답보다 먼저 만들 일의 수."""
        return self.line.ahead(answer)

    def leave(self, session: str, clear: bool = False) -> None:
        """브라우저가 멈춤을 눌렀거나 떠났거나(`clear`면) 화면을 지웠다. 그가 물은 답을 모두 멈춘다."""
        self.line.leave(session, clear)

    def follow(self, *answers: Answer) -> AsyncIterator[int]:
        """답들이 바뀔 때마다 앞에 남은 일의 수를 내놓고, 다 되거나 지워지면 끝난다. 그만 따라가면 답도 멈춘다."""
        return self.line.follow(*answers)

    def _spelling(self, answer: Answer) -> tuple[TextStream, Opening]:
        """답의 토큰을 글자로 바꾸는 것과, 첫머리를 다듬는 것."""
        return TextStream(self.tokenizer, after=answer.input_ids if answer.raw else ()), Opening(answer.raw)

    def _make(self, answer: Answer) -> None:
        for _ in self.pieces(answer):
            pass

    def _fitting(self, tokens: list[int]) -> list[int]:
        if len(tokens) >= self.context:
            raise TooLong(f"질문이 너무 길다: {len(tokens)}토큰. 이 모델은 질문과 답을 합쳐 "
                             f"{self.context}토큰까지 읽는다. 질문을 줄인다")
        return tokens


def describe(answer: Answer, ahead: int = 0) -> str:
    """답 밑에 보여 줄 한 줄: 기다림, 토큰 수와 속도, 멈춘 이유."""
    if answer.error:
        return answer.error
    if not answer.ids and answer.finish_reason is None:
        return f"앞에 질문 {ahead}개 · 차례를 기다리는 중" if ahead else "질문을 읽는 중"
    stats = answer.stats
    parts = [f"토큰 {stats.tokens}개"]
    if stats.tokens_per_second:
        parts.append(f"{stats.tokens_per_second:,.1f} 토큰/초")
    if stats.tokens:
        parts.append(f"첫 토큰까지 {stats.first_token_seconds:.2f}초")
    parts.append(REASONS[answer.finish_reason] if answer.finish_reason else "답하는 중")
    return " · ".join(parts)
