"""어떤 causal LM이든 자동미분으로 도는 micro-step과, 모든 micro-step이 함께 쓰는 조각 손실과 문서 경계를 맡는다.

micro-step은 `[rows, block]` 모양의 블록 몇 개를 받아 gradient를 `.grad`에 더하고 손실을 돌려준다. GPT-NeoX는
`utils/engine/train_step.py`의 손으로 쓴 길을, 다른 구조는 여기의 `AutogradStep`을 쓴다.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import nn

IGNORE = -100
HEAD_CHUNK = 512  # 손실을 한 번에 계산하는 토큰 수. logits는 [HEAD_CHUNK, 어휘] 크기로만 존재한다
PROBE_TOKENS = 8  # 출력 행렬 뒤의 계산을 재는 글의 길이
STRAIGHT = 0.02  # 잰 비율과의 차이가 이 비율보다 작으면 같은 것으로 본다. bf16의 반올림은 0.004다
CAPS = ("final_logit_softcapping", "logits_soft_cap")


def shifted_targets(labels: torch.Tensor) -> torch.Tensor:
    """`labels`를 한 칸 당긴 다음 토큰의 정답. 블록의 마지막 자리는 정답이 없다. 모양 [rows, block]."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def document_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """자리 번호가 0으로 돌아가는 곳마다 하나씩 커지는 문서 번호. 모양 [rows, block]."""
    return (position_ids == 0).long().cumsum(-1)


def document_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """같은 문서의 앞쪽 토큰만 보이는 bool mask. 모양 [rows, 1, block, block]."""
    ids = document_ids(position_ids)
    same = ids[:, :, None] == ids[:, None, :]
    return same.tril()[:, None]


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """토큰마다의 음의 로그 가능도를 fp32로 돌려주고, `factor`가 있으면 logits를 그 gradient로 덮어쓴다.

    Args:
        logits: [tokens, vocab]. 제자리에서 `factor * (softmax - onehot)`이 된다.
        targets: [tokens]. -100은 세지 않는다.
        factor: 손실에 곱하는 스칼라 tensor. None이면 gradient를 구하지 않는다.
    """
    counted = targets != IGNORE
    index = targets.clamp(min=0)[:, None]
    scores = logits.float()
    log_sum = scores.logsumexp(-1)
    nll = torch.where(counted, log_sum - scores.gather(1, index)[:, 0], 0.0)
    if factor is not None:
        gradient = scores.sub_(log_sum[:, None]).exp_()
        gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
        logits.copy_(gradient.mul_((factor * counted)[:, None]))
    return nll


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


def head_loss(hidden, weight, targets, factor=None, gradient=None, buffer=None, cross_entropy=cross_entropy_,
              head: Head | None = None):
    """마지막 은닉값에서 손실을 몇 토큰씩 구한다. 전체 logits는 어느 때에도 만들어지지 않는다.

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
    head = head or Head(weight)
    if buffer is None:
        buffer = hidden.new_empty(min(HEAD_CHUNK, tokens) * vocab)
    chunk = buffer.numel() // vocab
    nll = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        logits = buffer[:(part.stop - start) * vocab].view(-1, vocab)
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
            ids = torch.arange(PROBE_TOKENS, device=head.weight.device)[None] * max(1, rows // PROBE_TOKENS) % rows
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
    found = [(rough, Head(weight, bias, scale, cap)) for cap in caps
             for rough, scale in _measure_scale(raw[0], final, cap, text)]
    # 값이 작은 logits는 한계에 닿지 않아 가릴 수 없다. 그때는 설정에 적힌 한계를 믿는다
    return min(found, key=lambda pair: pair[0] * (1 if pair[1].cap else 1.5), default=(0, None))[1]


def _measure_scale(raw: torch.Tensor, final: torch.Tensor, cap: float | None, config) -> list[tuple[float, float]]:
    """`final = cap * tanh(scale * raw / cap)`인 (어긋난 정도, scale). 그런 수가 없으면 빈 목록이다."""
    straight = final
    if cap is not None:
        inside = final.abs() < cap / 2  # 한계에 가까우면 되돌린 값이 거칠다
        raw, straight = raw[inside], torch.atanh(final[inside] / cap) * cap
    size = raw.square().sum()
    if not size > 0:
        return []
    measured = float((raw * straight).sum() / size)
    rough = float((straight - measured * raw).square().sum().sqrt() / straight.square().sum().sqrt())
    numbers = [value for value in config.to_dict().values() if type(value) in (int, float) and value]
    known = [1.0, *map(float, numbers), *(1 / value for value in numbers)]
    nearest = min(known, key=lambda value: abs(measured / value - 1))
    return [(rough, nearest)] if rough < STRAIGHT and abs(measured / nearest - 1) < STRAIGHT else []


def recompute_all(model: nn.Module) -> None:
    """모든 층의 중간값을 간직하지 않고 backward에서 다시 계산하게 한다."""
    model.config.use_cache = False
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, factor):
        gradient = torch.empty_like(hidden)
        loss = head_loss(hidden.detach(), head.weight, targets, factor, gradient, head=head).sum() * factor
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output), None, None, None


class AutogradStep:
    """어떤 causal LM이든 자동미분으로 도는 micro-step.

    Args:
        model: PEFT로 감싼 모델.
        recompute: backward에서 모든 층을 다시 계산한다.
        reason: 손으로 쓴 길을 쓰지 않은 이유.
        whole: 손실을 조각으로 구하지 않고 모델이 내놓은 logits에서 구한다.
        separate: 블록의 문서를 하나씩 따로 계산한다. 한 블록의 문서를 떼어 놓지 못하는 구조(상태를 이어 가는 Mamba,
            position_ids를 받지 않는 Bloom)가 쓴다.
    """

    def __init__(self, model: nn.Module, recompute: bool = False, reason: str = "", whole: bool = False,
                 separate: bool = False):
        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.separate = separate
        self.capturable = not separate  # 문서의 수와 길이가 블록마다 다르면 CUDA graph로 찍을 수 없다
        self.head = None if whole else measure_head(self.causal)
        self.backbone = None if self.head is None else find_backbone(self.causal)
        config = self.causal.config.get_text_config(decoder=True)
        uniform = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        self.explicit_mask = config._attn_implementation == "sdpa" and uniform and not getattr(
            config, "sliding_window", None)
        self.recompute = False
        if recompute:
            self._enable_recompute()
        notes = ["손실은 한 번에" if self.backbone is None else "손실은 조각으로"]
        notes += ["문서마다 따로"] if separate else []
        self.path = f"자동미분({'; '.join([*notes, reason] if reason else notes)})"

    def _parts(self, batch: dict) -> Iterator[tuple[dict, torch.Tensor]]:
        """(모델에 줄 것, 정답) [rows, tokens]. 떼어 계산하지 않으면 블록 전체가 하나다."""
        if not self.separate:
            # 다른 문서를 가리는 mask를 직접 주면 모양이 고정되어 CUDA graph로 찍을 수 있다. 2차원 mask는 주지 않는다
            mask = document_mask(batch["position_ids"]) if self.explicit_mask else None
            yield ({"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask},
                   shifted_targets(batch["labels"]))
            return
        for row, positions in enumerate(batch["position_ids"]):
            starts = torch.nonzero(positions == 0)[:, 0].tolist()
            for start, end in pairwise([*starts, len(positions)]):
                targets = shifted_targets(batch["labels"][row:row + 1, start:end])
                if (targets != IGNORE).any():  # 블록의 끝을 채운 토큰에는 정답이 없다
                    yield {"input_ids": batch["input_ids"][row:row + 1, start:end]}, targets

    def _nll(self, call: dict, targets: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
        targets = targets.flatten()
        if self.backbone is not None:
            hidden = self.backbone(**call, use_cache=False).last_hidden_state.flatten(0, 1)
            if factor is None:
                return head_loss(hidden, self.head.weight, targets, head=self.head).sum()
            return _HeadLoss.apply(hidden, self.head, targets, factor)
        logits = self.causal(**call, use_cache=False).logits.flatten(0, 1)
        nll = nn.functional.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE)
        return nll if factor is None else nll * factor

    def train(self, batch: dict) -> torch.Tensor:
        """gradient를 `.grad`에 더하고 `factor * 손실`을 돌려준다."""
        if not self.model.training:
            self.model.train()
        total = torch.zeros((), device=batch["input_ids"].device)
        for call, targets in self._parts(batch):
            with torch.enable_grad():
                loss = self._nll(call, targets, batch["factor"])
                loss.backward()
            total = total + loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batch: dict) -> torch.Tensor:
        """dropout 없이 구한 음의 로그 가능도의 합."""
        if self.model.training:
            self.model.eval()
        total = torch.zeros((), device=batch["input_ids"].device)
        for call, targets in self._parts(batch):
            total = total + self._nll(call, targets, None)
        return total

    def release(self) -> None:
        """미리 잡아 둔 메모리가 없다."""

    def recompute_more(self) -> bool:
        """backward에서 재계산하는 층을 늘린다. 더 늘릴 수 없으면 False."""
        if self.recompute:
            return False
        self._enable_recompute()
        return True

    def _enable_recompute(self) -> None:
        self.recompute = True
        recompute_all(self.model)


def autograd_ways(model: nn.Module, **settings) -> list[Callable[[], AutogradStep]]:
    """`AutogradStep`을 만드는 함수들. 빠른 것부터다. 뒤의 것일수록 모델의 forward를 그대로 따른다.

    앞 토큰의 상태를 이어 가는 구조(Mamba 따위)는 블록으로 묶으면 앞 문서가 새므로 처음부터 문서마다 따로 계산한다.

    Args:
        settings: `AutogradStep`에 그대로 주는 것.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    separates = (True,) if getattr(causal, "_is_stateful", False) else (False, True)
    return [partial(AutogradStep, model, whole=whole, separate=separate, **settings)
            for separate in separates for whole in (False, True)]


def find_backbone(causal: nn.Module) -> nn.Module | None:
    """출력 행렬 앞의 몸통. 그림도 보는 모델에서는 글을 다루는 부분이다. 찾지 못하면 None."""
    if causal.config.get_text_config(decoder=True) is not causal.config:
        body = causal.get_decoder()
    else:
        body = getattr(causal, causal.base_model_prefix, None)
    return None if body is causal else body
