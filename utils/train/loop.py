"""학습 루프: epoch마다 블록을 섞고, optimizer step마다 micro-step들의 gradient를 모아 가중치를 한 번 고친다."""

import time
from collections.abc import Callable, Iterable
from contextlib import closing

import torch

from utils.errors import UsageError
from utils.model.objective import FIGURES, tally
from utils.train.batches import MicroBatches, block_key, evaluation_batches, n_targets, read_blocks
from utils.train.group import Group
from utils.train.listener import Listener
from utils.train.micro_step import Batch, RunningStep
from utils.train.progress import Speed
from utils.train.records import Recipe
from utils.train.resume import Checkpoints
from utils.train.state import TrainState
from utils.train.weights import Weights


class Loop:
    """QLoRA 학습. 손실은 effective batch 전체의 토큰 평균, 선호 쌍이면 쌍의 평균이다.

    Args:
        train_set: 블록의 dataset. 블록은 `input_ids`, `labels`, `position_ids`가 모두 [block]이고, 선호 쌍이면
            `reference`와 `beta`도 있다.
        eval_set: 검증할 블록. None이면 검증하지 않는다.
        checkpoints: 저장할 곳. None이면 저장하지 않는다.
    """

    def __init__(self, step: RunningStep, weights: Weights, recipe: Recipe, train_set, eval_set=None, *, group: Group,
                 device: torch.device, checkpoints: Checkpoints | None = None, listeners: Iterable[Listener] = (),
                 speed: Speed | None = None):
        self.step = step
        self.weights = weights
        self.recipe = recipe
        self.train_set = train_set
        self.eval_set = eval_set
        self.group = group
        self.device = device
        self.checkpoints = checkpoints
        self.listeners = tuple(listeners)
        self.speed = speed or Speed()
        self.state = TrainState(max_steps=recipe.steps)
        self.batches = MicroBatches(len(train_set), recipe.rows, recipe.accumulation, recipe.seed, group)
        self.optimizer = torch.optim.AdamW(weights.parameters, recipe.learning_rate, weight_decay=0.0, fused=True)
        self.follow_schedule(0)

    def follow_schedule(self, taken: int) -> None:
        """가중치를 `taken`번 고친 자리의 학습률에서 시작한다."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = self.recipe.learning_rate
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.recipe.learning_share, taken - 1)

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """끝까지, 참을성이 다할 때까지, 또는 `should_stop`이 참일 때까지 배운다.

        Raises:
            UsageError: loss나 기울기가 NaN이나 inf가 되었다. 가중치를 고치기 전이다.
        """
        for listener in self.listeners:
            listener.begin(self.state)
        with closing(self.step):
            while not self.is_finished:
                epoch, done = divmod(self.state.global_step, self.batches.steps_per_epoch)
                for indices in self.batches.steps(epoch)[done:]:
                    row = self.learn(indices)
                    stop = should_stop()
                    self.log(row)
                    if self.is_due and self.eval_set is not None:
                        self.validate()
                    if self.is_due or stop:
                        self.save()
                    if stop or self.is_finished:
                        return

    def learn(self, indices: list[list[int]]) -> dict[str, float]:
        """effective batch 하나로 가중치를 한 번 고치고, 기록할 한 줄을 돌려준다.

        effective batch에서 정답이 있는 토큰이 T개면 L = (1 / T) sum_t nll_t이다. T는 모든 micro batch와 프로세스의
        것이므로, 저마다 factor = 1 / T를 곱해 더한 gradient의 합이 곧 dL이다. micro batch의 평균을 내지 않는다. 선호
        쌍이면 T는 쌍의 수다.

        Args:
            indices: micro batch마다의 블록 번호.
        """
        with self.speed:
            micro_batches = [read_blocks(self.train_set, rows, pin=self.device.type == "cuda") for rows in indices]
            targets = sum(n_targets(batch) for batch in micro_batches).to(self.device, torch.float32)
            targets = self.group.add_up(targets).clamp(min=1)  # T. 채운 블록뿐이어도 0으로 나누지 않는다

            self.weights.zero_gradients()
            values = sum(self.micro_step(number, batch, targets) for number, batch in enumerate(micro_batches))
            values = self.group.add_up(values).flatten()
            self.weights.sum_gradients()

            self.weights.scaler.unscale_(self.optimizer)  # fp16이면 키워 둔 gradient를 되돌려야 그 크기를 잴 수 있다
            norm = self.weights.clip_gradients(self.recipe.max_grad_norm)
            rate = self.optimizer.param_groups[0]["lr"]
            self.refuse_divergence(values[0], norm, rate)
            self.update_weights()
        self.state.global_step += 1
        epoch, done = divmod(self.state.global_step, self.batches.steps_per_epoch)
        # epoch의 마지막 step은 micro batch가 accumulation보다 적을 수 있으므로 step이 아니라 micro batch로 센다
        self.state.epoch = epoch + done * self.recipe.accumulation / self.batches.per_epoch
        measured = dict(zip(FIGURES, values.tolist(), strict=False))
        return {**measured, "grad_norm": float(norm), "learning_rate": rate, **self.speed.figures()}

    def micro_step(self, number: int, batch: Batch, targets: torch.Tensor) -> torch.Tensor:
        """micro batch 하나의 gradient를 더하고, effective batch의 손실(`objective`) 가운데 제 몫을 돌려준다.

        Args:
            number: optimizer step 안에서 이 프로세스의 몇 번째 micro batch인지.
            targets: effective batch에서 정답이 있는 토큰, 또는 쌍의 수.
        """
        factor = 1 / targets
        # fp16의 작은 gradient는 0이 되므로 손실을 scale배로 키워 backward하고, 고치기 전에 나눈다. fp16이 아니면 1이다
        scale = self.weights.scaler.scale(torch.ones_like(factor))
        rows = len(batch["input_ids"])
        # 여러 프로세스의 블록을 차례로 늘어놓았을 때의 자리. 프로세스의 수를 바꾸어도 같은 블록은 같은 시드를 받는다
        keys = self.dropout_keys(rows, first=(number * self.group.world + self.group.rank) * rows)
        return self.step.train({**batch, "keys": keys, "factor": factor * scale}) / scale

    def dropout_keys(self, rows: int, first: int = 0) -> torch.Tensor:
        """블록마다의 dropout 시드 [rows, 2], int32. (seed, global step, batch 안의 자리)로 정해진다.

        그래서 재개해도, 나누어 계산해도, 프로세스의 수가 달라도 같다.
        """
        keys = [block_key(self.recipe.seed, self.state.global_step, first + row) for row in range(rows)]
        return torch.tensor(keys, dtype=torch.int32)

    def update_weights(self) -> None:
        """가중치와 학습률을 고친다. fp16의 기울기가 넘쳤으면 scaler가 건너뛰고, 그때는 학습률도 그대로다."""
        scaler = self.weights.scaler
        before = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            self.schedule.step()

    def refuse_divergence(self, loss: torch.Tensor, norm: torch.Tensor, rate: float) -> None:
        """loss나 기울기가 유한하지 않으면 가중치를 건드리지 않고 멈춘다. fp16의 기울기는 scaler가 스스로 고친다."""
        watched = loss if self.weights.scaler.is_enabled() else loss + norm
        if torch.isfinite(watched):
            return
        bad = "loss" if not torch.isfinite(loss) else "기울기"
        advice = "--learning_rate를 낮추어 다른 --output_dir에서 시작한다"
        cause = "학습률이 너무 높다" if bad == "기울기" else "학습률이 너무 높거나 기반 모델이 계산 범위를 넘는다"
        if self.state.global_step == 0:  # 아직 아무것도 고치지 않았다
            cause = "기반 모델의 가중치에 NaN이나 inf가 있거나 계산 범위를 넘는다"
            advice = "기반 모델을 다시 받는다"
        last = self.checkpoints.newest() if self.checkpoints is not None else None
        kept = f"마지막으로 온전한 것: {last}" if last else "아직 저장한 체크포인트는 없다"
        raise UsageError(f"step {self.state.global_step + 1}에서 {bad}가 NaN이나 inf가 되어, 가중치를 고치기 전에 "
                         f"멈추었다. 이유: {cause}(지금 학습률 {rate:.1e}). {kept}. {advice}")

    def evaluate(self) -> dict[str, float]:
        """검증 블록의 값(`eval_loss` 따위). 학습과 같은 모양으로 계산한다.

        손실은 정답이 있는 토큰마다의 음의 로그 가능도의 평균이고, 선호 쌍이면 쌍마다의 `objective.FIGURES`의 평균이다.
        """
        # 검증 토큰이 수천만이어도 한 자리도 잃지 않게 fp64로 더한다
        totals, count = 0.0, torch.zeros(1, dtype=torch.float64, device=self.device)
        for rows in evaluation_batches(len(self.eval_set), self.step.rows, self.group):
            batch = self.read(self.eval_set, rows)
            totals = totals + tally(self.measure(batch), batch).double()
            count += n_targets(batch)
        *sums, number = self.group.add_up(torch.cat([totals, count])).tolist()
        return {f"eval_{name}": value / max(number, 1) for name, value in zip(FIGURES, sums, strict=False)}

    def read(self, dataset, rows: list[int]) -> Batch:
        """블록들을 이 장치에 쌓은 batch."""
        batch = read_blocks(dataset, rows, pin=self.device.type == "cuda")
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def measure(self, batch: Batch) -> torch.Tensor:
        """배우지 않고 잰 값(`objective.measured`)."""
        return self.step.evaluate({**batch, "keys": self.dropout_keys(len(batch["input_ids"]))})

    def validate(self) -> None:
        """평가하고, 가장 좋은 step을 기억한다."""
        began = time.perf_counter()
        found = self.evaluate()
        seconds = time.perf_counter() - began
        self.state.remember(found["eval_loss"])
        self.log({**found, "eval_runtime": seconds, "eval_samples_per_second": len(self.eval_set) / seconds})

    def log(self, row: dict[str, float]) -> None:
        row = {**row, "epoch": self.state.epoch, "step": self.state.global_step}
        self.state.log_history.append(row)
        for listener in self.listeners:
            listener.log(row, self.state)

    def save(self) -> None:
        if self.checkpoints is not None:
            folder = self.checkpoints.save(self)
            for listener in self.listeners:
                listener.saved(folder, self.state, final=False)

    def close(self) -> None:
        """지켜보던 것들을 닫는다."""
        for listener in self.listeners:
            listener.close()

    @property
    def is_due(self) -> bool:
        """평가하고 저장할 step인지."""
        return self.state.global_step % self.recipe.interval == 0 or self.state.global_step >= self.recipe.steps

    @property
    def is_finished(self) -> bool:
        patience = self.recipe.patience
        return self.state.global_step >= self.recipe.steps or (patience is not None and self.state.waited >= patience)
