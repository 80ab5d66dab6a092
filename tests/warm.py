"""라이브러리를 미리 읽어 둔 프로세스. 시도마다 갈라(fork) 스크립트를 새 프로세스로 돌린다. Linux에서만 쓴다.

torch, transformers, PEFT를 읽는 데만 CPU 8초가 든다. 갈라진 프로세스는 읽어 둔 모듈만 물려받고, 인자와 출력과 신호와
종료 코드는 새로 시작한 것과 같다. 라이브러리가 읽을 때 보는 환경 변수(HF_HOME)를 바꾸는 시도와, 시작하는 것을 보는
시도는 새로 시작한다.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
# 갈라진 프로세스가 물려받을 모듈들. 읽는 데 오래 걸린다
PRELOADED = ("bitsandbytes", "matplotlib.pyplot", "peft", "transformers", "utils.merge.proof", "utils.merge.writer",
             "utils.talk.source", "utils.train.fit", "utils.train.results")
CAN_FORK = hasattr(os, "fork") and sys.platform == "linux"


@dataclass
class Outcome:
    """시도 하나의 결과.

    Attributes:
        codes: 프로세스마다의 종료 코드. 신호로 죽었으면 그 번호의 음수다.
        stdout, stderr: 모든 프로세스가 적은 것.
        seconds: 걸린 시간.
    """

    codes: list[int]
    stdout: str
    stderr: str
    seconds: float


class Warm:
    """갈라 쓸 프로세스를 띄워 두고 시도를 하나씩 맡긴다.

    Args:
        folder: 시도의 출력을 둘 폴더.

    Attributes:
        can_count: 쓰는 순간을 세고 그때 고장을 낼 수 있는지. C 컴파일러가 있어야 한다.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8",
               "PYTHONPATH": f"{HERE.parent}:{HERE}"}
        compiler = shutil.which("cc") or shutil.which("gcc")
        self.can_count = compiler is not None
        if compiler:
            env["LD_PRELOAD"] = str(folder / "faults.so")
            subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", env["LD_PRELOAD"], str(HERE / "faults.c"),
                            "-ldl"], check=True)
        self.process = subprocess.Popen([sys.executable, str(HERE / "warm.py")], stdin=subprocess.PIPE, env=env,
                                        stdout=subprocess.PIPE, encoding="utf-8")

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)

    def run(self, script: Path, *flags: str, cwd: Path = HERE.parent, env: dict | None = None, world: int = 1,
            faults: dict | None = None, seconds: float = 600) -> Outcome:
        """스크립트 하나를 돌리고 끝나기를 기다린다.

        Args:
            env: 더할 환경 변수.
            world: 함께 도는 프로세스의 수. 둘 이상이면 torchrun이 정하는 환경 변수를 준다.
            faults: 갈라진 프로세스가 스크립트에 앞서 일으킬 고장(`faults.arm`).
            seconds: 이만큼 지나면 SIGKILL로 끝낸다.
        """
        out, err = self.folder / "stdout", self.folder / "stderr"
        trial = {"argv": [str(script), *flags], "cwd": str(cwd), "env": env or {}, "world": world, "faults": faults,
                 "seconds": seconds, "out": str(out), "err": str(err)}
        began = time.perf_counter()
        self.process.stdin.write(json.dumps(trial) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in (out, err)]
        return Outcome(codes, *texts, time.perf_counter() - began)


@cache
def shared() -> Warm:
    """테스트들이 함께 쓰는 것. 처음 청할 때 띄우고, 테스트가 끝나면 닫는다."""
    warm = Warm(Path(tempfile.mkdtemp(prefix="warm-")))
    atexit.register(warm.stop)
    return warm


def serve() -> None:
    """표준 입력의 시도마다 프로세스를 갈라 실행하고 종료 코드들을 표준 출력에 적는다."""
    from utils import console

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    console.hush_libraries()
    for module in PRELOADED:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    warm_up()
    gc.freeze()  # 갈라진 프로세스가 읽어 둔 모듈을 쓰레기로 훑지 않는다
    for line in sys.stdin:
        trial = json.loads(line)
        for name in ("out", "err"):
            Path(trial[name]).write_bytes(b"")
        port = free_port() if trial["world"] > 1 else 0
        children = []
        for rank in range(trial["world"]):
            child = os.fork()
            if child == 0:
                run_trial(trial, rank, port)
            children.append(child)
        answers.write(json.dumps(wait(children, trial["seconds"])) + "\n")
        answers.flush()


def warm_up() -> None:
    """작은 모델 하나를 올려 본다. 처음 부를 때만 읽는 모듈과 처음에만 만드는 표(가중치 이름의 정규식)를 마련한다."""
    from tiny import build_neox

    from utils.model import loader, tokenizer

    with tempfile.TemporaryDirectory() as place:
        base = build_neox(Path(place))
        loader.require_base(base)
        loader.load_base(base, loader.choose_device(), "4bit")
        tokenizer.load_tokenizer(base)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(children: list[int], seconds: float) -> list[int]:
    """모두 끝나기를 기다려 종료 코드를 돌려준다. 시간이 다 되면 남은 것을 죽인다."""
    deadline = time.perf_counter() + seconds
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.perf_counter() > deadline:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


def run_trial(trial: dict, rank: int, port: int) -> None:
    """갈라진 프로세스: 표준 입출력을 바꾸고 스크립트를 `__main__`으로 부른 뒤 끝난다."""
    import torch

    # 갈라진 프로세스는 torch의 스레드 풀을 다시 짓는다. 여러 스레드가 함께 처음 부르면 서로 겹쳐 죽으므로 먼저 짓는다
    torch.set_num_threads(1)
    for stream, name in ((0, os.devnull), (1, trial["out"]), (2, trial["err"])):
        os.dup2(os.open(name, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_APPEND), stream)
    os.environ |= trial["env"]
    if trial["world"] > 1:
        size = str(trial["world"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        os.chdir(trial["cwd"])
        if trial["faults"] is not None:
            import faults

            faults.arm(trial["faults"], rank, trial["world"])
        sys.argv = trial["argv"]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        if trial["faults"] is not None:
            faults.disarm(trial["faults"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
