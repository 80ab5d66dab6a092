"""끊겨도 잃지 않는 학습기: 온전한 체크포인트를 쓰고 거기서 정확히 이어 가며, NaN이 나면 가중치를 망치기 전에 멈춘다."""

import time
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ExportableState

from utils import checkpoint, loader, sharded
from utils.errors import UsageError
from utils.rundir import KEEP, Run, checkpoint_bytes
from utils.trainer import LeanTrainer

# torch 2.11은 CPU에서 여러 프로세스로 배울 때의 자리 `cpu:0`을 몰라 optimizer를 읽지 못한다
torch.serialization.register_package(
    5, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None)


class ResumableTrainer(LeanTrainer):
    """`LeanTrainer`의 학습은 그대로 두고 저장과 재개를 맡는다.

    Args:
        run: `utils.rundir.open_run`이 연 실행. 나머지 인자는 `LeanTrainer`와 같다.
    """

    def __init__(self, *args, run: Run, **kwargs):
        super().__init__(*args, **kwargs)
        self.run = run
        self.earlier_seconds = 0.0  # 이어 가기 전에 배우던 시간
        self.began = time.perf_counter()

    def resume(self) -> None:
        """처음부터, 또는 실행의 체크포인트에서 이어서 학습한다."""
        if self.run.checkpoint is not None:
            manifest = checkpoint.read_manifest(self.run.checkpoint)
            self.earlier_seconds = manifest.get("seconds", 0.0)
            if self.sharded:
                sharded.load_adapter(self.model, self.run.checkpoint)
            else:  # 메모리가 모자라 줄인 micro batch도 이어받아야 더하는 순서가 같다
                self.rows = min(self.rows, manifest["rows"])
        self.began = time.perf_counter()
        self.train(resume_from_checkpoint=str(self.run.checkpoint) if self.run.checkpoint else None)

    def save_adapter(self) -> None:
        """지금의 어댑터를 `output_dir`에 남긴다."""
        best = self.state.best_model_checkpoint if self.sharded else None
        whole = best is not None and checkpoint.damage(Path(best)) is None
        state = sharded.read_adapter(Path(best)) if whole else self._gathered()
        if not self.args.should_save:
            return
        with self.run.saving():
            staging = checkpoint.stage(self.run.folder / "adapter")
            self._write_adapter(staging, state)
            loader.write_prompt_info(staging, self.run.prompt_info)
            checkpoint.publish_files(staging, self.run.folder, self._facts())

    def _save_checkpoint(self, model, trial) -> None:
        self.store_flos()
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(self.run.folder / f"checkpoint-{self.state.best_global_step}")
        final = self.run.folder / f"checkpoint-{self.state.global_step}"
        staging = final.with_name(checkpoint.STAGING + final.name)
        with self.run.saving(checkpoint_bytes(self.get_num_trainable_parameters())):
            if self.args.should_save:
                checkpoint.stage(final)
            self.accelerator.wait_for_everyone()
            state = self._gathered()
            if self.args.should_save:
                self._write_adapter(staging, state)
                self.processing_class.save_pretrained(staging)
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._save_state(staging)
                loader.write_prompt_info(staging, self.run.prompt_info)
                checkpoint.publish(staging, final, self._facts())
                best = self.state.best_model_checkpoint
                checkpoint.prune(self.run.folder, KEEP, Path(best) if best else None)
            self.accelerator.wait_for_everyone()

    def _gathered(self) -> dict | None:
        """나누어 담은 어댑터를 모은 것. 나누지 않았으면 None이고, 모델이 스스로 쓴다."""
        return sharded.gather_adapter(self.model_wrapped) if self.sharded else None

    def _write_adapter(self, folder: Path, gathered: dict | None) -> None:
        if gathered is None:
            self.model.save_pretrained(folder, safe_serialization=True)
        else:
            sharded.write_adapter(self.model, gathered, folder)

    def _save_optimizer_and_scheduler(self, folder: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(folder)
            return
        torch.save(self.optimizer.state_dict(), sharded.optimizer_file(Path(folder), self.args.process_index))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(folder) / "scheduler.pt")

    def _load_from_checkpoint(self, folder: str, model=None) -> None:
        if not self.sharded:  # 나누어 담는 모델에는 나누기 전에 넣었다
            super()._load_from_checkpoint(folder, model)

    def _save_state(self, staging: Path) -> None:
        exportable = [part for part in (*self.callback_handler.callbacks, self.control)
                      if isinstance(part, ExportableState)]
        self.state.stateful_callbacks = {type(part).__name__: part.state() for part in exportable}
        self.state.save_to_json(str(staging / "trainer_state.json"))

    def _facts(self) -> dict:
        return {"run": self.run.facts, "step": self.state.global_step, "rows": getattr(self, "rows", 1),
                "seconds": self.earlier_seconds + time.perf_counter() - self.began}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """epoch을 늘려 이어 가면 저장된 학습률은 앞 계획의 것이므로, 지금 계획의 같은 step의 값으로 바꾼다."""
        if self.sharded and checkpoint is not None:
            sharded.load_optimizer(self.optimizer, Path(checkpoint), self.args.process_index)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            plan = self.lr_scheduler
            for group, base, factor in zip(self.optimizer.param_groups, plan.base_lrs, plan.lr_lambdas, strict=True):
                group["lr"] = base * factor(plan.last_epoch)
            plan._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        found = checkpoint.damage(best)
        if found:
            self.say(f"경고: 가장 좋은 체크포인트가 손상되어 마지막 어댑터를 남긴다. {best}: {found}")
            return
        if not self.sharded:  # 나누어 담은 모델은 save_adapter가 그 파일을 그대로 남긴다
            super()._load_best_model()

    def _run_epoch(self, *args, **kwargs) -> None:
        """끝까지 배운 체크포인트에서 이어 갈 때 step을 더 가지 않게 한다."""
        early = [part for part in self.callback_handler.callbacks if isinstance(part, EarlyStoppingCallback)]
        out_of_patience = any(part.early_stopping_patience_counter >= part.early_stopping_patience for part in early)
        if self.state.global_step >= self.state.max_steps or out_of_patience:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        """optimizer step의 바로 앞이다. loss나 기울기가 유한하지 않으면 가중치를 건드리지 않고 멈춘다.

        Raises:
            UsageError: loss나 기울기가 NaN 또는 inf다. fp16에서 기울기가 넘치는 것은 GradScaler가 스스로 고치므로 뺀다.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        loss = self._tr_loss
        watched = loss if self.accelerator.scaler is not None else loss + norm
        if not torch.isfinite(watched):
            bad = "loss" if not torch.isfinite(loss) else "기울기"
            advice = "--learning_rate를 낮추어 다른 --output_dir에서 시작한다"
            cause = "학습률이 너무 높다" if bad == "기울기" else "학습률이 너무 높거나 기반 모델이 계산 범위를 넘는다"
            if self.state.global_step == 0:  # 아직 아무것도 고치지 않았다
                cause = "기반 모델의 가중치에 NaN이나 inf가 있거나 계산 범위를 넘는다"
                advice = "기반 모델을 다시 받는다"
            last = checkpoint.newest_valid(self.run.folder)
            kept = f"마지막으로 온전한 것은 {last}이다" if last else "아직 저장한 체크포인트는 없다"
            raise UsageError(
                f"step {self.state.global_step + 1}에서 {bad}가 NaN이나 inf가 되어, 가중치를 고치기 전에 멈추었다. "
                f"까닭: {cause}(지금 학습률 {self._get_learning_rate():.1e}). {kept}. {advice}")
        return norm
