"""프로세스가 여럿이어도 batch_size의 뜻은 같고, 말하고 쓰는 것은 첫 프로세스뿐이다."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from gather_too import compare
from safetensors.torch import load_file

HERE = ROOT / "tests"
SETTINGS = {"batch_size": 8, "num_train_epochs": 1, "records": True}
not_windows = pytest.mark.skipif(sys.platform == "win32", reason="Windows의 gloo는 따로 설정해야 한다")


def launch(launcher: list[str], base, data, output, *flags: str) -> subprocess.CompletedProcess:
    """사용자가 적는 명령 그대로 두 프로세스를 시작한다."""
    words = ["--base_model", base, "--data_path", data, "--output_dir", output, "--cutoff_len", 64, "--batch_size", 8,
             "--num_train_epochs", 1, "--val_set_size", 20, *flags]
    command = [sys.executable, "-m", *launcher, str(ROOT / "finetune-lora.py"), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"})


def accelerate() -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]


@pytest.fixture(scope="module")
def single(lab, tmp_path_factory):
    output = tmp_path_factory.mktemp("single") / "run"
    done = lab.train(output, **SETTINGS)
    assert done.code == 0, done.text
    return output


def read_run(output) -> dict:
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def same_adapter(left, right) -> None:
    """두 실행의 어댑터가 반올림만큼만 다르다."""
    ours, theirs = (load_file(output / "adapter_model.safetensors") for output in (left, right))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5)


def test_two_processes_learn_what_one_learns(lab, single, tmp_path):
    """dropout의 시드는 프로세스가 아니라 블록이 정하므로, dropout을 켜도 같다."""
    done = lab.train(tmp_path / "run", world=2, **SETTINGS)
    assert done.code == 0, done.text
    same_adapter(tmp_path / "run", single)
    single, run = read_run(single), read_run(tmp_path / "run")
    assert (single["plan"]["processes"], run["plan"]["processes"]) == (1, 2)
    assert run["plan"]["steps"] == single["plan"]["steps"]
    assert done.text.count("학습 후 검증 loss") == 2  # 끝에 한 번, 표에 한 번
    assert done.text.count("장치:") == 1
    for key in ("eval_loss_before", "eval_loss_after"):
        assert run[key] == pytest.approx(single[key], rel=1e-4)
    losses = [[row["loss"] for row in each["history"] if "loss" in row] for each in (single, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_sharded_model_learns_the_same_and_resumes_exactly(lab, tmp_path):
    gathered, output, alone = tmp_path / "gathered.safetensors", tmp_path / "run", tmp_path / "alone"
    sharded = {**SETTINGS, "lora_dropout": 0, "world": 2,  # 자동미분의 dropout은 프로세스마다 다르다
               "through": (HERE / "fsdp_on_cpu.py", HERE / "gather_too.py", gathered)}
    assert lab.train(alone, **SETTINGS, lora_dropout=0).code == 0
    done = lab.train(output, **sharded)
    assert done.code == 0, done.text
    found = compare(output / "adapter_model.safetensors", gathered)
    assert found == {"tensors": 4, "values": 4096, "zeros": 0, "different": 0}
    same_adapter(output, alone)
    single, run = read_run(alone), read_run(output)
    assert "나눈다" in run["path"]
    assert run["eval_loss_before"] == pytest.approx(single["eval_loss_before"], rel=1e-4)
    for key in ("loss", "eval_loss"):
        values = [[row[key] for row in each["history"] if row.get("step") and key in row] for each in (single, run)]
        assert values[1] == pytest.approx(values[0][-len(values[1]):], rel=1e-4)
    straight = load_file(output / "adapter_model.safetensors")
    assert straight and any(value.abs().max() > 0 for name, value in straight.items() if "lora_B" in name)
    last = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    for gone in (last, *(output / name for name in ("adapter_model.safetensors", "manifest.json", "run.json"))):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    done = lab.resume(output, **sharded)
    assert done.code == 0, done.text
    resumed = load_file(output / "adapter_model.safetensors")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@not_windows
def test_accelerate_starts_two_processes_that_learn_together(tiny_neox, tiny_data, tmp_path):
    done = launch(accelerate(), tiny_neox, tiny_data, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_run(tmp_path / "run")
    assert run["plan"]["processes"] == 2 and run["eval_loss_after"] < run["eval_loss_before"]
    assert done.stdout.count("장치:") == 1


@not_windows
def test_torchrun_starts_two_processes_and_a_batch_they_cannot_share_is_refused_once(tiny_neox, tiny_data, tmp_path):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = launch(torchrun, tiny_neox, tiny_data, tmp_path / "run", "--micro_batch_size", "8")
    assert done.returncode != 0
    assert done.stderr.count("오류: batch_size를 프로세스와") == 1
    assert not (tmp_path / "run").exists()
