"""진행 표시: log step마다 한 줄, 끝에 표. 사람이 읽지 못할 것은 찍지 않는다."""

import re

import pytest

from utils.train.progress import MAX_LINES, Progress, Speed, clock, summary_lines, width
from utils.train.state import TrainState


def play(steps: int) -> list[str]:
    """steps번 배우고 열 번에 한 번 검증하는 학습이 말한 줄들."""
    said, state, speed = [], TrainState(max_steps=steps), Speed(tokens_per_step=1000)
    progress = Progress(said.append, speed)
    progress.log({"eval_loss": 9.0}, state)
    progress.begin(state)
    for step in range(1, steps + 1):
        with speed:
            state.global_step = step
        assert speed.figures()["tokens_per_second"] > 0
        row = {"loss": 3.0, "grad_norm": 0.5, "learning_rate": 1e-3, **speed.figures()}
        progress.log(row, state)
        if step % 10 == 0:
            progress.log({"eval_loss": 3.0 - step if step < 20 else 3.0}, state)
    progress.close()
    return said


def test_one_line_a_step_with_loss_speed_and_time_left():
    said = play(20)
    assert len(said) == 23 and said.pop(0) == "학습 전 검증 loss 9.0000"
    form = r"   1/20  loss 3\.000  기울기 0\.50  학습률 1\.0e-03  [\d,]+ 토큰/초  \d+:\d\d 남음"
    assert re.fullmatch(form, said[0])
    assert [line for line in said if "검증" in line] == ["  검증 loss -7.0000 (가장 좋다)", "  검증 loss 3.0000"]


def test_worse_than_before_training_is_never_called_best():
    said, state = [], TrainState(max_steps=3)
    progress = Progress(said.append, Speed())
    progress.log({"eval_loss": 4.0}, state)
    for state.global_step, loss in enumerate((5.0, 4.5, 3.5, 3.9), 1):
        progress.log({"eval_loss": loss}, state)
    assert [line.strip() for line in said[1:]] == [
        "검증 loss 5.0000 (학습 전보다 나쁘다)", "검증 loss 4.5000 (학습 전보다 나쁘다)",
        "검증 loss 3.5000 (가장 좋다)", "검증 loss 3.9000"]


@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_long_runs_say_no_more_than_a_screenful_of_lines(steps):
    lines = [line for line in play(steps) if "토큰/초" in line]
    assert min(steps, 2) <= len(lines) <= MAX_LINES + 1


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3661, "1:01:01"), (90000, "25:00:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_summary_columns_line_up_in_a_terminal():
    lines = summary_lines({"eval_loss_before": 3.5, "eval_loss_after": 2.25, "train_seconds": 61.2,
                           "tokens_per_second": 12345.6, "peak_vram_gb": None, "peak_ram_gb": 0.5, "history": []})
    assert len(lines) == 5
    assert len({width(line) for line in lines}) == 1
    assert lines[3].endswith("12,346 토큰/초")


def test_no_line_a_user_cannot_act_on(tiny_run_output):
    done = tiny_run_output
    assert done.stderr == ""
    assert not re.search(r"Warning|warning|UserWarning|\{'", done.stdout)
    assert "검증 loss" in done.stdout and "결과" in done.stdout


@pytest.fixture
def tiny_run_output(tiny_neox, tiny_data, tmp_path):
    from conftest import run_script

    return run_script("finetune-lora.py", "--base_model", str(tiny_neox), "--data_path", str(tiny_data), "--output_dir",
                      str(tmp_path / "run"), "--cutoff_len", "64", "--batch_size", "8", "--num_train_epochs", "1")
