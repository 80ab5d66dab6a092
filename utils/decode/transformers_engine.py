"""transformers의 forward로 답을 만드는 길. 어떤 causal LM이든 되고, 질문 여럿에 한꺼번에 답할 수 있다."""

import inspect
import math
import time
from collections.abc import Iterator, Sequence

import psutil
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from utils.decode.forward_step import CapturedStep, EagerStep, FreshStep, RereadStep
from utils.engine.families import rotary_edge
from utils.errors import first_line
from utils.model import vram
from utils.model.adapter import base_of
from utils.sampling import Sampling, pick

ROWS = 16      # 한꺼번에 답하는 질문의 수
GROW = 1024    # KV cache가 자라는 단위(토큰)
PROBE = 12     # cache를 시험하는 글의 길이(토큰)
# 계산 dtype -> cache로 나누어 읽은 로짓이 한 번에 읽은 것과 다를 수 있는 비율. 행렬 곱의 모양이 달라 반올림이 다르다
AGREE = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.3}
SPARE = 300e6  # 활성값과 CUDA graph에 남겨 두는 바이트


class ForwardDecode:
    """KV cache를 쓰는 forward를 토큰마다 한 번 부른다. GPU에서는 그 한 번을 CUDA graph로 캡처해 본다.

    GPU의 KV cache는 질문과 답의 길이만큼만 잡고, 더 긴 대화가 오면 다시 잡는다. 모델이 읽을 수 있는 길이만큼 미리
    잡으면 Qwen3-1.7B(40,960토큰)에서 4.7 GB가 든다.

    Attributes:
        path: 이 길을 설명하는 한 줄.
    """

    def __init__(self, model, context: int, vocab: int):
        self._model = model
        self._context = context
        self._vocab = vocab
        causal_lm = base_of(model)
        parameters = inspect.signature(causal_lm.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._config = causal_lm.config
        self._device = next(model.parameters()).device
        self._edge = rotary_edge(self._config.get_text_config(decoder=True))
        self._token_bytes = kv_bytes(self._config, causal_lm.dtype)
        layers = DynamicCache(config=self._config).layers
        self._only_attention = all(isinstance(layer, DynamicLayer) for layer in layers)
        # 왼쪽을 채워도 되는 것은 attention뿐이다. 순환하는 층(Mamba 등)은 채운 자리까지 읽는다
        self._can_batch = bool(self._token_bytes) and self._only_attention
        self._adapter_on = True
        self._step: CapturedStep | None = None
        self._not_captured = "" if self._device.type == "cuda" else self._device.type
        self.path = f"transformers forward({self._device.type})"
        self._cached = self._cache_agrees()
        if not self._cached:
            self._can_batch = False
            self.path += ", cache 없이 토큰마다 처음부터 다시 계산"
        elif self._device.type == "cuda":
            self._static_step(1, min(context, GROW))

    def use_adapter(self, on: bool) -> None:
        """PEFT 모델이면 어댑터를 켜거나 끈다. 다른 모델에서는 하는 일이 없다."""
        if hasattr(self._model, "disable_adapter_layers"):
            self._model.enable_adapter_layers() if on else self._model.disable_adapter_layers()
            self._adapter_on = on

    def room(self, tokens: int) -> int:
        """질문과 답을 합쳐 `tokens`개 가운데 지금 메모리에 담을 수 있는 토큰의 수."""
        return min(tokens, self._context, int(self._free_bytes() / max(1, self._token_bytes)))

    def tokens(self, input_ids: list[int], settings: Sampling, limit: int) -> Iterator[int]:
        """토큰을 최대 `limit`개 내놓는다. 끝 토큰에서 멈추는 일은 부르는 쪽이 한다."""
        generator = torch.Generator(self._device).manual_seed(settings.seed_number())
        step = self._start([input_ids], len(input_ids) + limit)
        answer, logits = [], step.read([input_ids])
        while True:
            answer.append(pick(logits[0], answer, settings, generator))
            yield answer[-1]
            if len(answer) == limit:
                return
            logits = step.next([answer[-1]])

    def answer_rows(self, questions: list[list[int]], settings: Sampling, limits: list[int],
                    end_ids: Sequence[int], until: float = math.inf) -> list[list[int]]:
        """질문 여럿에 `ROWS`개씩 한 번의 forward로 함께 답한다. 탐욕적으로 고르면 하나씩 답한 것과 같다.

        Args:
            limits: 질문마다의 최대 토큰 수.
            end_ids: 답을 끝내는 토큰들.
            until: `time.perf_counter()`가 이때가 되면 만든 데까지만 준다.

        Returns:
            질문마다의 토큰. 끝 토큰으로 끝난 답에는 그 토큰이 맨 뒤에 있다.
        """
        answers: list[list[int]] = []
        while len(answers) < len(questions):
            begin = len(answers)
            rows = self._rows_that_fit(questions[begin : begin + ROWS], max(limits))
            group = slice(begin, begin + rows)
            answers += self._answer_group(questions[group], limits[group], settings, end_ids, until)
        return answers

    def _answer_group(self, questions: list[list[int]], limits: list[int], settings: Sampling,
                      end_ids: Sequence[int], until: float) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in questions]
        if time.perf_counter() > until:
            return answers
        # 줄마다 제 난수를 쓴다. 시드를 정했으면 함께 물은 답이 혼자 물은 답과 같다
        generators = [torch.Generator(self._device).manual_seed(settings.seed_number()) for _ in questions]
        plain = (settings.temperature, settings.repetition_penalty, settings.no_repeat_ngram_size) == (0, 1, 0)
        step = self._start(questions, max(map(len, questions)) + max(limits))
        logits = step.read(questions)
        while True:
            greedy = logits.argmax(-1).tolist()  # GPU를 줄마다 기다리지 않게 한 번에 가져온다
            for row, answer in enumerate(answers):
                if not _finished(answer, limits[row], end_ids):
                    answer.append(greedy[row] if plain else pick(logits[row], answer, settings, generators[row]))
            done = all(_finished(answer, limits[row], end_ids) for row, answer in enumerate(answers))
            if done or time.perf_counter() > until:
                return answers
            # 먼저 끝난 줄에도 마지막 토큰을 다시 먹인다. 모양 [rows, 1]을 지키려는 것이고, 그 줄의 로짓은 버린다
            logits = step.next([answer[-1] for answer in answers])

    def _rows_that_fit(self, questions: list[list[int]], limit: int) -> int:
        """함께 답할 질문의 수. 함께 답할 수 없는 구조이거나 문맥이나 메모리가 모자라면 하나씩 답한다.

        먼저 끝난 줄도 다른 줄이 끝날 때까지 자리가 늘어난다. 가장 긴 질문이 가장 긴 답을 해도 문맥 안이어야 한다.
        """
        tokens = max(map(len, questions)) + limit
        enough = self._free_bytes() >= ROWS * (tokens + GROW) * self._token_bytes
        can_batch = self._can_batch and tokens <= min(self._context, self._edge)
        return len(questions) if can_batch and enough else 1

    def _cache_agrees(self) -> bool:
        """짧은 글을 cache로 나누어 읽은 로짓이 한 번에 읽은 것과 같은가. cache를 모르는 구조는 조용히 틀린다."""
        generator = torch.Generator().manual_seed(0)
        length = max(3, min(PROBE, self._context))
        ids = torch.randint(self._vocab, (length,), generator=generator).tolist()
        whole = FreshStep(self._forward, self._device).read([ids])
        try:
            step = EagerStep(self._forward, self._new_cache(), self._device)
            step.read([ids[:-2]])
            step.next([ids[-2]])
            apart = step.next([ids[-1]]) - whole
        except torch.OutOfMemoryError:
            raise
        except Exception:  # 제 cache만 받거나, 부르는 모양이 다른 구조다
            return False
        limit = AGREE.get(whole.dtype, AGREE[torch.float32])
        # 로짓에 같은 수를 더해도 확률은 같으므로, 평균을 뺀 크기에 비해 얼마나 다른지 잰다
        spread = float((whole - whole.mean()).norm())
        return float(apart.norm()) <= limit * spread

    def _new_cache(self) -> DynamicCache:
        """빈 KV cache. 미끄러지는 창이 있어도 K와 V를 버리지 않는다: 설정에만 창이 있고 mask에는 없는 구조가 있다."""
        return DynamicCache() if self._only_attention else DynamicCache(config=self._config)

    def _start(self, questions: list[list[int]], tokens: int):
        """질문들을 읽을 준비가 된 단계. 캡처하지 않는 길은 답마다 새 cache를 쓴다."""
        if not self._cached:
            return FreshStep(self._forward, self._device)
        if tokens > self._edge:
            return RereadStep(self._forward, self._new_cache, self._device, self._edge)
        if not self._not_captured:
            step = self._static_step(1 if len(questions) == 1 else ROWS, tokens)
            if step is not None:
                step.reset()
                return step
        return EagerStep(self._forward, self._new_cache(), self._device)

    def _static_step(self, rows: int, tokens: int) -> CapturedStep | None:
        """`rows`줄, `tokens`토큰을 담는 캡처된 단계. 지금 것이 작으면 버리고 새로 만든다. 캡처할 수 없으면 None."""
        capacity = min(self._context, -(-tokens // GROW) * GROW)  # GROW의 배수로 올린다. 조금 긴 다음 답도 다시 쓴다
        window = _smallest_window(self._config)
        if window and capacity > window:  # 창을 넘긴 StaticCache는 토큰마다 다른 일을 하므로 캡처할 수 없다
            return None
        step = self._step
        if step is None or step.rows != rows or step.capacity < tokens or step.adapter_on != self._adapter_on:
            self._step = step = None  # 새것을 잡기 전에 옛것의 메모리를 돌려준다
            try:
                step = CapturedStep(self._forward, self._config, self._device, rows, capacity)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._not_captured = f"CUDA graph로 캡처하지 못함: {first_line(error)}"
                self.path = f"transformers forward(cuda, {self._not_captured})"
                return None
            step.adapter_on = self._adapter_on
            self._step = step
            self.path = "transformers forward(cuda, CUDA graph)"
        return step

    @torch.inference_mode()
    def _forward(self, input_ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None,
                 cache) -> torch.Tensor:
        """input_ids, positions [rows, T] -> 마지막 토큰의 로짓 [rows, vocab]. mask [rows, 지금까지]: 0은 채운 자리."""
        extra = {} if mask is None else {"attention_mask": mask}
        if cache is not None:
            extra[self._cache_name] = cache
        output = self._model(input_ids=input_ids, position_ids=positions, use_cache=cache is not None,
                             logits_to_keep=1, **extra)
        return output.logits[:, -1, : self._vocab]

    def _free_bytes(self) -> float:
        if self._device.type != "cuda":
            return psutil.virtual_memory().available
        held = self._step.rows * self._step.capacity * self._token_bytes if self._step else 0  # 새로 잡을 때 돌려준다
        return vram.left(self._device) + held - SPARE


def kv_bytes(config, dtype: torch.dtype) -> int:
    """토큰 하나의 K와 V가 모든 층에서 차지하는 바이트. 모르는 구조면 0이다."""
    text = config.get_text_config(decoder=True)
    try:
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        per_layer = 2 * kv_heads * head_dim  # K와 V
        return text.num_hidden_layers * per_layer * dtype.itemsize
    except (AttributeError, RuntimeError):  # 그런 값이 없거나, 층마다 달라 하나로 답하지 못한다
        return 0


def _smallest_window(config) -> int | None:
    """미끄러지는 창이 있는 층의 창. 없으면 None."""
    cache = StaticCache(config=config, max_cache_len=2**30)
    windows = [layer.max_cache_len for layer in cache.layers if getattr(layer, "is_sliding", False)]
    return min(windows, default=None)


def _finished(answer: list[int], limit: int, end_ids: Sequence[int]) -> bool:
    return len(answer) >= limit or (bool(answer) and answer[-1] in end_ids)
