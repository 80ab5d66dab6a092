"""다음 토큰을 고르는 규칙: 반복 페널티, 자르기, 샘플링. 로짓 [vocab]과 이미 나온 답에서 토큰 번호 하나로."""

import random
from dataclasses import dataclass

import torch

from utils.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """답 하나를 만드는 설정. 페널티와 반복 금지는 답에만 걸리므로 답이 질문을 인용할 수 있다.

    Attributes:
        temperature: 0이면 늘 가장 그럴듯한 토큰을 고른다.
        top_p: 확률이 큰 토큰부터 더해 이 값에 닿을 때까지만 남긴다. 1이면 자르지 않는다.
        top_k: 가장 그럴듯한 k개만 남긴다. 0이면 자르지 않는다.
        max_new_tokens: 답의 최대 길이(토큰).
        repetition_penalty: 답에 이미 나온 토큰의 로짓을 이만큼 나누거나(양수) 곱한다(음수). 1이면 없다.
        no_repeat_ngram_size: 답에 이미 나온 n-gram을 다시 만들지 않는다. 0이면 막지 않는다.
        seed: 샘플링의 시드. None이면 매번 다르다.

    Raises:
        UsageError: 값이 범위를 벗어났다.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 40
    max_new_tokens: int = 256
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None

    def __post_init__(self):
        rules = [
            (0 <= self.temperature <= 100, "temperature", "0에서 100까지"),
            (0 < self.top_p <= 1, "top_p", "0 초과 1 이하"),
            (self.top_k >= 0, "top_k", "0 이상"),
            (self.max_new_tokens >= 1, "max_new_tokens", "1 이상"),
            (0.01 <= self.repetition_penalty <= 100, "repetition_penalty", "0.01에서 100까지"),
            (self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", "0 이상"),
        ]
        for holds, name, allowed in rules:
            if not holds:
                raise UsageError(f"{name}의 범위는 {allowed}이다. 받은 값: {getattr(self, name)}")

    def seed_number(self) -> int:
        """실제로 쓸 시드(0 이상, 2^63 미만)."""
        return random.SystemRandom().getrandbits(63) if self.seed is None else self.seed % 2**63


GREEDY = Sampling(temperature=0.0)  # 늘 가장 그럴듯한 토큰을 고르므로 다시 물어도 같다


def banned_by_ngram(answer: list[int], size: int) -> list[int]:
    """`answer` 뒤에 오면 길이 `size`의 n-gram을 되풀이하게 되는 토큰들."""
    if size < 1 or len(answer) < size:
        return []
    before = size - 1  # n-gram의 마지막 토큰 앞에 오는 것의 수
    tail = answer[len(answer) - before :]
    return [answer[end] for end in range(before, len(answer)) if answer[end - before : end] == tail]


BROKEN_LOGITS = "다음 토큰의 확률이 수가 아니다(NaN). 모델이나 어댑터의 가중치가 깨졌거나 잘못 배웠다"


def penalize(logits: torch.Tensor, answer: list[int], settings: Sampling) -> torch.Tensor:
    """답에 이미 나온 토큰에 페널티를 주고 되풀이되는 n-gram을 막은 로짓 [vocab]."""
    logits = logits.float()
    if not answer or (settings.repetition_penalty == 1 and settings.no_repeat_ngram_size == 0):
        return logits
    logits = logits.clone()
    if settings.repetition_penalty != 1:
        used = torch.tensor(sorted(set(answer)), device=logits.device)
        scores = logits[used]
        penalty = settings.repetition_penalty
        logits[used] = torch.where(scores < 0, scores * penalty, scores / penalty)
    banned = banned_by_ngram(answer, settings.no_repeat_ngram_size)
    if banned:
        logits[torch.tensor(banned, device=logits.device)] = -torch.inf
    return logits


def probabilities(logits: torch.Tensor, settings: Sampling) -> torch.Tensor:
    """온도, top-k, top-p를 차례로 적용한 확률 [vocab]. transformers의 `generate`와 같은 차례다."""
    scores = logits / settings.temperature
    if 0 < settings.top_k < scores.numel():
        scores = scores.masked_fill(scores < scores.topk(settings.top_k).values[-1], -torch.inf)
    chances = scores.softmax(-1)
    if settings.top_p < 1:
        ranked, order = chances.sort(descending=True)
        above = ranked.cumsum(0) - ranked
        chances[order[above >= settings.top_p]] = 0
        chances /= chances.sum()
    return chances


def pick(logits: torch.Tensor, answer: list[int], settings: Sampling, generator: torch.Generator) -> int:
    """로짓 [vocab]에서 다음 토큰을 고른다. `generator`는 로짓과 같은 장치에 있어야 한다."""
    logits = penalize(logits, answer, settings)
    if settings.temperature == 0:
        return int(logits.argmax())
    try:
        return int(torch.multinomial(probabilities(logits, settings), 1, generator=generator))
    except RuntimeError:
        if not (logits.isnan() | logits.isposinf()).any():
            raise
        raise UsageError(BROKEN_LOGITS) from None
