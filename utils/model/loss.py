"""출력 행렬과 cross entropy를 토큰 조각마다 계산한다. logits 전체를 메모리에 두지 않는다."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from utils.data.blocks import IGNORE

HEAD_CHUNK = 512  # 손실을 한 번에 계산하는 토큰 수. logits는 [HEAD_CHUNK, 어휘] 크기로만 존재한다
LOGIT_UNIT = 8  # logits의 행이 시작하는 단위. 커널이 16바이트(16비트 8개)씩 읽는다
PROBE_TOKENS = 8  # 출력 행렬 뒤의 계산을 재는 글의 길이
STRAIGHT = 0.02  # 잰 비율과의 차이가 이 비율보다 작으면 같은 것으로 본다. bf16의 반올림은 0.004다
CAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True)
class Head:
    """마지막 은닉값에서 logits까지의 계산: `cap * tanh(scale * (W h + b) / cap)`.

    Attributes:
        weight: 얼어 있는 출력 행렬 [vocab, hidden].
        bias: [vocab]. 없으면 None.
        scale: logits에 곱하는 수.
        cap: logits의 부드러운 한계. 없으면 None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """토큰마다의 음의 로그 가능도 [tokens]를 fp32로 돌려주고, `factor`가 있으면 logits를 그 gradient로 덮어쓴다.

    토큰 하나의 logits를 x, 정답을 y라 하면 nll = logsumexp(x) - x[y]이고,
    d nll / d x[v] = exp(x[v] - logsumexp(x)) - (v == y) = softmax(x)[v] - onehot(y)[v]이다.

    Args:
        logits: [tokens, vocab]. 제자리에서 `factor * (softmax - onehot)`이 된다.
        targets: [tokens]. -100은 세지 않는다.
        factor: 손실에 곱하는 스칼라 tensor. None이면 gradient를 구하지 않는다.
    """
    counted = targets != IGNORE
    index = targets.clamp(min=0)[:, None]  # -100은 없는 칸이므로 0번을 가리키게 두고 나중에 버린다
    scores = logits.float()
    log_sum = scores.logsumexp(-1)
    nll = torch.where(counted, log_sum - scores.gather(1, index)[:, 0], 0.0)
    if factor is not None:
        gradient = scores.sub_(log_sum[:, None]).exp_()  # softmax(x) [tokens, vocab], 새로 잡지 않고 scores의 자리에
        gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))  # 정답의 칸에서 1을 뺀다
        logits.copy_(gradient.mul_((factor * counted)[:, None]))  # 세지 않는 토큰은 0이 된다
    return nll


def pad_vocab(vocab: int) -> int:
    """logits의 행 사이의 간격."""
    return -(-vocab // LOGIT_UNIT) * LOGIT_UNIT


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, factor: torch.Tensor | None = None,
              gradient: torch.Tensor | None = None, buffer: torch.Tensor | None = None, cross_entropy=cross_entropy_,
              head: Head | None = None) -> torch.Tensor:
    """마지막 은닉값에서 손실을 몇 토큰씩 구한다. 전체 logits는 어느 때에도 만들어지지 않는다.

    앞으로는 z = s (W h + b), x = c tanh(z / c)이고(한계가 없으면 x = z), 뒤로는 연쇄 법칙을 거꾸로 따른다:
    dz = dx (1 - tanh(z / c)^2), dh = W^T (s dz). W와 b는 얼어 있어 gradient가 없다.

    Args:
        hidden: [tokens, hidden].
        weight: 얼어 있는 출력 행렬 [vocab, hidden].
        targets: [tokens], 한 칸 당겨진 정답.
        factor: 손실에 곱하는 스칼라. `gradient`와 함께 준다.
        gradient: [tokens, hidden]. `factor * 손실`의 hidden에 대한 gradient가 적힌다.
        buffer: logits를 적을 1차원 자리. 들어가는 만큼씩 계산한다. None이면 HEAD_CHUNK 토큰의 자리를 잡는다.
        head: 행렬 곱 말고도 하는 일이 있으면 준다. None이면 logits는 `W h`다.

    Returns:
        토큰마다의 음의 로그 가능도 [tokens], fp32.
    """
    tokens, vocab = len(hidden), len(weight)
    row = pad_vocab(vocab)
    head = head or Head(weight)
    if buffer is None:
        buffer = hidden.new_empty(min(HEAD_CHUNK, tokens) * row)
    chunk = buffer.numel() // row  # 한 번에 계산할 토큰의 수
    nll = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        logits = buffer[:(part.stop - start) * row].view(-1, row)[:, :vocab]
        torch.mm(hidden[part], weight.t(), out=logits)
        if head.bias is not None:
            logits.add_(head.bias)
        if head.scale != 1.0:
            logits.mul_(head.scale)
        slope = None  # tanh의 기울기 [tokens, vocab]. cross_entropy가 logits를 덮어쓰기 전에 구한다
        if head.cap is not None:
            bent = logits.div_(head.cap).tanh_()
            slope = None if gradient is None else 1 - bent * bent
            logits.mul_(head.cap)
        nll[part] = cross_entropy(logits, targets[part], factor)
        if gradient is not None:
            if slope is not None:
                logits.mul_(slope)
            if head.scale != 1.0:
                logits.mul_(head.scale)
            torch.mm(logits, weight, out=gradient[part])
    return nll


def measure_head(causal: nn.Module) -> Head | None:
    """모델이 출력 행렬의 결과에 더 하는 일을 짧은 글로 재어 알아낸다.

    같은 이름의 설정도 구조에 따라 곱하기도 나누기도 한다(Granite와 HyperCLOVAX의 `logits_scaling`). 그래서 이름을
    믿지 않고 비율을 재고, 정확한 수는 그 비율에 맞는 설정의 값에서 가져온다.

    Returns:
        알아낸 계산. `Head`로 적을 수 없는 모델이면 None이고, 그때는 모델의 logits를 그대로 쓴다.
    """
    head = causal.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad:
        return None
    raw = []
    hook = head.register_forward_hook(lambda module, inputs, output: raw.append(output.detach().double()))
    training = causal.training
    causal.eval()
    try:
        with torch.no_grad():
            rows = causal.get_input_embeddings().weight.shape[0]
            apart = max(1, rows // PROBE_TOKENS)  # 어휘에서 고르게 떨어진 토큰들 [1, PROBE_TOKENS]
            ids = torch.arange(PROBE_TOKENS, device=head.weight.device)[None] * apart % rows
            final = causal(input_ids=ids, use_cache=False).logits.double()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # 이렇게는 부를 수 없는 구조다. 시작할 때의 비교가 어느 길로 갈지 가린다
        return None
    finally:
        hook.remove()
        causal.train(training)
    if len(raw) != 1 or raw[0].shape != final.shape:
        return None
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    text = causal.config.get_text_config(decoder=True)
    caps = {getattr(text, name, None) for name in CAPS} | {None}
    best, least = None, math.inf
    for cap in caps:
        fit = _measure_scale(raw[0], final, cap, text)
        if fit is None:
            continue
        # 값이 작은 logits는 한계에 닿지 않아 가릴 수 없다. 그때는 설정에 적힌 한계를 믿는다
        rough = fit.rough if cap else 1.5 * fit.rough
        if rough < least:
            best, least = Head(weight, bias, fit.scale, cap), rough
    return best


class _Fit(NamedTuple):
    """알아낸 배율과, 그것으로 설명하지 못하고 남는 비율."""

    scale: float
    rough: float


def _measure_scale(raw: torch.Tensor, final: torch.Tensor, cap: float | None, config) -> _Fit | None:
    """`final = cap * tanh(scale * raw / cap)`인 scale. 그런 수가 없으면 None이다.

    Args:
        raw, final: 출력 행렬이 낸 것과 모델이 내놓은 logits. [1, PROBE_TOKENS, vocab] fp64.
    """
    straight = final
    if cap is not None:
        inside = final.abs() < cap / 2  # 한계에 가까우면 되돌린 값이 거칠다
        raw, straight = raw[inside], torch.atanh(final[inside] / cap) * cap
    # 최소제곱: sum (straight - m raw)^2을 가장 작게 하는 m = sum(raw straight) / sum(raw^2)
    size = raw.square().sum()
    if not size > 0:
        return None
    measured = float((raw * straight).sum() / size)
    rough = float((straight - measured * raw).norm() / straight.norm())
    numbers = [value for value in config.to_dict().values() if type(value) in (int, float) and value]
    known = [1.0, *map(float, numbers), *(1 / value for value in numbers)]
    nearest = min(known, key=lambda value: abs(measured / value - 1))
    is_straight = rough < STRAIGHT and abs(measured / nearest - 1) < STRAIGHT
    return _Fit(nearest, rough) if is_straight else None
