"""`transformers.Trainer`의 겉모습을 지키는 가벼운 학습기를 맡는다: 토큰 평균 손실, 배치, 메모리 부족에서의 회복."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from utils.batches import MicroBatches, PaddedBlocks, block_key, count_documents, split_rows, stack_blocks
from utils.captured import CapturedStep, check_isolation
from utils.engine.families import describe
from utils.engine.train_layers import restore_embedding
from utils.engine.train_step import TrainStep
from utils.errors import UsageError
from utils.microstep import IGNORE, AutogradStep, recompute_all, shifted_targets
from utils.planner import MemoryPlan


class GradientBuffer:
    """학습하는 모든 매개변수의 gradient를 이어 붙인 fp32 tensor 하나. `.grad`는 그 조각이다.

    0으로 지우기, 크기 재기, 여러 프로세스의 합이 저마다 연산 하나로 끝나고, CUDA graph가 가리키는 주소가 변하지 않는다.
    """

    def __init__(self, model: nn.Module):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), device=self.parameters[0].device)
        start = 0
        for parameter in self.parameters:
            parameter.data = parameter.data.float()  # 16비트로는 작은 갱신이 사라지므로 LoRA 가중치는 fp32로 둔다
            parameter.grad = self.flat[start:start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def clip(self, limit: float) -> torch.Tensor:
        """gradient의 크기를 `limit` 아래로 줄이고 줄이기 전의 크기를 돌려준다."""
        norm = self.flat.norm()
        if math.isfinite(limit):
            self.flat.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm


class LeanTrainer(Trainer):
    """묶인 블록으로 QLoRA를 학습한다. 손실은 effective batch 전체의 토큰 평균이다.

    `per_device_train_batch_size`가 micro batch(블록)이고, 거기에 `gradient_accumulation_steps`와 프로세스 수를 곱한
    것이 effective batch다. 메모리가 모자라면 micro batch를 반으로 나누어 같은 것을 다시 계산하므로 effective batch는
    변하지 않는다. FSDP와 DeepSpeed로 모델을 나눌 때는 Trainer의 길을 그대로 따른다.

    Args:
        plan: `utils.planner.MemoryPlan`. 재계산할 층의 수를 정한다. None이면 재계산하지 않는다.
        say: 학습 도중의 일을 한 줄로 알리는 함수.

    Attributes:
        path: 어느 길로 학습하는지 설명하는 한 줄.
    """

    def __init__(self, model, args, train_dataset=None, eval_dataset=None, plan=None, callbacks=None,
                 say: Callable[[str], None] = lambda line: None, **kwargs):
        args.logging_nan_inf_filter = False  # NaN을 숨기지 않는다
        args.remove_unused_columns = False
        if args.n_gpu > 1:
            args._n_gpu = 1  # 한 프로세스는 카드 하나만 쓴다
        kwargs.setdefault("data_collator", stack_blocks)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, callbacks=callbacks,
                         **kwargs)
        self.plan, self.say = plan, say
        self.model_accepts_loss_kwargs = True  # 손실은 이미 effective batch의 토큰 수로 나뉘어 있다
        self._flops_per_token = 6 * sum(p.numel() for p in model.parameters())
        self.rows = args.per_device_train_batch_size
        self.sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.sharded:
            recompute_all(model)
            return
        self.gradients = GradientBuffer(model)
        flat = self.gradients.flat
        model.zero_grad = lambda set_to_none=True: flat.zero_()  # `.grad`의 주소를 지킨다
        self.accelerator.prepare_model = lambda model, **_: model  # DDP로 감싸지 않는다. 합은 step마다 한 번 낸다
        self.step = CapturedStep(self._choose_step(), args.device)
        self._micro_step = 0
        if train_dataset is not None:
            block = len(train_dataset[0]["input_ids"])
            vocab = model.get_input_embeddings().weight.shape[0]
            check_isolation(self.step, vocab, self.rows, block, self._keys(self.rows))

    @property
    def path(self) -> str:
        return "Trainer의 길(모델을 여러 프로세스에 나눈다)" if self.sharded else self.step.path

    def _choose_step(self):
        plan = self.plan or MemoryPlan(self.args.per_device_train_batch_size)
        family = describe(self.model, training=True)
        if isinstance(family, str):
            return AutogradStep(self.model, plan.recompute_layers > 0, family)
        documents = max(count_documents(data) for data in (self.train_dataset, self.eval_dataset))
        return TrainStep(self.model, plan.recompute_layers, max(2, documents))  # 격리 검사는 두 문서를 쓴다

    def _keys(self, rows: int, first: int = 0) -> dict:
        """블록마다의 dropout 씨앗. (seed, global step, batch 안의 자리)로 정해져 재개해도, 나누어 계산해도 같다."""
        keys = [block_key(self.args.seed, self.state.global_step, first + row) for row in range(rows)]
        return {"keys": torch.tensor(keys, dtype=torch.int32)}

    def train(self, *args, **kwargs):
        """학습하고, 끝나면 학습에 쓴 메모리를 놓고 모델을 평범한 모습으로 되돌린다."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if not self.sharded:
                self.step.release()
                restore_embedding(self.model)

    def get_train_dataloader(self) -> DataLoader:
        batches = MicroBatches(self, len(self.train_dataset), self.args.per_device_train_batch_size)
        return self._loader(self.train_dataset, batches)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """이 프로세스가 맡은 평가 블록. 프로세스마다 같은 수가 되도록 모자라는 자리를 정답이 없는 블록으로 채운다."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        mine = list(range(self.args.process_index, len(dataset), self.args.world_size))
        share = -(-len(dataset) // self.args.world_size)
        mine += [-1] * (share + -share % self.rows - len(mine))
        return self._loader(dataset, [mine[at:at + self.rows] for at in range(0, len(mine), self.rows)])

    def _loader(self, dataset, batches) -> DataLoader:
        return DataLoader(PaddedBlocks(dataset), batch_sampler=batches, collate_fn=self.data_collator,
                          pin_memory=self.args.device.type == "cuda")

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """effective batch에서 정답이 있는 토큰의 수. 모든 프로세스의 합이다."""
        count = sum((batch["labels"][:, 1:] != IGNORE).sum() for batch in batch_samples)
        count = torch.as_tensor(count).to(device, torch.float32, non_blocking=True)
        if self.args.world_size > 1:
            dist.all_reduce(count)
        return count.clamp(min=1)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """micro batch 하나의 gradient를 더한다. effective batch의 마지막이면 프로세스들의 합을 낸다."""
        if self.sharded:
            return super().training_step(model, inputs, num_items_in_batch)
        scaler = self.accelerator.scaler
        factor = 1 / num_items_in_batch
        scale = scaler.scale(torch.ones_like(factor)) if scaler is not None else None
        rows = len(inputs["input_ids"])
        first = (self._micro_step * self.args.world_size + self.args.process_index) * rows
        batch = {**inputs, **self._keys(rows, first)}
        loss = self._train_rows(batch, factor if scale is None else factor * scale)
        if scale is not None:
            loss = loss / scale
        self._micro_step += 1
        if self.accelerator.sync_gradients:
            self._micro_step = 0
            if self.args.world_size > 1:
                dist.all_reduce(self.gradients.flat)
        return loss * self.args.world_size  # Trainer는 프로세스들의 평균을 적는다

    def _train_rows(self, batch: dict, factor: torch.Tensor) -> torch.Tensor:
        """micro batch를 `self.rows` 블록씩 계산한다. 메모리가 모자라면 덜 쓰는 길로 처음부터 다시 한다.

        Raises:
            UsageError: 블록 하나도 계산할 수 없다.
        """
        before = None if self.step.captured else self.gradients.flat.clone()
        while True:
            try:
                return sum(self.step.train({**part, "factor": factor}) for part in split_rows(batch, self.rows))
            except torch.OutOfMemoryError:
                if before is None:
                    raise
            self.step.release()
            self.gradients.flat.copy_(before)
            self._use_less_memory(batch["input_ids"].shape[1])

    def _use_less_memory(self, block: int) -> None:
        """micro batch를 반으로 줄이거나, 이미 한 블록이면 재계산하는 층을 늘린다. 결과는 변하지 않는다."""
        if self.rows > 1:
            self.rows //= 2
            how = f"micro batch를 {self.rows}로 줄여"
        elif self.step.recompute_more():
            how = "재계산하는 층을 늘려"
        else:
            raise UsageError(f"메모리가 모자라 {block}토큰 블록 하나도 학습할 수 없다. "
                             f"--cutoff_len {block // 2} 또는 더 작은 모델을 쓴다")
        self.say(f"메모리가 모자라 {how} 같은 batch를 다시 계산한다. effective batch는 그대로다")

    def _clip_grad_norm(self, model) -> torch.Tensor:
        if self.sharded:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return self.gradients.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None) -> torch.Tensor:
        return self.gradients.clip(math.inf) if grad_norm is None else grad_norm

    @torch.no_grad()
    def _sharded_nll(self, batch: dict) -> torch.Tensor:
        """모델을 나누어 담았을 때의 음의 로그 가능도의 합. 출력 행렬도 나뉘어 있어 logits를 한 번에 구한다."""
        batch = self._prepare_inputs(batch)
        model = self.model_wrapped.eval()
        with self.compute_loss_context_manager():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        model.train()
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), shifted_targets(batch["labels"]).flatten(),
                                           reduction="sum", ignore_index=IGNORE)

    def floating_point_ops(self, inputs) -> int:
        return self._flops_per_token * inputs["input_ids"].numel()

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None,
                        metric_key_prefix="eval") -> EvalLoopOutput:
        """손실의 합을 토큰 수로 나눈다. 학습과 같은 모양으로 계산하므로 메모리를 더 쓰지 않는다."""
        evaluate = self._sharded_nll if self.sharded else self.step.evaluate
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in dataloader:
            for part in split_rows(batch, self.rows):
                total[0] += evaluate({**part, **self._keys(len(part["input_ids"]))})
            total[1] += (batch["labels"][:, 1:] != IGNORE).sum()
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self.args.world_size > 1:
            dist.all_reduce(total)
        nll, tokens = total.tolist()
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": nll / max(tokens, 1)},
                              len(dataloader.dataset))
