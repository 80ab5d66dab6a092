"""콘솔에 쓰는 글: 한 줄 알림, UTF-8, 라이브러리의 소음."""

import logging
import os
import sys
import warnings

from utils.process import is_first_process


def say(text: str = "") -> None:
    """한 줄을 출력한다. 여러 프로세스로 실행하면 rank 0만 말한다."""
    if is_first_process():
        print(printable(text), flush=True)


def printable(text: str) -> str:
    """터미널을 조종하는 제어 문자를 뺀다. 줄바꿈과 탭은 남긴다."""
    return "".join(char for char in text if char in "\n\t" or (ord(char) >= 32 and not 127 <= ord(char) < 160))


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
