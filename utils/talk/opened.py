"""끝난 학습과 대화하는 페이지: 콘솔에서 치는 것과 같은 명령으로 따로 열고 그 주소를 알려 준다."""

import atexit
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from utils.errors import UsageError, why
from utils.paths import ROOT
from utils.talk.order import short
from utils.talk.runlog import last_line

SCRIPT, OPENED = "generate.py", "페이지: "


class Opened:
    """이 페이지에서 연 페이지들. 이 페이지를 닫으면 함께 닫는다."""

    def __init__(self):
        self._pages: dict[Path, tuple[subprocess.Popen, str]] = {}
        self._lock = threading.Lock()
        atexit.register(self.close)

    @staticmethod
    def command(folder: Path) -> list[str]:
        """여는 명령의 낱말들."""
        return [sys.executable, short(ROOT / SCRIPT), "--peft_root", short(folder)]

    def url_of(self, folder: Path) -> str:
        """그 학습과 대화하는 페이지의 주소. 닫혀 있으면 열고, 모델을 다 올릴 때까지 기다린다.

        Raises:
            UsageError: 열리지 않았다. 그 이유를 말한다.
        """
        with self._lock:
            process, url = self._pages.get(folder, (None, ""))
            if process is None or process.poll() is not None:
                process, url = self._launch(folder)
                self._pages[folder] = process, url
            return url

    def close(self) -> None:
        """연 페이지를 모두 닫는다."""
        for process, _ in self._pages.values():
            process.terminate()
        self._pages.clear()

    def _launch(self, folder: Path) -> tuple[subprocess.Popen, str]:
        try:
            process = subprocess.Popen(self.command(folder), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
        except OSError as error:
            raise UsageError(f"페이지를 열지 못했어요({why(error)})") from None
        said = []
        for line in process.stdout:
            if line.startswith(OPENED):
                threading.Thread(target=process.stdout.read, daemon=True).start()  # 읽지 않으면 그 페이지가 막힌다
                return process, line.removeprefix(OPENED).split()[0]
            said.append(line)
        raise UsageError(last_line("".join(said)) or "페이지를 열지 못했어요")


def wait_for_signal() -> None:
    """끝내라는 신호를 기다린다. SIGTERM이나 터미널 닫기에도 정리하고 끝나, 이 페이지가 연 페이지들이 남지 않는다."""
    def leave(number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)  # 정리가 늦어지면 두 번째 신호가 그 자리에서 끝낸다
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup의 뜻을 따른다
            signal.signal(number, leave)
    while True:
        time.sleep(3600)
