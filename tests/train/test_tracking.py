"""wandb와 TensorBoard는 켜라고 할 때만 켜지고, 계정이 없으면 물어보며 멈추지 않는다."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_script, train_settings

from utils.errors import UsageError
from utils.train import tracking


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.parametrize(("asked", "expected"), [
    ({}, []),
    ({"report_to": "tensorboard"}, ["tensorboard"]),
    ({"report_to": "wandb"}, ["wandb"]),
    ({"wandb_project": "pgko"}, ["wandb"]),
    ({"wandb_project": "pgko", "report_to": "tensorboard"}, ["tensorboard", "wandb"]),
])
def test_trackers_follow_the_flags(offline, asked, expected):
    assert tracking.choose_trackers(train_settings(**asked)).names == expected


def test_choosing_keeps_the_flags_and_leaves_the_environment_alone(offline, tmp_path):
    before = dict(os.environ)
    chosen = tracking.choose_trackers(train_settings(
        wandb_project="pgko", wandb_run_name="첫 실행", wandb_watch="gradients", wandb_log_model="end",
        report_to="tensorboard", output_dir=str(tmp_path)))
    assert chosen == tracking.TrackerChoice(tmp_path, "pgko", "첫 실행", "gradients", "end", tmp_path / "tensorboard")
    assert dict(os.environ) == before


@pytest.mark.parametrize("asked", [{"wandb_watch": "everything"}, {"wandb_log_model": "always"}])
def test_wrong_values_are_refused(offline, asked):
    with pytest.raises(UsageError, match="가운데 하나다"):
        tracking.choose_trackers(train_settings(wandb_project="pgko", **asked))


def test_wandb_without_an_account_is_one_line_and_not_a_question(tiny_neox, tiny_data, tmp_path):
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "NETRC": str(tmp_path / "netrc"),
            "WANDB_CONFIG_DIR": str(tmp_path), "WANDB_API_KEY": "", "WANDB_MODE": "online"}
    done = run_script("finetune-lora.py", "--base_model", str(tiny_neox), "--data_path", str(tiny_data),
                      "--output_dir", str(tmp_path / "run"), "--wandb_project", "pgko", env=home)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "WANDB_MODE=offline" in done.stderr
    assert not (tmp_path / "run").exists()


def test_nothing_is_imported_unless_asked():
    code = ("import sys; sys.path.insert(0, 'tests'); from conftest import train_settings;"
            "from utils.train.tracking import choose_trackers, open_trackers;"
            "asked = train_settings(); chosen = choose_trackers(asked);"
            "assert chosen.names == [] and open_trackers(chosen, asked, None) == [];"
            "assert not {'wandb', 'torch.utils.tensorboard'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_both_trackers_record_speed_and_loss_offline(tiny_neox, tiny_data, tmp_path):
    output = tmp_path / "run"
    done = run_script("finetune-lora.py", "--base_model", str(tiny_neox), "--data_path", str(tiny_data),
                      "--output_dir", str(output), "--cutoff_len", "64", "--batch_size", "8", "--num_train_epochs", "1",
                      "--val_set_size", "20", "--report_to", "tensorboard", "--wandb_project", "pgko",
                      "--wandb_run_name", "첫 실행", "--wandb_watch", "gradients", "--wandb_log_model", "end",
                      cwd=tmp_path, env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stdout + done.stderr
    (recorded,) = output.glob("wandb/offline-run-*/run-*.wandb")
    content = recorded.read_bytes()
    expected = ("pgko", "첫 실행", "train/global_step", "train/tokens_per_second", "eval/loss", "gradients/",
                "adapter_model.safetensors")
    assert [text for text in expected if text.encode() not in content] == []
    scalars = read_scalars(output / "tensorboard")
    assert scalars >= {"train/loss", "eval/loss", "train/tokens_per_second", "train/learning_rate"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def read_scalars(folder) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])
