"""페이지에서 시작한 학습의 로그(train.log): 어디까지 왔는지와 loss의 곡선을 `finetune-lora.py`가 적은 줄에서 읽는다."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from utils.console import printable

LOG_BYTES = 1 << 20  # 로그의 끝에서 읽는 바이트. 학습 한 번은 수십 KB를 적는다
_STEP = re.compile(r"\s*(\d+)/(\d+)  loss (\S+).*남은 시간 (\S+)")
_EVAL = re.compile(r"(학습 전 |학습 후 |  )검증 loss ([\d.]+)(?: |\(|$)")
_BLOCKS = re.compile(r"블록: ([\d,]+)개 x (\d+) 토큰\(채움 ([\d.]+)%\)")


@dataclass
class RunLog:
    """로그 하나를 읽은 것.

    Attributes:
        lines: 로그의 줄들.
        losses, evals: step -> 학습 loss와 검증 loss. 이어 간 학습에서는 나중에 적힌 것이 남는다.
        total: 모두 몇 step인지. 아직 모르면 0이다.
        left: 남은 시간. 아직 모르면 빈 글이다.
        measured: 마지막으로 잰 검증 loss. 없으면 None이다.
    """

    lines: list[str]
    losses: dict[int, float] = field(default_factory=dict)
    evals: dict[int, float] = field(default_factory=dict)
    total: int = 0
    left: str = ""
    measured: float | None = None

    @property
    def step(self) -> int:
        return max(self.losses, default=0)

    @property
    def last_line(self) -> str:
        return last_line("\n".join(self.lines))


def read_log(file: Path) -> RunLog:
    """로그를 읽는다. 없으면 빈 로그다."""
    log = RunLog(_tail(file).splitlines())
    for line in log.lines:
        if found := _STEP.match(line):
            log.losses[int(found[1])] = float(found[3])
            log.total, log.left = int(found[2]), found[4]
        elif found := _EVAL.match(line):
            log.measured = float(found[2])
            if found[1] != "학습 후 ":  # 가장 좋았던 step의 것을 다시 말하는 줄이다
                log.evals[0 if found[1] == "학습 전 " else log.step] = log.measured
    return log


def token_count(plan: str) -> float | None:
    """계획의 글에 적힌, 한 epoch에 배울 토큰의 수."""
    found = _BLOCKS.search(plan)
    if found is None:
        return None
    count, length, filled = (float(word.replace(",", "")) for word in found.groups())
    return count * length * filled / 100


def last_line(text: str) -> str:
    """마지막 줄. 300글자까지다."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[-1]).removeprefix("오류: ")[:300] if lines else ""


def _tail(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - LOG_BYTES))
            return printable(stream.read().decode("utf-8", "replace").replace("\r", "\n"))
    except OSError:
        return ""
