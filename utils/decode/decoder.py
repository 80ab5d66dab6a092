"""모델 하나로 답을 한 토큰씩 만드는 일을 맡는다: 길이의 한계, 멈춤, 통계."""

import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from utils.data.encoder import require_known_ids
from utils.decode.transformers_engine import ForwardDecode
from utils.engine.cuda import CompileError
from utils.engine.decode_engine import NeoxDecode
from utils.engine.weights import why_not
from utils.errors import UsageError
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


class Decoder:
    """모델 하나와 KV cache를 쥐고 답을 만든다. 한 번에 답 하나만 만든다.

    Args:
        end_ids: 답을 끝내는 토큰들. 어느 것이 나와도 멈춘다.
        longest: 질문과 답을 합친 길이를 이보다 짧게 잡는다.

    Attributes:
        path: 고른 길과 그 까닭 한 줄.
        finish_reason: 마지막 답이 끝난 까닭. "stop"(끝 토큰), "length"(길이), "cancelled"(멈춤).
        stats: 마지막 답의 통계.
        context: 질문과 답을 합친 길이의 한계(토큰).
        n_rows: 입력 embedding의 행 수. 이보다 큰 번호의 토큰은 읽지 못한다.
    """

    def __init__(self, model, tokenizer, end_ids: Collection[int], longest: int | None = None):
        config = model.config.get_text_config(decoder=True)
        self.end_ids = frozenset(end_ids)
        self.context = int(getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length)
        if longest is not None:  # KV cache는 이 길이만큼만 잡힌다
            self.context = min(self.context, longest)
        self.finish_reason = "length"
        self.stats = Stats()
        model.eval()
        self._tokenizer = tokenizer
        self.n_rows = model.get_input_embeddings().weight.shape[0]
        self._engine, self.path = _engine(model, self.context, min(len(tokenizer), config.vocab_size))

    def use_adapter(self, on: bool) -> None:
        """어댑터를 켜거나 끈다. 끄면 기반 모델이 답한다. 모델을 다시 올리지 않는다."""
        self._engine.use_adapter(on)

    def stream(self, input_ids: list[int], settings: Sampling, stop: threading.Event | None = None) -> Iterator[int]:
        """답의 토큰을 하나씩 내놓는다. 끝 토큰은 내놓지 않는다.

        Args:
            input_ids: 질문의 토큰.
            settings: 고르는 설정. `max_new_tokens`가 남은 자리보다 크면 남은 자리까지만 만든다.
            stop: 켜지면 한 토큰 안에 멈춘다.

        Raises:
            UsageError: 질문이 비었거나, 모델이 읽을 수 있는 길이를 넘거나, 모델이 모르는 토큰이 들어 있다.
        """
        if not input_ids:
            raise UsageError("질문이 비어 있다")
        require_known_ids(input_ids, self.n_rows, self._tokenizer, "질문")
        room = self.context - len(input_ids)
        if room < 1:
            raise UsageError(f"질문이 너무 길다: {len(input_ids)}토큰. "
                             f"이 모델은 질문과 답을 합쳐 {self.context}토큰까지 읽는다. 질문을 줄인다")
        return self._answer(input_ids, settings, min(settings.max_new_tokens, room), stop or threading.Event())

    @torch.inference_mode()
    def _answer(self, input_ids: list[int], settings: Sampling, limit: int, stop: threading.Event) -> Iterator[int]:
        self.finish_reason, self.stats = "cancelled", Stats()
        started, first = time.perf_counter(), 0.0
        if stop.is_set():
            return
        for count, token in enumerate(self._engine.tokens(input_ids, settings, limit), start=1):
            now = time.perf_counter()
            if token in self.end_ids:
                self.finish_reason = "stop"
                return
            first = first or now
            speed = (count - 1) / (now - first) if count > 1 else 0.0
            self.stats = Stats(count, first - started, speed)
            self.finish_reason = "length" if count == limit else "cancelled"
            yield token
            if stop.is_set() and count < limit:
                return


def _engine(model, context: int, vocab: int) -> tuple[NeoxDecode | ForwardDecode, str]:
    """쓸 수 있는 가장 빠른 길과 그것을 고른 까닭."""
    reason = why_not(model)
    if reason is None:
        try:
            engine = NeoxDecode(model, vocab)
            return engine, engine.path
        except CompileError as error:
            reason = f"커널을 컴파일하지 못함: {str(error).splitlines()[0][:100]}"
    engine = ForwardDecode(model, context, vocab)
    return engine, f"{engine.path} - 전용 커널을 쓰지 않은 까닭: {reason}"
