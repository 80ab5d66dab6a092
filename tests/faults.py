"""고장을 일으키며 학습하는 도구. 시도마다 갈라진 프로세스(`warm`)에 고장을 걸고 실제 스크립트를 돌린다.

일으키는 고장: n번째 쓰기에서 디스크가 참(full), n번째 쓰기나 이름 바꾸기에서 SIGKILL(kill), 정한 step의 신호(signals),
정한 micro-step에서 메모리 부족(oom), 정한 시간 뒤 SIGKILL(seconds).
"""

import ctypes
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from warm import shared

HERE = Path(__file__).resolve().parent
MODES = {"count": 0, "full": 1, "kill": 2}


@dataclass
class Outcome:
    """시도 하나의 결과. `code`는 종료 코드, 신호로 죽었으면 음수다. `writes`는 output_dir에 쓴 횟수다."""

    code: int
    text: str
    writes: int
    seconds: float

    @property
    def error(self) -> str:
        lines = [line for line in self.text.splitlines() if line.startswith("오류: ")]
        return lines[-1] if lines else ""


class Lab:
    """고장을 걸며 학습하는 실험실.

    Args:
        folder: 쓴 횟수를 적을 폴더.
        base_flags: 시도마다 줄 플래그.
    """

    def __init__(self, folder: Path, base_flags: dict):
        self.base_flags, self.counted, self.warm = base_flags, folder / "writes", shared()
        self.can_count = self.warm.can_count

    def train(self, output: Path, *, fault: tuple[str, int] | None = None, signals: list | None = None,
              oom: int | None = None, seconds: float = 1200, answers: bool = False, records: bool = False,
              memory: bool = False, world: int = 1, through: tuple[Path, ...] = (), **flags) -> Outcome:
        """`output`에 학습한다. 플래그의 값이 None이면 그 플래그를 뺀다.

        Args:
            answers: 기록과 예시 답까지 쓴다. 오래 걸리므로 보통은 어댑터까지만 쓴다.
            records: 기록(run.json, 곡선)까지 쓰고 예시 답은 만들지 않는다.
            memory: 진행을 알리는 줄마다 쓰는 RAM(바이트)을 `[RAM]`으로 적는다.
            world: 함께 배우는 프로세스의 수. 신호는 마지막 프로세스에만 보낸다.
            through: 학습 스크립트를 대신 시작해 줄 스크립트와 그 인자.
        """
        merged = {**self.base_flags, **flags, "output_dir": str(output)}
        words = [word for name, value in merged.items() if value is not None for word in (f"--{name}", str(value))]
        script, *rest = (*through, HERE.parent / "finetune-lora.py")
        faults = {"fault": fault, "signals": signals or [], "oom": oom, "answers": answers, "records": records,
                  "memory": memory, "folder": str(output), "counted": str(self.counted)}
        self.counted.write_text("-1", encoding="utf-8")
        done = self.warm.run(script, *map(str, rest), *words, world=world, faults=faults, seconds=seconds)
        code = next((code for code in done.codes if code), 0)
        return Outcome(code, done.stdout + done.stderr, int(self.counted.read_text(encoding="utf-8")), done.seconds)

    def resume(self, output: Path, **options) -> Outcome:
        return self.train(output, resume_from_checkpoint="True", **options)


def state_of(checkpoint: Path) -> dict:
    """체크포인트의 어댑터, optimizer, loss의 기록. `same`으로 비교한다."""
    import torch
    from safetensors.torch import load_file

    log = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")
    return {"adapter": load_file(checkpoint / "adapter_model.safetensors"),
            "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
            "log": [{name: entry[name] for name in names if name in entry} for entry in log]}


def same(left, right) -> bool:
    """tensor까지 한 비트도 다르지 않은지."""
    import torch

    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def arm(faults: dict, rank: int, world: int) -> None:
    """갈라진 프로세스에 고장을 건다. 스크립트를 부르기 전이다."""
    if world == 1:
        follow_lines(faults["signals"], faults["memory"])
    elif rank == world - 1:
        follow_steps(faults["signals"])
    from utils.train import results

    if faults["records"]:
        results.answer_samples = lambda *everything: None
    elif not faults["answers"]:
        results.write = lambda *everything: None
    if faults["oom"] is not None:
        run_out_of_memory(faults["oom"])
    shim = ctypes.CDLL(None)
    if hasattr(shim, "fault_arm"):
        mode, at = faults["fault"] or ("count", -1)
        shim.fault_arm(faults["folder"].encode(), MODES[mode], ctypes.c_long(at))


def disarm(faults: dict) -> None:
    """쓴 횟수를 적는다."""
    shim = ctypes.CDLL(None)
    if hasattr(shim, "fault_count"):
        Path(faults["counted"]).write_text(str(shim.fault_count()), encoding="utf-8")


def follow_lines(signals: list, memory: bool) -> None:
    """진행을 알리는 줄에 정한 step이 나오면 자신에게 신호를 보낸다. [step, 신호의 이름, ...]

    step은 그 줄이 시작하는 글이어도 된다.
    """
    import psutil

    from utils import console

    say, process = console.say, psutil.Process()

    def say_and_send(text: str = "") -> None:
        say(text)
        if memory and "/" in text.strip().split(" ")[0]:
            say(f"[RAM] {process.memory_info().rss}")
        for step, *names in signals:
            if text.strip().startswith(f"{step}/" if isinstance(step, int) else step):
                send(names)

    console.say = say_and_send


def follow_steps(signals: list) -> None:
    """말하지 않는 프로세스에서 같은 일을 한다: 정한 step의 줄을 적을 때 자신에게 신호를 보낸다."""
    from utils.train.loop import Loop

    log = Loop.log

    def log_and_send(self, row: dict[str, float]) -> None:
        log(self, row)
        for step, *names in signals:
            if "loss" in row and self.state.global_step == step:
                send(names)

    Loop.log = log_and_send


def send(names: list[str]) -> None:
    """이름으로 적은 신호들을 자신에게 보낸다."""
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))


def run_out_of_memory(at: int) -> None:
    """`at`번째 micro-step에서 한 번, 블록이 둘 이상이면 메모리가 모자란다."""
    import torch

    from utils.train.graph_step import CapturedStep

    train, calls = CapturedStep.train, [0]

    def short_of_memory(self, batch):
        calls[0] += 1
        if calls[0] == at and len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("시험")
        return train(self, batch)

    CapturedStep.train = short_of_memory
