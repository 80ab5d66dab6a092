"""학습이 어디까지 왔는지 사람이 읽을 줄로 말한다."""

import time
import unicodedata
from collections.abc import Callable

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback

MAX_LINES = 100
BAR = "{desc}|{bar:30}| {n_fmt}/{total_fmt} 남은 시간 {remaining}"
# (run의 열, 이름, 표시 형식)
SUMMARY = (
    ("eval_loss_before", "학습 전 검증 loss(답의 토큰)", "{:.4f}"),
    ("eval_loss_after", "학습 후 검증 loss(답의 토큰)", "{:.4f}"),
    ("train_seconds", "걸린 시간", "{:,.0f}초"),
    ("tokens_per_second", "속도(검증과 저장 포함)", "{:,.0f} 토큰/초"),
    ("peak_vram_gb", "최대 VRAM", "{:.2f} GB"),
    ("peak_ram_gb", "최대 RAM", "{:.2f} GB"),
)


class ProgressCallback(TrainerCallback):
    """log step마다 한 줄(loss, 기울기, 토큰/초, 남은 시간)을 말하고, 터미널이면 막대도 그린다.

    Args:
        say: 한 줄을 내보내는 함수.
        tokens_per_step: optimizer step 하나가 배우는 토큰의 수.
    """

    def __init__(self, say: Callable[[str], None], tokens_per_step: float):
        self.say, self.tokens_per_step = say, tokens_per_step
        self.bar = tqdm(disable=True)
        self.busy, self.done, self.step_began, self.best = 0.0, 0, 0.0, float("inf")

    def on_train_begin(self, args, state, control, **kwargs):
        self.busy, self.done = 0.0, 0
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, bar_format=BAR, leave=False,
                        disable=None if state.is_world_process_zero else True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.busy += time.perf_counter() - self.step_began
        self.done += 1
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            speed = self._speed()
            logs.update(speed)  # wandb와 TensorBoard로 간다
            state.log_history[-1].update(speed)  # run.json으로 간다
            every = max(1, state.max_steps // MAX_LINES)
            if state.global_step % every == 0 or state.global_step in (1, state.max_steps):
                self._write(self._line(state, logs))
        elif "eval_loss" in logs and state.global_step:
            better = logs["eval_loss"] < self.best
            self.best = min(self.best, logs["eval_loss"])
            self._write(f"  검증 loss {logs['eval_loss']:.4f}{' (가장 좋다)' if better else ''}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def _speed(self) -> dict[str, float]:
        speed = {"tokens_per_second": self.done * self.tokens_per_step / self.busy if self.busy else 0.0}
        if torch.cuda.is_available():
            speed["peak_vram_gb"] = torch.cuda.max_memory_reserved() / 1e9
        return speed

    def _line(self, state, logs: dict) -> str:
        left = (state.max_steps - state.global_step) * self.busy / max(self.done, 1)
        width = len(str(state.max_steps))
        gradient = f"  기울기 {logs['grad_norm']:.3f}" if "grad_norm" in logs else ""
        self.bar.set_description_str(f"loss {logs['loss']:.3f} ", refresh=False)
        return (f"  {state.global_step:>{width}}/{state.max_steps}  loss {logs['loss']:.4f}{gradient}  "
                f"학습률 {logs.get('learning_rate', 0):.2e}  {logs['tokens_per_second']:,.0f} 토큰/초  "
                f"남은 시간 {clock(left)}")

    def _write(self, line: str) -> None:
        self.bar.clear()
        self.say(line)
        self.bar.refresh()


def attach(trainer: Trainer, say: Callable[[str], None], tokens_per_step: float) -> None:
    """dict를 그대로 찍는 기본 표시 대신 진행 표시를 맨 앞에 단다.

    맨 앞이어야 뒤에 오는 wandb와 TensorBoard에도 속도와 VRAM이 기록된다.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.callback_handler.callbacks.insert(0, ProgressCallback(say, tokens_per_step))


def summary_lines(run: dict) -> list[str]:
    """run.json의 내용을 끝에 보여 줄 표로 만든다."""
    rows = [(name, form.format(run[key])) for key, name, form in SUMMARY if run.get(key) is not None]
    left = max((width(name) for name, _ in rows), default=0)
    right = max((width(value) for _, value in rows), default=0)
    return [f"  {name}{' ' * (left - width(name))}  {' ' * (right - width(value))}{value}" for name, value in rows]


def width(text: str) -> int:
    """터미널에서 차지하는 칸. 한글은 두 칸이다."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def clock(seconds: float) -> str:
    """초를 `분:초`나 `시:분:초`로 적는다."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
