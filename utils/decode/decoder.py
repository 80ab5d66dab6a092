"""모델 하나로 답을 한 토큰씩 만든다: 길이의 한계, 멈춤, 통계."""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from utils.data.encoder import require_known_ids
from utils.decode.likelihood import Likelihood, Pair, measure
from utils.decode.transformers_engine import ForwardDecode
from utils.engine.cuda import CompileError
from utils.engine.decode_engine import FastDecode, why_not
from utils.errors import UsageError, first_line
from utils.sampling import Sampling


@dataclass(frozen=True)
class Stats:
    """마지막 답의 통계.

    Attributes:
        tokens: 만든 토큰 수. 끝 토큰은 빼고 센다.
        first_token_seconds: 부른 때부터 첫 토큰까지.
        tokens_per_second: 첫 토큰 뒤의 속도. 토큰이 하나 이하면 0이다.
    """

    tokens: int = 0
    first_token_seconds: float = 0.0
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class Reply:
    """한꺼번에 만든 답 하나.

    Attributes:
        ids: 토큰들. 끝 토큰은 없다.
        finish_reason: "stop"(끝 토큰), "length"(길이), "cancelled"(시간이 다 됨).
    """

    ids: list[int]
    finish_reason: str


class Engine(Protocol):
    """토큰을 만드는 길 하나. `Decoder`가 엔진에 묻는 것은 이것뿐이다."""

    path: str

    def use_adapter(self, on: bool) -> None: ...

    def room(self, tokens: int) -> int:
        """질문과 답을 합쳐 `tokens`개 가운데 지금 메모리에 담을 수 있는 수."""

    def tokens(self, input_ids: list[int], settings: Sampling, limit: int) -> Iterator[int]:
        """토큰을 최대 `limit`개 내놓는다. 끝 토큰에서 멈추는 일은 부르는 쪽이 한다."""

    def answer_rows(self, questions: list[list[int]], settings: Sampling, limits: list[int],
                    end_ids: Sequence[int], until: float) -> list[list[int]]:
        """질문 여럿에 함께 답한다. 답마다 끝 토큰까지의 토큰을 준다. 시각 `until`이 되면 만든 데까지 준다."""


class Decoder:
    """모델 하나와 KV cache를 쥐고 답을 만든다. 한 번에 답 하나만 만든다.

    Args:
        end_ids: 답을 끝내는 토큰들. 어느 것이 나와도 멈춘다.
        longest: 질문과 답을 합친 길이를 이보다 짧게 잡는다.
        adapter: 모델에 어댑터가 여럿이면 이 Decoder가 쓸 것의 PEFT 안의 이름. 모델은 하나를 함께 쓰고, Decoder는
            어댑터마다 하나씩 둔다. 그래서 엔진은 언제나 어댑터 하나만 안다.

    Attributes:
        path: 고른 길과 그 이유 한 줄.
        finish_reason: 마지막 답이 끝난 이유. "stop"(끝 토큰), "length"(길이), "cancelled"(멈춤).
        end_token: 마지막 답을 끝낸 토큰. "stop"으로 끝났을 때만 뜻이 있다.
        stats: 마지막 답의 통계.
        context: 질문과 답을 합친 길이의 한계(토큰). 모델의 한계와 메모리에 담을 수 있는 길이 가운데 작은 쪽이다.
        notice: 마지막 답이 메모리가 모자라 짧아졌으면 그 말. 아니면 빈 문자열.
        n_rows: 입력 embedding의 행 수. 이보다 큰 번호의 토큰은 읽지 못한다.
    """

    def __init__(self, model, tokenizer, end_ids: Collection[int], longest: int | None = None,
                 adapter: str | None = None):
        config = model.config.get_text_config(decoder=True)
        self.end_ids = frozenset(end_ids)
        self.context = reads(config) or int(tokenizer.model_max_length)
        if longest is not None:  # KV cache는 이 길이만큼만 잡힌다
            self.context = min(self.context, longest)
        self.finish_reason = "length"
        self.end_token = -1
        self.stats = Stats()
        model.eval()
        self._model = model
        self._adapter = adapter
        self._adapter_on = True
        self._select()
        self.notice = ""
        self._tokenizer = tokenizer
        self.n_rows = model.get_input_embeddings().weight.shape[0]
        self._engine, self.path = _engine(model, self.context, min(len(tokenizer), config.vocab_size))
        self.context = max(2, self._engine.room(self.context))

    @property
    def is_fast(self) -> bool:
        """직접 쓴 커널로 답하는지."""
        return isinstance(self._engine, FastDecode)

    def use_adapter(self, on: bool) -> None:
        """어댑터를 켜거나 끈다. 끄면 기반 모델이 답한다. 모델을 다시 올리지 않는다.

        모델을 함께 쓰는 다른 Decoder가 그 사이에 다른 어댑터를 골랐을 수 있으므로 답할 때마다 부른다.
        """
        self._adapter_on = on
        self._select()
        self._engine.use_adapter(on)

    def _select(self) -> None:
        """모델에 어댑터가 여럿이면 제 것을 고른다. 커널의 엔진은 만들 때 제 어댑터를 베껴 두어 영향을 받지 않는다."""
        if self._adapter is not None and self._model.active_adapter != self._adapter:
            self._model.set_adapter(self._adapter, inference_mode=True)

    def stream(self, input_ids: list[int], settings: Sampling, stop: threading.Event | None = None) -> Iterator[int]:
        """답의 토큰을 하나씩 내놓는다. 끝 토큰은 내놓지 않는다.

        Args:
            input_ids: 질문의 토큰.
            settings: 고르는 설정. `max_new_tokens`가 남은 자리보다 크면 남은 자리까지만 만든다.
            stop: 켜지면 한 토큰 안에 멈춘다.

        Raises:
            UsageError: 질문이 비었거나, 모델이 읽을 수 있는 길이를 넘거나, 모델이 모르는 토큰이 들어 있다.
        """
        limit = self._limit(input_ids, settings)
        return self._answer(input_ids, settings, limit, stop or threading.Event())

    @torch.inference_mode()
    def answer_many(self, questions: list[list[int]], settings: Sampling, until: float = math.inf) -> list[Reply]:
        """질문들에 한꺼번에 답한다. 줄마다 따로 멈추고, 탐욕적으로 고르면 하나씩 답한 것과 같다.

        가중치를 한 번 읽어 여러 줄을 계산하므로 하나씩 답하는 것보다 빠르다. 빈 목록이면 빈 목록을 준다.

        Args:
            until: `time.perf_counter()`가 이때가 되면 멈춘다. 다 만들지 못한 답의 이유는 "cancelled"다.

        Raises:
            UsageError: 빈 질문이나 너무 긴 질문이나 모델이 모르는 토큰이 있다.
        """
        limits, notices = [], []
        for question in questions:
            limits.append(self._limit(question, settings))
            notices.append(self.notice)
        self.notice = next(filter(None, notices), "")
        answers = self._engine.answer_rows(questions, settings, limits, tuple(self.end_ids), until) if questions else []
        replies = []
        for answer, limit in zip(answers, limits, strict=True):
            stopped = bool(answer) and answer[-1] in self.end_ids
            reason = "stop" if stopped else "length" if len(answer) == limit else "cancelled"
            replies.append(Reply(answer[:-1] if stopped else answer, reason))
        return replies

    def likelihood(self, ids: list[int], top: int = 1) -> Likelihood:
        """글의 둘째 토큰부터의 로그 가능도. 마지막 `use_adapter`가 고른 모델의 forward로 잰다.

        Raises:
            UsageError: 글이 두 토큰이 되지 않거나, 모델이 읽을 수 있는 길이를 넘거나, 모델이 모르는 토큰이 들어 있다.
        """
        if len(ids) < 2:
            raise UsageError(f"가능도를 재려면 글이 두 토큰 이상이어야 한다: {len(ids)}토큰")
        require_known_ids(ids, self.n_rows, self._tokenizer, "글")
        if len(ids) > self.context:
            raise UsageError(f"글이 너무 길다: {len(ids)}토큰. 이 모델은 {self.context}토큰까지 읽는다. 글을 줄인다")
        return self.likelihoods([(ids[:1], ids[1:])], top)[0]

    def likelihoods(self, pairs: Sequence[Pair], top: int = 1,
                    told: Callable[[int], None] = lambda count: None) -> list[Likelihood]:
        """문맥마다 이어지는 글의 로그 가능도. 마지막 `use_adapter`가 고른 모델의 forward로 잰다.

        Args:
            told: forward마다 잰 글의 수를 받는다.
        """
        if hasattr(self._model, "disable_adapter_layers"):  # 커널의 엔진은 모델의 층을 끄지 않는다
            self._model.enable_adapter_layers() if self._adapter_on else self._model.disable_adapter_layers()
        return measure(self._model, pairs, max(1, top), told)

    def _limit(self, input_ids: list[int], settings: Sampling) -> int:
        """답의 최대 토큰 수. 메모리가 모자라면 줄이고 `notice`에 적는다."""
        if not input_ids:
            raise UsageError("질문이 비어 있다")
        require_known_ids(input_ids, self.n_rows, self._tokenizer, "질문")
        room = self.context - len(input_ids)
        if room < 1:
            raise UsageError(f"질문이 너무 길다: {len(input_ids)}토큰. "
                             f"이 모델은 질문과 답을 합쳐 {self.context}토큰까지 읽는다. 질문을 줄인다")
        wanted = min(settings.max_new_tokens, room)
        fits = self._engine.room(len(input_ids) + wanted)
        if fits <= len(input_ids):
            raise UsageError(f"메모리가 모자라다: 질문이 {len(input_ids)}토큰인데 지금 남은 메모리에는 질문과 답을 "
                             f"합쳐 {fits}토큰까지 들어간다. 질문을 줄이거나 메모리를 쓰는 다른 프로그램을 닫는다")
        limit = min(wanted, fits - len(input_ids))
        self.notice = "" if limit == wanted else (
            f"메모리가 모자라 답을 {wanted}토큰에서 {limit}토큰으로 줄인다(질문과 답을 합쳐 {fits}토큰까지 들어간다)")
        return limit

    @torch.inference_mode()
    def _answer(self, input_ids: list[int], settings: Sampling, limit: int, stop: threading.Event) -> Iterator[int]:
        self.finish_reason, self.stats = "cancelled", Stats()
        started, first = time.perf_counter(), 0.0
        if stop.is_set():
            return
        for count, token in enumerate(self._engine.tokens(input_ids, settings, limit), start=1):
            now = time.perf_counter()
            if token in self.end_ids:
                self.finish_reason, self.end_token = "stop", token
                return
            first = first or now
            speed = (count - 1) / (now - first) if count > 1 else 0.0  # 첫 토큰의 시간은 질문을 읽는 시간이라 뺀다
            self.stats = Stats(count, first - started, speed)
            self.finish_reason = "length" if count == limit else "cancelled"
            yield token
            if stop.is_set() and count < limit:
                return


def reads(config) -> int | None:
    """설정이 말하는, 모델이 읽을 수 있는 토큰의 수. 한계가 없는 구조면 None이다.

    Args:
        config: 글을 다루는 부분의 설정(`get_text_config`).
    """
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # MPT, DBRX
    return next((int(limit) for limit in limits if limit), None)


def _engine(model, context: int, vocab: int) -> tuple[Engine, str]:
    """쓸 수 있는 가장 빠른 길과 그것을 고른 이유."""
    reason = why_not(model)
    if reason is None:
        try:
            engine = FastDecode(model, vocab)
            return engine, engine.path
        except CompileError as error:
            reason = f"커널을 컴파일하지 못함: {first_line(error)}"
    engine = ForwardDecode(model, context, vocab)
    return engine, f"{engine.path} - 전용 커널을 쓰지 않은 이유: {reason}"
