"""학습이 어디까지 왔는지 사람이 읽을 줄로 말한다."""

import math
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from utils.process import is_first_process
from utils.record import FIGURES
from utils.train.state import TrainState

MAX_LINES = 100
BAR = "{desc}|{bar:30}| {n_fmt}/{total_fmt} 남은 시간 {remaining}"


class Speed:
    """`with` 안에서 보낸 시간을 더해 속도를 잰다. 평가하고 저장하는 시간은 세지 않는다.

    Args:
        tokens_per_step: optimizer step 하나가 배우는 토큰의 수.
    """

    def __init__(self, tokens_per_step: float = 0.0):
        self.tokens_per_step = tokens_per_step
        self.busy = 0.0
        self.done = 0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error) -> None:
        self.busy += time.perf_counter() - self._began
        self.done += 1

    def figures(self) -> dict[str, float]:
        """step의 기록에 더할 속도와 VRAM."""
        figures = {"tokens_per_second": self.done * self.tokens_per_step / self.busy if self.busy else 0.0}
        if torch.cuda.is_available():
            figures["peak_vram_gb"] = torch.cuda.max_memory_reserved() / 1e9
        return figures

    def seconds_left(self, n_steps: int) -> float:
        return n_steps * self.busy / max(self.done, 1)


class Progress:
    """step마다 한 줄(loss, 기울기, 토큰/초, 남은 시간)을 말하고, 터미널이면 막대도 그린다.

    Args:
        say: 한 줄을 내보내는 함수.
        speed: 학습 루프가 재는 속도.
    """

    def __init__(self, say: Callable[[str], None], speed: Speed):
        self.say, self.speed = say, speed
        self.before = self.best = math.inf  # 학습 전의 검증 loss와, 지금까지의 가장 낮은 것
        self.bar = tqdm(disable=True)

    def begin(self, state: TrainState) -> None:
        if state.best_metric is not None:  # 이어 가는 실행이다
            self.best = min(self.best, state.best_metric)
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, bar_format=BAR, leave=False,
                        disable=None if is_first_process() else True)

    def log(self, row: dict[str, float], state: TrainState) -> None:
        if "eval_loss" in row:
            self._write(self._evaluation_line(row["eval_loss"], state) + pair_note(row, "eval_"))
            return
        self.bar.set_description_str(f"loss {row['loss']:.3f} ", refresh=False)
        self.bar.update(state.global_step - self.bar.n)
        every = max(1, state.max_steps // MAX_LINES)
        if state.global_step % every == 0 or state.global_step in (1, state.max_steps):
            self._write(self._line(row, state))

    def saved(self, folder: Path, state: TrainState, final: bool) -> None:
        """저장은 말하지 않는다."""

    def close(self) -> None:
        self.bar.close()

    def _evaluation_line(self, loss: float, state: TrainState) -> str:
        if state.global_step == 0:
            self.before = self.best = loss
            return f"학습 전 검증 loss {loss:.4f}"
        better, self.best = loss < self.best, min(self.best, loss)
        note = " (가장 좋다)" if better else " (학습 전보다 나쁘다)" if loss > self.before else ""
        return f"  검증 loss {loss:.4f}{note}"

    def _line(self, row: dict[str, float], state: TrainState) -> str:
        # 80칸의 터미널에서 한 줄에 들어간다
        left = self.speed.seconds_left(state.max_steps - state.global_step)
        digits = len(str(state.max_steps))
        return "  ".join([
            f"  {state.global_step:>{digits}}/{state.max_steps}",
            f"loss {row['loss']:.3f}{pair_note(row)}",
            f"기울기 {row['grad_norm']:.2f}",
            f"학습률 {row['learning_rate']:.1e}",
            f"{row['tokens_per_second']:,.0f} 토큰/초",
            f"{clock(left)} 남음",
        ])

    def _write(self, line: str) -> None:
        self.bar.clear()
        self.say(line)
        self.bar.refresh()


def pair_note(row: dict[str, float], prefix: str = "") -> str:
    """선호 쌍의 기록이면 보상이 맞은 비율과 보상의 차이. 아니면 빈 글이다."""
    accuracy, margin = row.get(f"{prefix}reward_accuracy"), row.get(f"{prefix}reward_margin")
    return "" if accuracy is None else f"  보상 정확도 {accuracy:.1%}  차이 {margin:.3f}"


def summary_lines(run: dict) -> list[str]:
    """run.json의 내용을 끝에 보여 줄 표로 만든다."""
    rows = [(figure.title, figure.shown(run)) for figure in FIGURES]
    rows = [(name, value) for name, value in rows if value is not None]
    left = max((width(name) for name, _ in rows), default=0)
    right = max((width(value) for _, value in rows), default=0)
    lines = []
    for name, value in rows:
        after_name = " " * (left - width(name))
        before_value = " " * (right - width(value))
        lines.append(f"  {name}{after_name}  {before_value}{value}")
    return lines


def width(text: str) -> int:
    """터미널에서 차지하는 칸. 한글은 두 칸이다."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def clock(seconds: float) -> str:
    """초를 `분:초`나 `시:분:초`로 적는다."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
