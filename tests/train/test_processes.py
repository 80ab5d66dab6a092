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

FLAGS = ["--cutoff_len", "64", "--batch_size", "8", "--num_train_epochs", "1", "--val_set_size", "20",
         "--lora_dropout", "0"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(launcher: list[str], base, data, output, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, str(ROOT / "finetune-lora.py"), "--base_model", str(base), "--data_path",
               str(data), "--output_dir", str(output), *FLAGS, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"})


def torchrun(*extra: str) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *extra]


@pytest.fixture(scope="module")
def single(tiny_neox, tiny_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("single") / "run"
    done = launch([], tiny_neox, tiny_data, output)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def read_run(output) -> dict:
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def same_adapter(left, right) -> None:
    """두 실행의 어댑터가 반올림만큼만 다르다."""
    ours, theirs = (load_file(output / "adapter_model.safetensors") for output in (left, right))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows의 torch에는 libuv 없는 gloo가 기본이라 따로 설정해야 한다")
@pytest.mark.parametrize("launcher", [
    torchrun(), ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                 "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]],
    ids=["torchrun", "accelerate"])
def test_two_processes_learn_what_one_learns(launcher, single, tiny_neox, tiny_data, tmp_path):
    launcher = [free_port() if word == "0" else word for word in launcher]
    done = launch(launcher, tiny_neox, tiny_data, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    same_adapter(tmp_path / "run", single)
    single, run = read_run(single), read_run(tmp_path / "run")
    assert (single["plan"]["processes"], run["plan"]["processes"]) == (1, 2)
    assert run["plan"]["steps"] == single["plan"]["steps"]
    assert done.stdout.count("학습 후 검증 loss") == 2  # 끝에 한 번, 표에 한 번
    assert done.stdout.count("장치:") == 1
    for key in ("eval_loss_before", "eval_loss_after"):
        assert run[key] == pytest.approx(single[key], rel=1e-4)
    losses = [[row["loss"] for row in each["history"] if "loss" in row] for each in (single, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows의 torch에는 libuv 없는 gloo가 기본이라 따로 설정해야 한다")
def test_a_sharded_model_learns_the_same_and_resumes_exactly(single, tiny_neox, tiny_data, tmp_path):
    gathered = tmp_path / "gathered.safetensors"
    fsdp = torchrun(str(ROOT / "tests/fsdp_on_cpu.py"), str(ROOT / "tests/gather_too.py"), str(gathered))
    output = tmp_path / "run"
    done = launch(fsdp, tiny_neox, tiny_data, output)
    assert done.returncode == 0, done.stdout + done.stderr
    found = compare(output / "adapter_model.safetensors", gathered)
    assert found == {"tensors": 4, "values": 4096, "zeros": 0, "different": 0}
    same_adapter(output, single)
    single, run = read_run(single), read_run(output)
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
    done = launch(fsdp, tiny_neox, tiny_data, output, "--resume_from_checkpoint", "True")
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = load_file(output / "adapter_model.safetensors")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows의 torch에는 libuv 없는 gloo가 기본이라 따로 설정해야 한다")
def test_a_batch_that_cannot_be_shared_is_refused_once(tiny_neox, tiny_data, tmp_path):
    done = launch(torchrun(), tiny_neox, tiny_data, tmp_path / "run", "--micro_batch_size", "8")
    assert done.returncode != 0
    assert done.stderr.count("오류: batch_size 8는 프로세스 2개") == 1
    assert not (tmp_path / "run").exists()
