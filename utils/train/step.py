"""micro-step: 블록 몇 개의 손실과 gradient를 구하는 법. 모델에 맞는 길을 고르고, 메모리가 모자라면 나누어 계산한다."""

from collections.abc import Callable

import torch
from torch import nn

from utils.engine.families import describe
from utils.engine.train_layers import restore_embedding
from utils.engine.train_step import TrainStep
from utils.errors import UsageError
from utils.model import vram
from utils.train.autograd_step import autograd_ways
from utils.train.batches import count_documents, split_rows
from utils.train.graph_step import CapturedStep
from utils.train.micro_step import Batch
from utils.train.parity import choose_step
from utils.train.planner import MemoryPlan


def open_step(model: nn.Module, plan: MemoryPlan, train_set, eval_set, device: torch.device, gradients: torch.Tensor,
              say: Callable[[str], None]) -> "SplittingStep":
    """가장 빠른 길부터, 모델과 같은 값을 내는 첫 micro-step을 연다.

    Args:
        gradients: 배우는 가중치의 `.grad`를 모두 담은 1차원 fp32 tensor.

    Raises:
        UsageError: 어느 길로도 모델과 같은 값이 나오지 않는다.
    """
    family = describe(model, training=True)
    reason = family if isinstance(family, str) else None
    documents = max(2, *(count_documents(data) for data in (train_set, eval_set)))
    block = len(train_set[0]["input_ids"])
    candidates = autograd_ways(model, block, recompute=plan.recompute_layers > 0, reason=reason or "")
    if reason is None:
        candidates.insert(0, lambda: TrainStep(model, plan.recompute_layers, documents, plan.exact))
    else:
        say("이 모델에는 빠른 계산을 쓸 수 없어 자동미분으로 배운다. 결과는 같고 더 느리다(이유: --verbose True)")
    stream = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # 올리던 가중치가 다 올라온 다음에
    with torch.cuda.stream(stream):
        step = choose_step(candidates, model, train_set, documents, device, say,
                           reject=lambda: restore_embedding(model))
    return SplittingStep(CapturedStep(step, device, stream), model, plan.micro_batch_size, gradients, say)


class SplittingStep:
    """메모리가 모자라면 micro batch를 반으로 나누어 같은 것을 다시 계산하는 micro-step. 결과는 변하지 않는다.

    Attributes:
        rows: 한 번에 계산하는 블록의 수. 메모리가 모자랄 때마다 반이 된다.
    """

    def __init__(self, step: CapturedStep, model: nn.Module, rows: int, gradients: torch.Tensor,
                 say: Callable[[str], None]):
        self.step = step
        self.model = model
        self.rows = rows
        self.gradients = gradients
        self.say = say

    @property
    def path(self) -> str:
        return self.step.path

    def train(self, batch: Batch) -> torch.Tensor:
        """micro batch를 `rows` 블록씩 계산한다. 메모리가 모자라면 덜 쓰는 길로 처음부터 다시 한다.

        Raises:
            UsageError: 블록 하나도 계산할 수 없다.
        """
        blocks = {name: value for name, value in batch.items() if name != "factor"}
        parts = split_rows(blocks, self.rows)
        # 찍힌 graph는 메모리를 새로 잡지 않는다. 사본은 찍기 전의 몇 번뿐이라 CPU에 둔다
        before = None if all(map(self.step.has_captured, parts)) else self.gradients.to("cpu", copy=True)
        while True:
            try:
                with vram.shortage():
                    return sum(self.step.train({**part, "factor": batch["factor"]}) for part in parts)
            except torch.OutOfMemoryError:
                if before is None:
                    raise
            self.step.release()
            self.gradients.copy_(before)
            self._use_less_memory(batch["input_ids"].shape[1])
            parts = split_rows(blocks, self.rows)

    def _use_less_memory(self, block: int) -> None:
        """micro batch를 반으로 줄이거나, 이미 한 블록이면 재계산하는 층을 늘린다."""
        if self.rows > 1:
            self.rows //= 2
            how = f"micro batch를 {self.rows}로 줄여"
        elif self.step.recompute_more():
            how = "재계산하는 층을 늘려"
        else:
            raise UsageError(f"메모리가 모자라 {block}토큰 블록 하나도 학습할 수 없다. "
                             f"--cutoff_len {block // 2} 또는 더 작은 모델을 쓴다")
        self.say(f"메모리가 모자라 {how} 같은 batch를 다시 계산한다. effective batch는 그대로다")

    def evaluate(self, batch: Batch) -> torch.Tensor:
        return self.step.evaluate(batch)

    def close(self) -> None:
        """학습에 쓴 메모리를 놓고 모델을 평범한 모습으로 되돌린다."""
        self.step.release()
        restore_embedding(self.model)
