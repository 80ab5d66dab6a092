"""wandb와 TensorBoard는 켜라고 할 때만 켜지고, 계정이 없으면 물어보며 멈추지 않는다."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script

from utils import tracking
from utils.errors import UsageError

ASKED = {"report_to": "none", "wandb_project": None, "wandb_run_name": None, "wandb_watch": None,
         "wandb_log_model": None, "output_dir": "out"}


@pytest.fixture
def restored_environ(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_WATCH", "WANDB_LOG_MODEL", "WANDB_DIR", "WANDB_API_KEY",
                 "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return monkeypatch


def settings(**asked) -> SimpleNamespace:
    return SimpleNamespace(**{**ASKED, **asked})


@pytest.mark.parametrize(("asked", "expected"), [
    ({}, []),
    ({"report_to": "tensorboard"}, ["tensorboard"]),
    ({"report_to": "wandb"}, ["wandb"]),
    ({"wandb_project": "pgko"}, ["wandb"]),
    ({"wandb_project": "pgko", "report_to": "tensorboard"}, ["tensorboard", "wandb"]),
])
def test_trackers_follow_the_flags(restored_environ, asked, expected):
    assert tracking.choose_trackers(settings(**asked)) == expected


def test_flags_become_what_the_integration_reads(restored_environ, tmp_path):
    tracking.choose_trackers(settings(wandb_project="pgko", wandb_watch="gradients", wandb_log_model="end",
                                      output_dir=str(tmp_path)))
    names = ("WANDB_PROJECT", "WANDB_WATCH", "WANDB_LOG_MODEL", "WANDB_DIR")
    assert [os.environ[name] for name in names] == ["pgko", "gradients", "end", str(tmp_path)]


@pytest.mark.parametrize("asked", [{"wandb_watch": "everything"}, {"wandb_log_model": "always"}])
def test_wrong_values_are_refused(restored_environ, asked):
    with pytest.raises(UsageError, match="가운데 하나다"):
        tracking.choose_trackers(settings(wandb_project="pgko", **asked))


def test_wandb_without_an_account_is_one_line_and_not_a_question(tiny_neox, tiny_data, tmp_path):
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "NETRC": str(tmp_path / "netrc"),
            "WANDB_CONFIG_DIR": str(tmp_path), "WANDB_API_KEY": "", "WANDB_MODE": "online"}
    done = run_script("finetune-lora.py", "--base_model", str(tiny_neox), "--data_path", str(tiny_data),
                      "--output_dir", str(tmp_path / "run"), "--wandb_project", "pgko", env=home)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "WANDB_MODE=offline" in done.stderr
    assert not (tmp_path / "run").exists()


def test_nothing_is_imported_unless_asked():
    code = ("import sys; from types import SimpleNamespace as S; from utils.tracking import choose_trackers;"
            f"assert choose_trackers(S(**{ASKED})) == []; assert 'wandb' not in sys.modules")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_both_trackers_record_speed_and_loss_offline(tiny_neox, tiny_data, tmp_path):
    output = tmp_path / "run"
    done = run_script("finetune-lora.py", "--base_model", str(tiny_neox), "--data_path", str(tiny_data),
                      "--output_dir", str(output), "--cutoff_len", "64", "--batch_size", "8", "--num_train_epochs", "1",
                      "--val_set_size", "20", "--report_to", "tensorboard", "--wandb_project", "pgko",
                      "--wandb_run_name", "첫 실행", "--wandb_watch", "gradients", cwd=tmp_path,
                      env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(output.glob("wandb/offline-run-*/run-*.wandb"))
    assert read_scalars(output / "tensorboard") >= {"train/loss", "eval/loss", "train/tokens_per_second",
                                                    "train/learning_rate"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def read_scalars(folder) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])
