"""어떤 causal LM이든 자동미분으로 도는 micro-step과, 모든 micro-step이 함께 쓰는 조각 손실과 문서 경계를 맡는다.

micro-step은 `[rows, block]` 모양의 블록 몇 개를 받아 gradient를 `.grad`에 더하고 손실을 돌려준다. GPT-NeoX는
`utils/engine/train_step.py`의 손으로 쓴 길을, 다른 구조는 여기의 `AutogradStep`을 쓴다.
"""

import torch
from torch import nn

IGNORE = -100
HEAD_CHUNK = 512  # 손실을 한 번에 계산하는 토큰 수. logits는 [HEAD_CHUNK, 어휘] 크기로만 존재한다


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


def head_loss(hidden, weight, targets, factor=None, gradient=None, buffer=None, cross_entropy=cross_entropy_):
    """마지막 은닉값에서 손실을 몇 토큰씩 구한다. 전체 logits는 어느 때에도 만들어지지 않는다.

    Args:
        hidden: [tokens, hidden].
        weight: 얼어 있는 출력 행렬 [vocab, hidden].
        targets: [tokens], 한 칸 당겨진 정답.
        factor: 손실에 곱하는 스칼라. `gradient`와 함께 준다.
        gradient: [tokens, hidden]. `factor * 손실`의 hidden에 대한 gradient가 적힌다.
        buffer: logits를 적을 1차원 자리. 들어가는 만큼씩 계산한다. None이면 HEAD_CHUNK 토큰의 자리를 잡는다.

    Returns:
        토큰마다의 음의 로그 가능도 [tokens], fp32.
    """
    tokens, vocab = len(hidden), len(weight)
    if buffer is None:
        buffer = hidden.new_empty(min(HEAD_CHUNK, tokens) * vocab)
    chunk = buffer.numel() // vocab
    nll = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        logits = buffer[:(part.stop - start) * vocab].view(-1, vocab)
        torch.mm(hidden[part], weight.t(), out=logits)
        nll[part] = cross_entropy(logits, targets[part], factor)
        if gradient is not None:
            torch.mm(logits, weight, out=gradient[part])
    return nll


def recompute_all(model: nn.Module) -> None:
    """모든 층의 중간값을 간직하지 않고 backward에서 다시 계산하게 한다."""
    model.config.use_cache = False
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, factor):
        gradient = torch.empty_like(hidden)
        loss = head_loss(hidden.detach(), weight.detach(), targets, factor, gradient).sum() * factor
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output), None, None, None


class AutogradStep:
    """어떤 causal LM이든 자동미분으로 도는 micro-step. 출력 행렬이 평범하면 손실을 조각으로 구한다."""

    def __init__(self, model: nn.Module, recompute: bool = False, reason: str = ""):
        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = self.causal.get_output_embeddings()
        config = self.causal.config
        plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
        plain = plain and getattr(config, "final_logit_softcapping", None) is None
        plain = plain and getattr(config, "logit_scale", None) is None
        self.backbone = getattr(self.causal, self.causal.base_model_prefix, None) if plain else None
        self.head = head
        uniform = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        self.explicit_mask = config._attn_implementation == "sdpa" and uniform and not getattr(
            config, "sliding_window", None)
        self.recompute = False
        if recompute:
            self._enable_recompute()
        loss = "손실은 조각으로" if self.backbone is not None else "손실은 한 번에"
        self.path = f"자동미분({loss}; {reason})" if reason else f"자동미분({loss})"

    def _nll(self, batch: dict, factor: torch.Tensor | None) -> torch.Tensor:
        # 다른 문서를 가리는 mask를 직접 주면 모양이 고정되어 CUDA graph로 찍을 수 있다. 2차원 mask는 절대 주지 않는다
        mask = document_mask(batch["position_ids"]) if self.explicit_mask else None
        call = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask,
                "use_cache": False}
        targets = shifted_targets(batch["labels"]).flatten()
        if self.backbone is not None:
            hidden = self.backbone(**call).last_hidden_state.flatten(0, 1)
            if factor is None:
                return head_loss(hidden, self.head.weight.detach(), targets).sum()
            return _HeadLoss.apply(hidden, self.head.weight, targets, factor)
        logits = self.causal(**call).logits.flatten(0, 1)
        nll = nn.functional.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE)
        return nll if factor is None else nll * factor

    def train(self, batch: dict) -> torch.Tensor:
        """gradient를 `.grad`에 더하고 `factor * 손실`을 돌려준다."""
        if not self.model.training:
            self.model.train()
        with torch.enable_grad():
            loss = self._nll(batch, batch["factor"])
            loss.backward()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, batch: dict) -> torch.Tensor:
        """dropout 없이 구한 음의 로그 가능도의 합."""
        if self.model.training:
            self.model.eval()
        return self._nll(batch, None)

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
