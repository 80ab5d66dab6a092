"""페이지에서 시작한 학습들: `finetune-lora.py`를 따로 띄우고, 폴더의 기록만 보고 따라가고, 멈추고, 이어 간다.

학습은 제 세션의 프로세스라 브라우저나 페이지의 서버가 닫혀도 이어진다. 다시 연 서버는 폴더의 기록에서 찾는다.
한 컴퓨터에서는 페이지를 여럿 열어도 한 번에 하나만 시작한다.
"""

import contextlib
import getpass
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from utils.console import printable
from utils.errors import UsageError, why
from utils.files import locked, staged_file
from utils.model import checkpoint
from utils.paths import ROOT, shown
from utils.record import RUN_FILE, read_run
from utils.talk.order import Order, short
from utils.talk.runlog import RunLog, last_line, read_log, token_count

SCRIPT = "finetune-lora.py"
PROCESS_FILE, LOG_FILE = "process.json", "train.log"
CHECK_SECONDS = 900


@dataclass(frozen=True)
class Progress:
    """학습 하나가 어디까지 왔는지.

    Attributes:
        state: "running", "finished", "stopped"(저장하고 멈춤), "failed" 가운데 하나.
        line: 그것을 말하는 한 줄.
        log: 지금까지의 로그.
    """

    state: str
    line: str
    log: RunLog


class Runs:
    """`home` 아래의 학습들. 한 번에 하나만 돈다.

    Args:
        home: output_dir들을 둘 폴더. 적지 않으면 지금 폴더의 train이다.
        computer: 이 컴퓨터의 페이지들이 지금 도는 학습을 적어 두는 폴더. 카드가 하나이므로 다른 폴더에서 연 페이지와도
            함께 쓴다. 적지 않으면 임시 폴더 아래다.
    """

    def __init__(self, home: Path | None = None, computer: Path | None = None):
        self.home = Path.cwd() / "train" if home is None else home
        self._computer = computer or Path(tempfile.gettempdir()) / f"polyglot-ko-lite-{getpass.getuser()}"
        self._lock = threading.Lock()
        self._checking = threading.Lock()
        self._started: dict[str, subprocess.Popen] = {}

    def names(self) -> list[str]:
        """페이지에서 시작한 학습의 이름. 새것부터다."""
        files = self.home.glob(f"*/{PROCESS_FILE}")
        return [file.parent.name for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)]

    def folder(self, name: object) -> Path:
        """그 이름의 학습의 output_dir.

        Raises:
            UsageError: 페이지에서 시작한 학습이 아니다.
        """
        if not isinstance(name, str) or name not in self.names():
            raise UsageError("목록에서 학습을 골라 주세요")
        return self.home / name

    def command(self, order: Order, resume: bool = False) -> list[str]:
        """시작할 때 그대로 실행하는 명령의 낱말들."""
        words = [sys.executable, short(ROOT / SCRIPT), *order.flags(self.home)]
        return [*words, "--resume_from_checkpoint", "True"] if resume else words

    def check(self, order: Order) -> str:
        """데이터의 검사와 계획을 적은 글. 같은 명령에 --check_data를 붙여 실행한다.

        Raises:
            UsageError: 이미 검사하고 있거나, 검사가 거절했거나, 너무 오래 걸린다.
        """
        if not self._checking.acquire(blocking=False):
            raise UsageError("이미 데이터를 검사하고 있어요. 끝난 뒤에 다시 눌러 주세요")
        try:
            done = subprocess.run([*self.command(order), "--check_data", "True"], stdin=subprocess.DEVNULL,
                                  capture_output=True, encoding="utf-8", errors="replace", timeout=CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            raise UsageError(f"검사가 {CHECK_SECONDS // 60}분 안에 끝나지 않았어요. 콘솔에서 해 보세요") from None
        finally:
            self._checking.release()
        if done.returncode:
            raise UsageError(last_line(done.stderr) or f"검사가 종료 코드 {done.returncode}로 끝났어요")
        text = printable(done.stdout.strip())
        found, mark, plan = text.rpartition("\n데이터: ")
        if not mark or "\n계획: " not in plan:
            return text
        return f"데이터: {plan}\n{self._time_line(plan, order)}\n\n{found}"  # 시작하면 무엇을 할지가 먼저 보인다

    def _time_line(self, plan: str, order: Order) -> str:
        """같은 기반 모델로 배운 가장 새 기록의 속도로 어림한 시간."""
        tokens = token_count(plan)
        files = self.home.glob(f"*/{RUN_FILE}") if tokens else ()
        for file in sorted(files, key=lambda file: -file.stat().st_mtime):
            with contextlib.suppress(UsageError, KeyError, TypeError, ValueError, ZeroDivisionError):
                run = read_run(file.parent)
                if Path(run["settings"]["base_model"]).name == Path(order.base_model).name:
                    minutes = max(1, round(tokens * order.epochs / run["tokens_per_second"] / 60))
                    return f"걸리는 시간: 약 {minutes:,}분({file.parent.name} 학습의 속도로 어림한 것)"
        return "걸리는 시간: 이 기반 모델로 배운 기록이 없어 몰라요. 시작하면 첫 step 뒤에 남은 시간이 보여요"

    def start(self, order: Order) -> None:
        """학습을 시작한다. 두 번 눌러도 하나만 시작한다.

        Raises:
            UsageError: 이미 학습하고 있거나, 그 이름의 폴더에 이미 무언가 있다.
        """
        folder = self.home / order.name
        with self._alone():
            if folder.exists() and any(folder.iterdir()):
                raise UsageError(f"{shown(folder)}에 이미 무언가 있어요. 다른 이름을 적거나, 멈춘 학습이면 이어 하세요")
            self._launch(folder, order, resume=False)

    def resume(self, name: object) -> None:
        """멈춘 학습을 마지막 체크포인트에서 이어 간다.

        Raises:
            UsageError: 이미 학습하고 있거나, 이어 갈 체크포인트가 없거나, 데이터나 기반 모델이 사라졌다.
        """
        folder = self.folder(name)
        with self._alone():
            if checkpoint.newest_valid(folder) is None:
                raise UsageError(f"{shown(folder)}에 이어 갈 체크포인트가 없어요. 다른 이름으로 처음부터 시작해 주세요")
            self._launch(folder, self.order(name), resume=True)

    def order(self, name: object) -> Order:
        """그 학습을 시작할 때의 주문. 파일에서 읽으므로 다시 검사한다.

        Raises:
            UsageError: 읽을 수 없거나, 데이터나 기반 모델이 사라졌다.
        """
        folder = self.folder(name)
        record = _read_record(folder)
        if record is None:
            raise UsageError(f"읽지 못했어요: {shown(folder / PROCESS_FILE)}. 콘솔에서 이어 가세요")
        try:
            return Order.checked(**{**record["order"], "name": folder.name})
        except TypeError:
            raise UsageError(f"{shown(folder / PROCESS_FILE)}의 항목이 맞지 않아요. 콘솔에서 이어 가세요") from None

    def stop(self, name: object) -> None:
        """Ctrl+C와 같은 신호를 보낸다. 학습은 하던 step을 마치고 저장한 뒤 멈춘다.

        Raises:
            UsageError: 돌고 있지 않거나 신호를 보내지 못했다.
        """
        folder = self.folder(name)
        process = self._process(folder)
        if process is None:
            raise UsageError("돌고 있지 않은 학습이에요")
        number = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)  # Windows는 묶음에 Ctrl+C를 보내지 못한다
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # nohup처럼 Ctrl+C를 무시하게 열린 서버의 자식도 무시한다
            number = signal.SIGTERM
        try:
            process.send_signal(number)
        except (OSError, ValueError, psutil.Error) as error:
            raise UsageError(f"멈추라는 신호를 보내지 못했어요({error}). 시작한 콘솔에서 Ctrl+C를 누르세요") from None

    def progress(self, name: object) -> Progress:
        """폴더의 기록만 보고 안 진행. 서버를 다시 열었어도 안다."""
        folder = self.folder(name)
        log = read_log(folder / LOG_FILE)
        running = self._process(folder) is not None
        state = "running" if running else _outcome(folder)
        return Progress(state, _describe(state, log), log)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """도는 학습이 없고, 이 컴퓨터의 다른 페이지도 이 동안에는 시작하지 못한다.

        Raises:
            UsageError: 이미 학습하고 있거나, 다른 페이지가 지금 시작하고 있다.
        """
        busy = "다른 페이지가 지금 학습을 시작하고 있어요. 잠시 뒤에 다시 눌러 주세요"
        with self._lock, locked(self._computer, busy=busy):
            running = [name for name in self.names() if self._process(self.home / name) is not None]
            elsewhere = _read_record(self._computer)
            if not running and elsewhere and _find_process(elsewhere):
                running = [shown(str(elsewhere.get("folder")))]
            if running:
                raise UsageError(f"이미 학습하고 있어요: {running[0]}. 끝나거나 멈춘 뒤에 시작해 주세요")
            yield

    def _launch(self, folder: Path, order: Order, resume: bool) -> None:
        """제 세션의 프로세스로 띄우고 기록한다. 셸은 거치지 않는다."""
        apart = ({"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt"
                 else {"start_new_session": True})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LOG_FILE).open("ab") as log:
                process = subprocess.Popen(self.command(order, resume), stdin=subprocess.DEVNULL, stdout=log,
                                           stderr=subprocess.STDOUT, **apart)
        except OSError as error:
            raise UsageError(f"{shown(folder)}에서 학습을 시작하지 못했어요({why(error)})") from None
        self._started[folder.name] = process
        record = {"pid": process.pid, "created": psutil.Process(process.pid).create_time(), "order": asdict(order),
                  "folder": str(folder)}
        for place in (folder, self._computer):
            with staged_file(place / PROCESS_FILE) as file:
                json.dump(record, file, ensure_ascii=False, indent=2)

    def _process(self, folder: Path) -> psutil.Process | None:
        """돌고 있는 프로세스. 끝났으면 None이다."""
        started = self._started.get(folder.name)
        if started is not None:
            started.poll()  # 끝난 자식을 거둔다
        return _find_process(_read_record(folder) or {})


def _read_record(folder: Path) -> dict | None:
    """학습을 시작하며 적어 둔 것. 읽을 수 없으면 None이다."""
    try:
        record = json.loads((folder / PROCESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("order"), dict) else None


def _find_process(record: dict) -> psutil.Process | None:
    """기록에 적힌 프로세스. 끝났거나, 그 번호를 다른 프로세스가 쓰면 None이다."""
    with contextlib.suppress(KeyError, TypeError, ValueError, psutil.Error):
        process = psutil.Process(record["pid"])
        words = process.cmdline()  # exec이 막 끝난 프로세스의 것은 아직 비어 있다
        ours = not words or any(word.endswith(SCRIPT) for word in words)
        same = ours and abs(process.create_time() - record["created"]) < 1
        if same and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _outcome(folder: Path) -> str:
    if (folder / RUN_FILE).is_file():  # 다 배운 뒤에야 적는다
        return "finished"
    return "stopped" if checkpoint.newest_valid(folder) is not None else "failed"


def _describe(state: str, log: RunLog) -> str:
    parts = []
    if log.losses:
        parts = [f"{log.step}/{log.total} step", f"loss {log.losses[log.step]:.3f}"]
        if state == "running":
            parts.append(f"남은 시간 {log.left}" if log.step != log.total else "마무리하는 중")
    if log.measured is not None:
        parts.append(f"검증 loss {log.measured:.3f}")
    heads = {"running": "학습하는 중" if log.losses else "준비하는 중", "finished": "끝났어요",
             "stopped": "멈췄어요. 이어 할 수 있어요",
             "failed": f"실패했어요: {log.last_line or '로그가 비어 있어요'}"}
    return " · ".join([heads[state], *parts])
