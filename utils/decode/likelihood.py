"""이미 있는 글의 로그 가능도: 문맥 뒤에 그 글이 이어질 확률을 토큰마다 잰다. 답을 만들지 않고 forward로 안다."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from utils.engine.families import rotary_edge
from utils.model import vram
from utils.model.adapter import base_of

ROW_TOKENS = 8192         # forward 한 번에 읽는 토큰의 수(채운 것까지)
LOGIT_BYTES = 128 << 20   # forward 한 번이 만드는 fp32 로짓의 크기
Pair = tuple[Sequence[int], Sequence[int]]  # (문맥의 토큰, 이어지는 글의 토큰). 둘 다 하나 이상이다


@dataclass(frozen=True)
class Likelihood:
    """이어지는 글 하나의 로그 확률. n은 그 글의 토큰 수다.

    Attributes:
        logprobs: 토큰마다의 로그 확률(nat). [n] float32.
        top_ids: 자리마다 가장 그럴듯한 토큰들. 그럴듯한 차례다. [n, top] int64.
        top_logprobs: 그 토큰들의 로그 확률(nat). [n, top] float32.
        greedy: 늘 가장 그럴듯한 토큰을 고르면 바로 이 글이 나오는가.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    greedy: bool

    @property
    def total(self) -> float:
        """글 전체의 로그 확률(nat)."""
        return float(self.logprobs.sum(dtype=np.float64))


@torch.inference_mode()
def measure(model, pairs: Sequence[Pair], top: int = 1,
            told: Callable[[int], None] = lambda count: None) -> list[Likelihood]:
    """문맥마다 이어지는 글의 로그 가능도를, 길이가 비슷한 것끼리 묶은 forward로 잰다.

    짧은 줄은 오른쪽을 채운다. causal 모델의 앞 토큰은 뒤의 토큰을 보지 않으므로 mask가 없어도 값이 같다.
    어댑터를 켜고 끄는 일과 `eval()`은 부르는 쪽이 한다.

    Args:
        pairs: (문맥, 이어지는 글)의 토큰들.
        top: 자리마다 함께 돌려줄 그럴듯한 토큰의 수. 1 이상.
        told: forward마다 그 묶음에서 잰 글의 수를 받는다.

    Returns:
        `pairs`의 차례대로의 값.
    """
    results: dict[int, Likelihood] = {}
    vocab = model.get_output_embeddings().weight.shape[0]
    lengths = [len(context) + len(tokens) for context, tokens in pairs]
    order = sorted(range(len(pairs)), key=lambda index: lengths[index])  # 길이가 같으면 `pairs`의 차례 그대로다
    edge = rotary_edge(base_of(model).config.get_text_config(decoder=True))
    for batch in _batches([(index, *pairs[index]) for index in order], vocab, edge):
        for (index, _, _), value in zip(batch, _measure_batch(model, batch, top), strict=True):
            results[index] = value
        told(len(batch))
    return [results[index] for index in range(len(pairs))]


def _batches(rows: list[tuple[int, Sequence[int], Sequence[int]]], vocab: int,
             edge: float = math.inf) -> Iterator[list]:
    """길이의 차례로 놓인 줄들을 두 한계를 넘지 않게 묶는다. 줄 하나가 한계를 넘으면 혼자 간다.

    Args:
        edge: 이보다 긴 줄은 짧은 줄과 묶지 않는다(`rotary_edge`).
    """
    batch: list = []
    for row in rows:
        together = [*batch, row]
        length, kept = _shape(together)
        tokens = len(together) * length
        logit_bytes = 4 * len(together) * kept * vocab
        crosses = length > edge >= _shape([batch[0]])[0] if batch else False
        if batch and (crosses or tokens > ROW_TOKENS or logit_bytes > LOGIT_BYTES):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _shape(batch: list) -> tuple[int, int]:
    """(줄의 길이, 로짓이 드는 자리의 수). 줄 안의 마지막 토큰은 아무것도 예측하지 않으므로 읽지 않는다."""
    length = max(len(context) + len(tokens) for _, context, tokens in batch) - 1
    return length, length - _first(batch)


def _first(batch: list) -> int:
    """묶음에서 로짓이 드는 첫 자리: 가장 짧은 문맥의 마지막 토큰이 이어지는 글의 첫 토큰을 예측한다."""
    return min(len(context) for _, context, _ in batch) - 1


def _measure_batch(model, batch: list, top: int) -> list[Likelihood]:
    logits = None
    try:
        with vram.shortage():
            logits = _logits(model, batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    if logits is None:  # 오류가 중간값을 붙들므로 except의 밖에서 나누어 잰다
        half = len(batch) // 2
        return _measure_batch(model, batch[:half], top) + _measure_batch(model, batch[half:], top)
    first = _first(batch)
    targets = torch.tensor([token for _, _, tokens in batch for token in tokens], device=logits.device)
    sizes = [len(tokens) for _, _, tokens in batch]
    found = []
    for row, ((_, context, tokens), wanted) in enumerate(zip(batch, targets.split(sizes), strict=True)):
        # 문맥의 마지막 토큰의 로짓이 이어지는 글의 첫 토큰을 예측한다. `logits`는 first번째 자리부터다
        begin = len(context) - 1 - first
        scores = logits[row, begin : begin + len(tokens)].float().log_softmax(-1)  # [n, vocab]
        chosen = scores.gather(-1, wanted[:, None])[:, 0]  # [n]: 자리마다 실제 토큰의 로그 확률
        best, ids = scores.topk(top, -1)  # [n, top]
        found.append((chosen, ids, best, scores.argmax(-1) == wanted))
    # 줄마다 기다리지 않고 한 번에 옮긴다
    columns = [torch.cat(column).cpu().split(sizes) for column in zip(*found, strict=True)]
    return [Likelihood(chosen.numpy(), ids.numpy(), best.numpy(), bool(greedy.all()))
            for chosen, ids, best, greedy in zip(*columns, strict=True)]


def _logits(model, batch: list) -> torch.Tensor:
    """`_first(batch)`부터의 로짓 [줄, 자리, vocab]."""
    length, kept = _shape(batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    for row, (_, context, tokens) in enumerate(batch):
        line = torch.tensor([*context, *tokens[:-1]], dtype=torch.long)
        ids[row, : len(line)] = line
    causal_lm = base_of(model)
    can_keep = "logits_to_keep" in inspect.signature(causal_lm.forward).parameters
    extra = {"logits_to_keep": kept} if can_keep else {}  # 출력 행렬은 필요한 자리에만 곱한다
    return model(input_ids=ids.to(model.device), use_cache=False, **extra).logits[:, -kept:]
