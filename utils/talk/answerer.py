"""질문의 줄: 받은 차례대로 답한다. 모델은 한 번에 답 하나만 만들고, 기다리는 줄의 길이에는 끝이 있다."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from utils.data.encoder import Encoder
from utils.decode.decoder import Decoder, Stats
from utils.decode.textstream import TextStream
from utils.errors import UsageError
from utils.prompter import CHAT, Turn
from utils.sampling import Sampling
from utils.turns import as_talk

WAITING = 8
REFRESH = 0.04  # 화면을 고치는 간격(초). 이보다 빨라도 눈에는 같다
REASONS = {"stop": "스스로 멈춤", "length": "최대 길이에 닿음", "cancelled": "사용자가 멈춤", "error": "오류로 멈춤"}


class Busy(UsageError):
    """기다리는 줄이 가득 찼다."""


@dataclass(eq=False)
class Answer:
    """만들고 있거나 다 만든 답 하나.

    Attributes:
        input_ids: 질문의 토큰.
        tuned: False면 어댑터를 끄고 기반 모델이 답한다.
        stop: 켜면 한 토큰 안에 멈춘다.
        text: 지금까지 나온 글. 완성된 음절만 들어 있다.
        ids: 지금까지 나온 토큰.
        finish_reason: 끝난 이유. 끝나기 전에는 None이다. "stop", "length", "cancelled", "error".
        error: 답을 만들지 못한 이유.
        session: 물은 브라우저의 session_hash.
        cleared: 사용자가 화면을 지웠다. 따라가던 페이지는 빈 값을 마지막으로 보낸다.
    """

    input_ids: list[int]
    settings: Sampling
    tuned: bool = True
    stop: threading.Event = field(default_factory=threading.Event)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    finish_reason: str | None = None
    error: str = ""
    session: str = ""
    cleared: bool = False


class Answerer:
    """모델 하나로 답한다. 여러 스레드가 함께 불러도 된다.

    Args:
        say: 작업 스레드의 오류를 알릴 곳.
    """

    def __init__(self, decoder: Decoder, tokenizer, prompter, end_id: int, say: Callable[[str], None],
                 can_compare: bool = False):
        self.prompter = prompter
        self.can_compare = can_compare
        self._decoder = decoder
        self.tokenizer = tokenizer
        self.end_id = end_id
        self.encoder = Encoder(tokenizer, end_id, decoder.n_rows)
        self._say = say
        self._encoding = threading.Lock()
        self._changed = threading.Condition()
        self._line: deque[tuple[Answer, ...]] = deque()  # 맨 앞은 지금 답하고 있는 일이다
        threading.Thread(target=self._work, name="answerer", daemon=True).start()

    @property
    def context(self) -> int:
        return self._decoder.context

    def ask(self, instruction: str, input: str = "", past: list[tuple[str, str]] | None = None) -> list[int]:
        """질문의 토큰. 학습할 때와 똑같이 만든다.

        Args:
            past: 앞서 주고받은 (질문, 답)들.

        Raises:
            UsageError: 질문이 비었거나, 답할 자리가 남지 않을 만큼 길거나, 모델이 모르는 토큰이 나온다.
        """
        return self.ask_talk(as_talk(instruction, input, past or ()))

    def ask_talk(self, turns: Sequence[Turn]) -> list[int]:
        """대화 전체의 토큰. 학습할 때와 똑같이 만든다. 마지막은 user의 질문이다.

        Args:
            turns: (있으면) system 하나, 그 뒤로 user와 assistant가 번갈아. `talks.read_turns`가 이 꼴을 준다.

        Raises:
            UsageError: 질문이 비었거나, 템플릿이 이 대화를 받지 않거나, 너무 길거나, 모델이 모르는 토큰이 나온다.
        """
        if not turns or turns[-1].role != "user":
            raise UsageError("대화의 마지막은 user의 질문이어야 한다")
        if not turns[-1].text.strip():
            raise UsageError("질문이 비어 있다. 질문을 적는다")
        with self._encoding:
            return self._fitting(self.encoder.encode_asked(self.prompter.talk(turns)[0]))

    def continue_text(self, text: str) -> list[int]:
        """템플릿 없이 이어 쓸 글의 토큰."""
        if not text.strip():
            raise UsageError("이어 쓸 글이 비어 있다")
        with self._encoding:
            return self._fitting(self.encoder.encode_prompt(text, special=self.prompter.name == CHAT))

    def pieces(self, answer: Answer) -> Iterator[str]:
        """답을 만들며 완성된 음절을 내놓는다. 답 앞의 공백은 뺀다. 한 번에 하나만 불러야 한다."""
        self._decoder.use_adapter(answer.tuned)
        stream = TextStream(self.tokenizer)
        for token in self._decoder.stream(answer.input_ids, answer.settings, answer.stop):
            answer.ids.append(token)
            answer.stats = self._decoder.stats
            piece = stream.push(token)
            piece = piece if answer.text else piece.lstrip()
            if piece:
                answer.text += piece
                yield piece
        if self._decoder.notice:
            self._say(self._decoder.notice)
        rest = stream.flush()
        if rest:
            answer.text += rest
            yield rest
        answer.stats = self._decoder.stats
        answer.finish_reason = self._decoder.finish_reason

    def together(self, answers: Sequence[Answer]) -> None:
        """설정과 모델(`tuned`)이 같은 답들을 한꺼번에 만든다. 줄을 서지 않으므로 페이지 없이 쓴다."""
        self._decoder.use_adapter(answers[0].tuned)
        replies = self._decoder.answer_many([answer.input_ids for answer in answers], answers[0].settings)
        for answer, reply in zip(answers, replies, strict=True):
            stream = TextStream(self.tokenizer)
            text = "".join(stream.push(token) for token in reply.ids) + stream.flush()
            answer.ids, answer.text, answer.finish_reason = reply.ids, text.lstrip(), reply.finish_reason

    def submit(self, *answers: Answer) -> None:
        """답들을 줄 끝에 세운다. 함께 세운 답들은 잇달아 만든다.

        Raises:
            Busy: 이미 여덟이 기다리고 있다.
        """
        with self._changed:
            if len(self._line) > WAITING:
                raise Busy(f"지금은 바쁘다. 이미 {WAITING}개의 질문이 기다리고 있다. 잠시 뒤에 다시 묻는다")
            self._line.append(answers)
            self._changed.notify()

    def ahead(self, answer: Answer) -> int:
        """이 답보다 먼저 만들 일의 수."""
        for place, group in enumerate(list(self._line)):
            if answer in group:
                return place
        return 0

    def leave(self, session: str, clear: bool = False) -> None:
        """브라우저가 멈춤을 눌렀거나 떠났거나(`clear`면) 화면을 지웠다. 그가 물은 답을 모두 멈춘다."""
        for group in list(self._line):
            for answer in group:
                if session and answer.session == session:
                    answer.cleared = answer.cleared or clear
                    answer.stop.set()

    async def follow(self, *answers: Answer) -> AsyncIterator[int]:
        """답들이 바뀔 때마다 앞에 남은 일의 수를 내놓고, 다 되거나 지워지면 끝난다. 그만 따라가면 답도 멈춘다."""
        seen = None
        try:
            while not answers[0].cleared:
                done = all(answer.finish_reason for answer in answers)
                state = [len(answer.ids) for answer in answers], self.ahead(answers[0]), done
                if state != seen:
                    seen = state
                    yield state[1]
                if done:
                    return
                await asyncio.sleep(REFRESH)
        finally:
            for answer in answers:
                answer.stop.set()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line)
                group = self._line[0]
            for answer in group:
                self._finish(answer)
            with self._changed:
                self._line.popleft()

    def _finish(self, answer: Answer) -> None:
        """답 하나를 끝까지 만든다. 무엇이 잘못되어도 그 답만 끝난다."""
        try:
            for _ in self.pieces(answer):
                pass
        except UsageError as error:
            answer.error, answer.finish_reason = str(error), "error"
        except Exception as error:
            self._say(f"답을 만들다 오류가 났다: {type(error).__name__}: {error}")
            answer.error = "답을 만들다 오류가 났다. 다시 묻는다. 자세한 것은 프로그램을 실행한 콘솔에 있다"
            answer.finish_reason = "error"

    def _fitting(self, tokens: list[int]) -> list[int]:
        if len(tokens) >= self.context:
            raise UsageError(f"질문이 너무 길다: {len(tokens)}토큰. 이 모델은 질문과 답을 합쳐 "
                             f"{self.context}토큰까지 읽는다. 질문을 줄인다")
        return tokens


def describe(answer: Answer, ahead: int = 0) -> str:
    """답 밑에 보여 줄 한 줄: 기다림, 토큰 수와 속도, 멈춘 이유."""
    if answer.error:
        return answer.error
    if not answer.ids and answer.finish_reason is None:
        return f"앞에 {ahead}개의 질문이 있다. 차례를 기다린다" if ahead else "질문을 읽는다"
    stats = answer.stats
    parts = [f"토큰 {stats.tokens}개"]
    if stats.tokens_per_second:
        parts.append(f"{stats.tokens_per_second:,.1f} 토큰/초")
    if stats.tokens:
        parts.append(f"첫 토큰까지 {stats.first_token_seconds:.2f}초")
    parts.append(REASONS[answer.finish_reason] if answer.finish_reason else "답하고 있다")
    return " · ".join(parts)
