"""데이터가 적으면 batch와 블록을 작게 골라 충분한 step을 배우고, 사용자가 적은 것은 그대로 쓰되 경고한다."""

import numpy as np
import pytest
from conftest import train_settings

from utils.data.blocks import pack
from utils.seals import write_manifest
from utils.train.batch_size import DEFAULT_BATCH, ENOUGH_STEPS, batch_lines, choose_batch

pytestmark = pytest.mark.quick


def lengths_of(rows: int, mean: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(mean // 2, mean * 2, rows)


def choose(lengths: np.ndarray, world: int = 1, **flags):
    settings = train_settings(num_train_epochs=3, **flags)
    return settings, choose_batch(settings, lengths, int(lengths.max()), world)


@pytest.mark.parametrize("rows", [30, 60, 200, 1000, 20_000])
def test_few_rows_get_more_and_smaller_steps(rows):
    lengths = lengths_of(rows)
    settings, batch = choose(lengths)
    usual = len(pack(lengths, 1024, settings.seed)) * 3 / DEFAULT_BATCH
    if usual >= ENOUGH_STEPS:
        assert (batch.size, batch.block_len) == (DEFAULT_BATCH, 1024)
    else:
        assert batch.steps >= min(ENOUGH_STEPS, 3 * rows / 2)  # 적어도 두 행마다 한 번은 고친다
        assert batch.size < DEFAULT_BATCH and batch.room <= batch.block_len >= lengths.max()
        assert batch.block_len == 1024 or batch.size == 1  # 블록은 batch를 다 줄인 다음에 줄인다


def test_one_long_row_does_not_keep_the_others_from_many_steps():
    lengths = np.append(lengths_of(30), 700)
    batch = choose(lengths)[1]
    assert 700 <= batch.block_len < 1024 and batch.room < 100 and batch.steps > 45
    assert choose(np.minimum(lengths, 64), cutoff_len=64)[1].block_len == 64


@pytest.mark.parametrize("world, micro", [(1, None), (2, None), (3, None), (1, 5), (2, 4), (1, 32)])
def test_chosen_batch_can_be_shared(world, micro):
    for rows in (40, 3000):
        _, batch = choose(lengths_of(rows), world, micro_batch_size=micro)
        assert batch.size % (world * (micro or 1)) == 0


def test_what_was_chosen_is_said_with_the_reason():
    lengths = lengths_of(60)
    settings, batch = choose(lengths)
    (line,) = batch_lines(settings, batch, lengths, int(lengths.max()), 1)
    assert f"{batch.steps} step" in line and f"{batch.room}토큰" in line and "--batch_size" in line


def test_a_batch_that_was_given_is_kept_and_the_warning_has_a_command(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["finetune-lora.py", "--data_path", "내 데이터.csv", "--batch_size", "16",
                                     "--output_dir", str(tmp_path)])
    lengths = lengths_of(60)
    settings, batch = choose(lengths, batch_size=16, output_dir=str(tmp_path))
    assert (batch.size, batch.block_len) == (16, 1024)
    (line,) = batch_lines(settings, batch, lengths, int(lengths.max()), 1)
    command = line.split(": ")[-1]
    assert line.startswith("주의") and f"{batch.steps} step" in line
    assert "--batch_size" not in command and f"{tmp_path}-2" in command and "'내 데이터.csv'" in command


def test_enough_steps_say_nothing():
    lengths = lengths_of(20_000)
    for flags in ({}, {"batch_size": 4}):
        settings, batch = choose(lengths, **flags)
        assert batch_lines(settings, batch, lengths, int(lengths.max()), 1) == []


@pytest.mark.parametrize("written, kept", [([1, 96, 64], (1, 96, 64)), (4, (4, 1024, 1024))])
def test_a_resumed_run_keeps_its_batch_whatever_the_epochs(tmp_path, written, kept):
    """epoch을 늘려 이어 가면 새로 고를 batch가 달라진다. 처음의 것을 써야 조건이 같다."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    write_manifest(folder, {"run": {"batch_size": {"id": written, "shown": ""}}, "files": {}})
    batch = choose(lengths_of(60), resume_from_checkpoint=str(folder))[1]
    assert (batch.size, batch.block_len, batch.room) == kept
