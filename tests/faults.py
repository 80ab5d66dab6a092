"""고장을 일으키며 학습하는 도구. 라이브러리를 한 번만 읽고, 시도마다 프로세스를 갈라(fork) 실제 스크립트를 돌린다.

일으키는 고장: n번째 쓰기에서 디스크가 참(full), n번째 쓰기나 이름 바꾸기에서 SIGKILL(kill), 정한 step의 신호(signals),
정한 micro-step에서 메모리 부족(oom), 정한 시간 뒤 SIGKILL(seconds).
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODES = {"count": 0, "full": 1, "kill": 2}
CAN_FORK = hasattr(os, "fork") and sys.platform == "linux"


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


@dataclass
class Lab:
    """갈라 쓸 프로세스를 띄워 두고 시도를 하나씩 맡긴다."""

    folder: Path
    base_flags: dict
    process: subprocess.Popen | None = field(default=None)

    def start(self) -> "Lab":
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
        shim = self.folder / "faults.so"
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler:
            subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(HERE / "faults.c"), "-ldl"],
                           check=True)
            env["LD_PRELOAD"] = str(shim)
        self.can_count = compiler is not None
        self.process = subprocess.Popen([sys.executable, str(HERE / "faults.py")], stdin=subprocess.PIPE, env=env,
                                        stdout=subprocess.PIPE, encoding="utf-8")
        return self

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)

    def train(self, output: Path, *, fault: tuple[str, int] | None = None, signals: list | None = None,
              oom: int | None = None, seconds: float | None = None, answers: bool = False, **flags) -> Outcome:
        """`output`에 학습한다. 플래그의 값이 None이면 그 플래그를 뺀다.

        Args:
            answers: 예시 답과 곡선까지 쓴다. 오래 걸리므로 보통은 어댑터까지만 쓴다.
        """
        merged = {**self.base_flags, **flags, "output_dir": str(output)}
        argv = [word for name, value in merged.items() if value is not None for word in (f"--{name}", str(value))]
        trial = {"argv": argv, "fault": fault, "signals": signals or [], "oom": oom, "seconds": seconds,
                 "answers": answers, "folder": str(output), "log": str(self.folder / "trial.log")}
        self.process.stdin.write(json.dumps(trial) + "\n")
        self.process.stdin.flush()
        return Outcome(**json.loads(self.process.stdout.readline()))

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


def serve() -> None:
    """표준 입력의 시도마다 프로세스를 갈라 실행하고 결과를 표준 출력에 적는다."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    import bitsandbytes  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from utils.train import (  # noqa: F401
        fit,
        progress,
        results,
        stage,
    )

    torch.set_num_threads(1)
    for line in sys.stdin:
        trial = json.loads(line)
        began = time.perf_counter()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            run_trial(trial, writer)
        os.close(writer)
        code = wait(child, trial["seconds"])
        with os.fdopen(reader, "rb") as stream:
            writes = int(stream.read() or b"-1")
        text = Path(trial["log"]).read_text(encoding="utf-8", errors="replace")
        seconds = time.perf_counter() - began
        answers.write(json.dumps({"code": code, "text": text, "writes": writes, "seconds": seconds}) + "\n")
        answers.flush()


def wait(child: int, seconds: float | None) -> int:
    deadline = time.perf_counter() + (seconds if seconds is not None else 1200)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.perf_counter() > deadline:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.005)


def run_trial(trial: dict, writer: int) -> None:
    """갈라진 프로세스: 고장을 걸고 스크립트의 단계를 부른 뒤 끝난다."""
    log = os.open(trial["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code, shim = 1, ctypes.CDLL(None)
    try:
        from conftest import load_script

        from utils import cli, console

        script = load_script("finetune-lora.py")
        sys.argv = ["finetune-lora.py", *trial["argv"]]
        raise_signals(console, trial["signals"])
        if not trial["answers"]:
            from utils.train import results

            results.write = lambda *everything: None
        if trial["oom"] is not None:
            run_out_of_memory(trial["oom"])
        if hasattr(shim, "fault_arm"):
            mode, at = trial["fault"] or ("count", -1)
            shim.fault_arm(trial["folder"].encode(), MODES[mode], ctypes.c_long(at))
        cli.run(script.train, script.RETIRED)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(writer, str(shim.fault_count() if hasattr(shim, "fault_count") else -1).encode())
        os._exit(code)


def raise_signals(console, signals: list) -> None:
    """진행을 알리는 줄에 정한 step이 나오면 자신에게 신호를 보낸다. [step, 신호의 이름, ...] RAM도 함께 적는다.

    step은 그 줄이 시작하는 글이어도 된다.
    """
    import psutil

    say, memory = console.say, psutil.Process().memory_info

    def heard(text: str = "") -> None:
        say(text)
        if "/" in text.strip().split(" ")[0]:
            say(f"[RAM] {memory().rss}")
        for step, *names in signals:
            if text.strip().startswith(f"{step}/" if isinstance(step, int) else step):
                for name in names:
                    os.kill(os.getpid(), getattr(signal, name))

    console.say = heard


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


if __name__ == "__main__":
    serve()
