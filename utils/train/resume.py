"""학습의 저장과 재개: 온전한 체크포인트를 쓰고, 거기서 한 비트도 다르지 않게 이어 간다."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from utils import files, seals
from utils.errors import UsageError
from utils.model import adapter, checkpoint
from utils.train.group import Group
from utils.train.micro_step import RunningStep
from utils.train.run_folder import KEEP, Run, checkpoint_bytes
from utils.train.state import TrainState
from utils.train.weights import Weights

SCHEDULE, SCALER = "scheduler.pt", "scaler.pt"


class Resumable(Protocol):
    """저장하고 되돌릴 것을 가진 학습(`utils.train.loop.Loop`)."""

    state: TrainState
    step: RunningStep
    weights: Weights
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def follow_schedule(self, taken: int) -> None:
        """가중치를 `taken`번 고친 자리의 학습률에서 시작한다."""


class Checkpoints:
    """실행 하나의 체크포인트들.

    Args:
        run: `utils.train.run_folder.open_run`이 연 실행.
        n_trainable: 학습하는 매개변수의 수.
    """

    def __init__(self, run: Run, tokenizer, n_trainable: int, group: Group, say: Callable[[str], None]):
        self.run = run
        self.tokenizer = tokenizer
        self.n_trainable = n_trainable
        self.group = group
        self.say = say
        self.earlier_seconds = 0.0  # 이어 가기 전에 배우던 시간
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """지금까지 배운 시간. 이어 가기 전의 것도 센다."""
        return self.earlier_seconds + time.perf_counter() - self.began

    def newest(self) -> Path | None:
        return checkpoint.newest_valid(self.run.folder)

    def folder(self, step: int) -> Path:
        return self.run.folder / f"checkpoint-{step}"

    def save(self, loop: Resumable) -> Path:
        """지금의 상태를 `checkpoint-N`에 쓴다. 모든 프로세스가 함께 부른다."""
        final = self.folder(loop.state.global_step)
        with self.run.saving(checkpoint_bytes(self.n_trainable)):
            staging = files.staging_of(final)
            if self.group.is_first:
                seals.stage(final)
            self.group.wait()  # 0번이 폴더를 만든 다음에 모두가 제 것을 쓴다
            loop.weights.save_adapter(staging)
            if loop.weights.writes_optimizer():
                torch.save(loop.optimizer.state_dict(), loop.weights.optimizer_file(staging))
            torch.save(random_state(), self.random_file(staging))
            self.group.wait()  # 모두가 쓴 다음에 0번이 봉한다. 봉한 뒤에 온 파일은 손상으로 보인다
            if self.group.is_first:
                torch.save(loop.schedule.state_dict(), staging / SCHEDULE)
                torch.save(loop.weights.scaler.state_dict(), staging / SCALER)
                self.tokenizer.save_pretrained(staging)
                loop.state.write(staging)
                self.publish(loop, staging, final)
            self.group.wait()
        return final

    def publish(self, loop: Resumable, staging: Path, final: Path) -> None:
        """쓴 것을 봉하고 이름을 바꾼 다음, 오래된 것을 지운다."""
        adapter.write_prompt_info(staging, self.run.prompt_info)
        seals.publish(staging, final, self.facts(loop))
        best = loop.state.best_global_step
        checkpoint.prune(self.run.folder, KEEP, None if best is None else self.folder(best))

    def facts(self, loop: Resumable) -> dict:
        return {"run": self.run.facts, "step": loop.state.global_step, "rows": loop.step.rows, "seconds": self.seconds}

    def restore(self, loop: Resumable) -> None:
        """실행의 체크포인트에서 이어 갈 수 있게 되돌린다. 없으면 처음부터다."""
        folder = self.run.checkpoint
        if folder is not None:
            manifest = seals.read_manifest(folder)
            self.earlier_seconds = manifest.get("seconds", 0.0)
            loop.step.rows = min(loop.step.rows, manifest["rows"])  # 줄인 micro batch도 이어받아야 더하는 순서가 같다
            loop.state = TrainState.read(folder, loop.state.max_steps)
            loop.weights.load_adapter(folder)
            loop.optimizer.load_state_dict(self.read_optimizer(loop.weights.optimizer_file(folder)))
            # epoch을 늘려 이어 가면 저장된 학습률의 곡선은 옛 길이의 것이다. 고친 횟수만 이어받고 곡선은 새로 그린다
            loop.follow_schedule(read_tensors(folder / SCHEDULE)["last_epoch"])
            loop.weights.scaler.load_state_dict(read_tensors(folder / SCALER))
            set_random_state(read_tensors(self.random_file(folder)))
        self.began = time.perf_counter()

    def read_optimizer(self, file: Path) -> dict:
        """이 프로세스의 optimizer 상태.

        Raises:
            UsageError: 모델을 나누어 배운 실행과 나누지 않은 실행은 서로 이어 갈 수 없다.
        """
        if not file.is_file():
            raise UsageError(f"{file.parent}에 {file.name}이 없다. 모델을 나누는 법(--use_fsdp)과 프로세스의 수를 "
                             "저장할 때와 같게 적는다")
        return read_tensors(file)

    def random_file(self, folder: Path) -> Path:
        name = "rng_state.pth" if self.group.world == 1 else f"rng_state_{self.group.rank}.pth"
        return folder / name

    def keep_best(self, loop: Resumable) -> None:
        """가장 좋은 체크포인트의 가중치를 모델에 되돌린다. 손상되었으면 지금의 가중치를 둔다."""
        if loop.state.best_global_step is None:
            return
        best = self.folder(loop.state.best_global_step)
        found = checkpoint.damage(best)
        if found is None:
            loop.weights.load_adapter(best)
        else:
            self.say(f"경고: 가장 좋은 체크포인트가 손상되어 마지막 어댑터를 남긴다. {best}: {found}")

    def save_adapter(self, loop: Resumable) -> None:
        """지금의 어댑터를 `output_dir`에 남긴다. 모든 프로세스가 함께 부른다."""
        with self.run.saving():
            final = self.run.folder / "adapter"
            staging = files.staging_of(final)
            if self.group.is_first:
                seals.stage(final)
            self.group.wait()
            loop.weights.save_adapter(staging)
            if self.group.is_first:
                adapter.write_prompt_info(staging, self.run.prompt_info)
                seals.publish_files(staging, self.run.folder, self.facts(loop))


def random_state() -> dict[str, torch.Tensor]:
    """자동미분 길의 dropout이 쓰는 난수의 상태. 장치마다 uint8 [상태의 바이트]."""
    on_gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **on_gpu}


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def read_tensors(file: Path) -> dict:
    """torch.save가 쓴 것을 CPU에 읽는다. 담긴 코드는 실행하지 않는다."""
    return torch.load(file, map_location="cpu", weights_only=True)
