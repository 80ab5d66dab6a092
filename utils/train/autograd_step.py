"""어떤 causal LM이든 자동미분으로 도는 micro-step.

`[rows, block]` 모양의 블록 몇 개를 받아 gradient를 `.grad`에 더하고 손실을 돌려준다. `engine/families.describe`가 아는
구조는 `engine/train_step.TrainStep`의 손으로 쓴 길을 먼저 쓰고, 나머지는 여기의 `AutogradStep`을 쓴다.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from utils.data.blocks import IGNORE, document_mask, shifted_targets
from utils.engine.families import rotary_edge
from utils.model.adapter import base_of
from utils.model.loss import Head, head_loss, measure_head
from utils.model.objective import is_preference, measured, objective
from utils.model.targets import find_backbone
from utils.train.micro_step import Batch


def recompute_all(model: nn.Module) -> None:
    """모든 층의 중간값을 간직하지 않고 backward에서 다시 계산하게 한다."""
    model.config.use_cache = False
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class _HeadNll(torch.autograd.Function):
    """조각 손실을 자동미분에 잇는다. 토큰마다의 음의 로그 가능도 [tokens]를 준다.

    nll_t(W h_t)에서 W는 얼어 있으므로 필요한 것은 dnll/dh [tokens, hidden]뿐이고, forward가 logits의 조각을 만든 김에
    구해 둔다. backward는 위에서 온 dL/dnll [tokens]를 곱하기만 한다: dL/dh = (dL/dnll) dnll/dh.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        one = torch.ones((), device=hidden.device)
        nll = head_loss(hidden.detach(), head.weight, targets, one, gradient, head=head)
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        """입력마다의 gradient. hidden의 것 [tokens, hidden]뿐이고 나머지는 None이다."""
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output[:, None]), None, None


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
        self.causal = base_of(model)
        self.separate = separate
        self.capturable = not separate  # 문서의 수와 길이가 블록마다 다르면 CUDA graph로 찍을 수 없다
        self.head = None if whole else measure_head(self.causal)
        self.backbone = None if self.head is None else find_backbone(self.causal)
        config = self.causal.config.get_text_config(decoder=True)
        # 층마다 볼 수 있는 범위가 다르면(창) mask 하나로 말할 수 없으므로, 모델이 position_ids에서 스스로 만들게 둔다
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        sees_all = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
        self.explicit_mask = config._attn_implementation == "sdpa" and sees_all
        self.recompute = False
        if recompute:
            self._enable_recompute()
        notes = ["손실은 한 번에" if self.backbone is None else "손실은 조각으로"]
        notes += ["문서마다 따로"] if separate else []
        self.path = f"자동미분({'; '.join([*notes, reason] if reason else notes)})"

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, torch.Tensor]]:
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
                yield ({"input_ids": batch["input_ids"][row:row + 1, start:end]},
                       shifted_targets(batch["labels"][row:row + 1, start:end]))

    def _nlls(self, batch: Batch) -> Iterator[torch.Tensor]:
        """따로 계산하는 부분마다의 음의 로그 가능도 [tokens]. 이으면 블록 전체 [rows * block]이다."""
        for call, targets in self._parts(batch):
            targets = targets.flatten()
            if self.separate and not (targets != IGNORE).any():  # 블록의 끝을 채운 토큰에는 정답이 없다
                yield torch.zeros(len(targets), device=targets.device)
            elif self.backbone is None:
                logits = self.causal(**call, use_cache=False).logits.flatten(0, 1)
                yield nn.functional.cross_entropy(logits.float(), targets, reduction="none", ignore_index=IGNORE)
            else:
                hidden = self.backbone(**call, use_cache=False).last_hidden_state.flatten(0, 1)
                yield (_HeadNll.apply(hidden, self.head, targets) if torch.is_grad_enabled()
                       else head_loss(hidden, self.head.weight, targets, head=self.head))

    def options(self, batch: Batch) -> dict:
        """batch에 따라 달라지는 것이 없다."""
        return {}

    def train(self, batch: Batch) -> torch.Tensor:
        """gradient를 `.grad`에 더하고 `factor * 손실`(`objective`)을 돌려준다."""
        if not self.model.training:
            self.model.train()
        total = torch.zeros((), device=batch["input_ids"].device)
        with torch.enable_grad():
            # 선호 쌍의 손실은 두 답의 nll을 모두 알아야 나온다
            nlls = [torch.cat(list(self._nlls(batch)))] if is_preference(batch) else self._nlls(batch)
            for nll in nlls:
                loss = objective(nll, batch)
                if loss.requires_grad:
                    loss.flatten()[0].backward()
                total = total + loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """dropout 없이 구한 음의 로그 가능도의 합. 선호 쌍이면 쌍마다의 값(`objective.measured`)이다."""
        if self.model.training:
            self.model.eval()
        return measured(torch.cat(list(self._nlls(batch))), batch)

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


def autograd_ways(model: nn.Module, block: int, **settings) -> list[Callable[[], AutogradStep]]:
    """`AutogradStep`을 만드는 함수들. 빠른 것부터다. 뒤의 것일수록 모델의 forward를 그대로 따른다.

    앞 토큰의 상태를 이어 가는 구조(Mamba 따위)는 블록으로 묶으면 앞 문서가 새고, 길이에 따라 rotary가 바뀌는 구조는 긴
    문서가 짧은 문서의 rotary를 바꾼다. 처음부터 문서마다 따로 계산한다.

    Args:
        block: 블록의 길이(토큰).
        settings: `AutogradStep`에 그대로 주는 것.
    """
    causal = base_of(model)
    apart = getattr(causal, "_is_stateful", False) or block > rotary_edge(causal.config.get_text_config(decoder=True))
    separates = (True,) if apart else (False, True)
    # 차례: 묶어서 조각으로, 묶어서 한 번에, 문서마다 조각으로, 문서마다 한 번에
    return [partial(AutogradStep, model, whole=whole, separate=separate, **settings)
            for separate in separates for whole in (False, True)]
