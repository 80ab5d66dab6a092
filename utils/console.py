"""콘솔에 쓰는 글: 한 줄 알림, UTF-8, 라이브러리의 소음."""

import contextlib
import logging
import os
import shlex
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

from utils.process import is_first_process

SAY_EVERY = 5.0  # 오래 걸리는 계산을 하는 동안 이만큼(초)마다 어디까지 했는지 말한다
_details = False


def say(text: str = "") -> None:
    """한 줄을 출력한다. 여러 프로세스로 실행하면 rank 0만 말한다."""
    if is_first_process():
        print(printable(text), flush=True)


@contextlib.contextmanager
def telling(say: Callable[[str], None], line: Callable[[], str]) -> Iterator[None]:
    """`with` 안에 있는 동안 `SAY_EVERY`초마다 `line()`을 말한다. 오래 걸리는 계산이 멈춘 듯 보이지 않는다."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(SAY_EVERY):
            say(line())

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def printable(text: str) -> str:
    """터미널을 조종하는 제어 문자를 뺀다. 줄바꿈과 탭은 남긴다."""
    return "".join(char for char in text if char in "\n\t" or not is_control(char))


def is_control(char: str) -> bool:
    """제어 문자(C0, DEL, C1)인가."""
    return ord(char) < 32 or 127 <= ord(char) < 160


def one_line(text: str, limit: int = 120) -> str:
    """여러 줄의 글을 한 줄로. `limit`글자를 넘으면 자른다."""
    line = " ".join(text.split()) or "(빈 답)"
    return line if len(line) <= limit else f"{line[:limit]}…"


def shown_command(words: list[str]) -> str:
    """콘솔에 그대로 붙여 실행할 수 있는 한 줄."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def show_details(on: bool) -> None:
    """`detail`의 줄을 보일지 정한다. `--verbose`다."""
    global _details
    _details = on


def detail(text: str) -> None:
    """고치는 사람에게만 쓸모 있는 한 줄(어느 계산의 길을 골랐는지). `--verbose True`일 때만 보인다."""
    if _details:
        say(text)


def use_utf8() -> None:
    """cp949 콘솔에서도 한글과 모든 글자를 내보낼 수 있게 한다."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def hush_libraries() -> None:
    """사용자가 어찌할 수 없는 라이브러리의 알림과 진행 막대를 끈다. 라이브러리를 부르기 전에 불러야 한다."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="fan_in_fan_out", module="peft")  # 맞는 값을 peft가 스스로 고른다
    warnings.filterwarnings("ignore", message="Found missing adapter keys", module="peft")  # load_adapter가 거절한다
