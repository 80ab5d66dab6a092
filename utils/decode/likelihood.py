"""주어진 글의 토큰마다의 로그 가능도: 모델이 그 토큰을 얼마나 그럴듯하게 보는지와, 그 자리에서 가장 그럴듯한 토큰들."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROWS = 16            # 한 번의 forward로 함께 읽는 글의 수
LOGITS = 1 << 28     # 한 번의 forward가 만드는 로짓의 최대 수. 글이 길거나 어휘가 크면 함께 읽는 글을 줄인다
CHUNK = 256          # fp32로 바꾸어 softmax를 구하는 토큰의 수


@dataclass(frozen=True)
class Likelihood:
    """글 하나(토큰 n개)의 가능도. 첫 토큰은 앞의 글이 없어 재지 않는다.

    Attributes:
        logprobs: log p(토큰 i + 1 | 토큰 0..i), n - 1개.
        top: 같은 자리마다 가장 그럴듯한 (토큰 번호, 로그 가능도)들. 그럴듯한 것부터다.
    """

    logprobs: list[float]
    top: list[list[tuple[int, float]]]


@torch.inference_mode()
def token_logprobs(model, rows: Sequence[Sequence[int]], top: int = 0) -> list[Likelihood]:
    """글마다 토큰의 로그 가능도. 온도와 벌점을 거치지 않은 모델 그대로의 값이고, softmax는 어휘 전체에서 구한다.

    모자라는 줄의 오른쪽을 채운다. 앞의 토큰은 뒤의 것을 보지 않으므로 mask가 필요 없고 값도 바뀌지 않는다.

    Args:
        model: transformers의 causal LM이나 그 위의 PeftModel. 어댑터는 켜져 있는 대로 쓴다.
        rows: 글마다의 토큰 번호. 하나 이상이다.
        top: 자리마다 함께 줄 가장 그럴듯한 토큰의 수.
    """
    device = next(model.parameters()).device
    vocab = model.get_output_embeddings().weight.shape[0]
    found: list[Likelihood] = []
    while len(found) < len(rows):
        group = rows[len(found) : len(found) + ROWS]
        longest = max(map(len, group))
        group = group[: max(1, LOGITS // (longest * vocab))]
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in group], device=device)
        logits = model(input_ids=ids, use_cache=False).logits
        found += [_measure(logits[index, : len(row) - 1], ids[index, 1 : len(row)], top)
                  for index, row in enumerate(group)]
    return found


def _measure(logits: torch.Tensor, targets: torch.Tensor, top: int) -> Likelihood:
    """logits [n - 1, vocab], targets [n - 1] -> 가능도."""
    chosen: list[float] = []
    best: list[list[tuple[int, float]]] = []
    for begin in range(0, len(targets), CHUNK):
        part = slice(begin, begin + CHUNK)
        scores = logits[part].float().log_softmax(-1)
        chosen += scores.gather(1, targets[part, None])[:, 0].tolist()
        values, indices = scores.topk(min(top, scores.shape[-1]))
        best += [list(zip(*pair, strict=True)) for pair in zip(indices.tolist(), values.tolist(), strict=True)]
    return Likelihood(chosen, best)
