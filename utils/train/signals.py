"""학습을 멈추라는 신호를 받는다: Ctrl+C, SIGTERM, 터미널이나 콘솔 닫기, 로그오프.

처음 신호는 하던 step을 마치고 저장한 뒤 멈추라는 뜻이고, 두 번째는 지금 끝내라는 뜻이다.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))
CONSOLE_ENDS = (2, 5, 6)  # Windows의 CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT
NOTICE = "멈추라는 신호를 받았다. 하던 step을 마치고 저장한다. 한 번 더 보내면 지금 끝낸다"
GRACE_SECONDS = 20  # 이만큼 기다려도 저장하지 못하면 Windows가 끝내는 대로 둔다


class Interrupt:
    """`with` 안에서 신호를 받아 적어 둔다. 밖에서는 원래의 처리로 돌아간다.

    Args:
        notice: 신호를 받으면 할 말.

    Attributes:
        code: 신호를 받았으면 종료 코드(Ctrl+C 130, SIGTERM 143), 아니면 None.
    """

    def __init__(self, say: Callable[[str], None], notice: str = NOTICE):
        self.say, self.notice = say, notice
        self.code: int | None = None
        self._previous: dict = {}
        self._saved = threading.Event()

    def __enter__(self) -> "Interrupt":
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup으로 실행했으면 그 뜻을 따른다
                self._previous[number] = signal.signal(number, self.receive)
        if sys.platform == "win32":
            self._handler = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)(self.console_event)
            ctypes.windll.kernel32.SetConsoleCtrlHandler(self._handler, True)
        return self

    def __exit__(self, *error) -> None:
        self._saved.set()
        if sys.platform == "win32":
            ctypes.windll.kernel32.SetConsoleCtrlHandler(self._handler, False)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame=None) -> None:
        """신호 하나를 받는다. 두 번째면 그 자리에서 끝낸다: 쓰던 임시 폴더는 체크포인트로 보이지 않는다."""
        code = 130 if number in (signal.SIGINT, getattr(signal, "SIGBREAK", None)) else 128 + number
        if self.code is not None:
            os._exit(code)
        self.code = code
        if number == getattr(signal, "SIGHUP", None):
            silence()
        with contextlib.suppress(OSError, RuntimeError):  # 출력하던 도중에 온 신호면 말하지 않는다
            self.say(self.notice)

    def console_event(self, event: int) -> bool:
        """Windows가 콘솔을 닫거나 로그오프할 때 다른 스레드에서 부른다. 돌아가면 끝나므로 저장될 때까지 붙든다."""
        if event not in CONSOLE_ENDS:
            return False
        self.code = 128 + signal.SIGTERM
        silence()
        self._saved.wait(GRACE_SECONDS)
        return True

    @property
    def asked(self) -> bool:
        """멈추라는 신호를 받았는지. 여러 프로세스면 하나라도 받았는지를 함께 정한다."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return self.code is not None
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        code = torch.tensor(self.code or 0, device=device)
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        agreed = int(code)
        if agreed:  # 모으는 동안 온 신호를 0으로 덮지 않는다. 그것은 다음 step에서 함께 정한다
            self.code = agreed
        return agreed != 0


def silence() -> None:
    """닫힌 터미널에 쓰다 죽지 않게 표준 출력을 버린다."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
