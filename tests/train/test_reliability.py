"""학습은 어디서 끊기고 무엇이 망가져도 잃는 것이 마지막 저장 뒤의 몇 step뿐이다. 고장을 실제로 일으켜 보인다."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from faults import same, state_of
from safetensors.torch import load_file

from utils import files, seals
from utils.model import adapter, checkpoint, loader
from utils.train import signals

NEVER = 10**9
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux의 신호와 pty로 시험한다")


def folders_are_whole(output: Path) -> bool:
    """`checkpoint-N`이라는 이름의 폴더가 모두 온전한지."""
    return all(checkpoint.damage(folder) is None for folder in checkpoint.checkpoints(output))


def go_on(lab, output: Path, **options):
    """있으면 이어 가고, 없으면 처음부터 한다."""
    return (lab.resume if checkpoint.newest_valid(output) else lab.train)(output, **options)


def kill_until_done(lab, output: Path, moments, **flags) -> int:
    """정해진 순간마다 SIGKILL로 죽이며 이어 가고, 끝낸 뒤 죽은 횟수를 돌려준다."""
    killed = 0
    for moment in moments:
        done = go_on(lab, output, **moment, **flags)
        assert done.code in (0, -signal.SIGKILL), done.text
        assert folders_are_whole(output)
        if done.code == 0:
            return killed
        killed += 1
    done = go_on(lab, output, **flags)
    assert done.code == 0, done.text
    return killed


def test_run_killed_thirty_times_inside_its_saves_is_the_same_run(lab, tmp_path):
    """output_dir에 쓰기, 내리기(fsync), 이름 바꾸기, 지우기의 아무 순간에나 죽는다. 쓰던 것은 반만 쓰인다."""
    if not lab.can_count:
        pytest.skip("C 컴파일러가 없어 쓰는 순간을 셀 수 없다")
    flags = {"num_train_epochs": 8, "val_set_size": 0}
    assert lab.train(tmp_path / "whole", **flags).code == 0
    chance = random.Random(7)
    moments = ({"fault": ("kill", chance.randrange(4, 75))} for _ in range(30))
    killed = kill_until_done(lab, tmp_path / "killed", moments, **flags)
    last = checkpoint.newest_valid(tmp_path / "whole")
    print(f"죽은 횟수 {killed}")
    assert killed >= 15
    assert same(state_of(tmp_path / "killed" / last.name), state_of(last))
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_run_killed_at_every_kind_of_moment(lab, tmp_path):
    """같은 것을 더 길게: 쓰는 순간 60번과 아무 때(시간) 30번. 끝난 실행은 새로 시작해 모두 쓸 때까지 한다."""
    flags = {"num_train_epochs": 20, "val_set_size": 0}
    whole = lab.train(tmp_path / "whole", **flags)
    assert whole.code == 0, whole.text
    chance = random.Random(11)
    moments = [{"fault": ("kill", chance.randrange(4, 60))} for _ in range(60)]
    moments += [{"seconds": chance.uniform(0.1, 0.8) * whole.seconds} for _ in range(30)]
    chance.shuffle(moments)
    last = checkpoint.newest_valid(tmp_path / "whole")
    killed = runs = 0
    while moments:
        output, runs = tmp_path / f"killed-{runs}", runs + 1
        survived = kill_until_done(lab, output, moments, **flags)
        assert same(state_of(output / last.name), state_of(last))
        moments, killed = moments[survived + 1:], killed + survived
    print(f"죽은 횟수 {killed}, 실행 {runs}번")
    assert killed >= 60


@pytest.fixture(scope="module")
def cut(lab, tmp_path_factory):
    """checkpoint-3과 checkpoint-4가 남은, 끝나지 않은 실행."""
    output = tmp_path_factory.mktemp("cut") / "run"
    assert lab.train(output, signals=[[3, "SIGTERM"]]).code == 143
    return output


def harm(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "remove":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(content[:len(content) // 2])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1:])


@pytest.mark.parametrize("how", ["truncate", "flip", "remove"])
def test_damage_to_each_real_file_is_named(cut, tmp_path, how):
    newest = checkpoint.newest_valid(cut)
    names = [file.name for file in newest.iterdir()]
    assert {"rng_state.pth", "optimizer.pt", "prompt.json", "tokenizer.json"} < set(names)
    for name in names:
        copy = tmp_path / name / newest.name
        shutil.copytree(newest, copy)
        harm(copy / name, how)
        found = checkpoint.damage(copy)
        assert found is not None and (name in found or name == seals.MANIFEST), (name, found)


def test_damaged_newest_is_refused_by_name_and_the_older_one_goes_on(lab, cut, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(cut, output)
    older, newest = checkpoint.checkpoints(output)[-2:]
    harm(newest / "adapter_model.safetensors", "flip")
    named = lab.train(output, resume_from_checkpoint=newest)
    assert named.code == 2 and "adapter_model.safetensors" in named.error, named.text
    done = lab.resume(output, signals=[[6, "SIGTERM"]])
    assert done.code == 143 and f"이어 가기: {older}" in done.text, done.text
    assert f"경고: 손상된 체크포인트를 건너뛴다. {newest}: adapter_model.safetensors" in done.text
    assert folders_are_whole(output)
    for folder in checkpoint.checkpoints(output):
        harm(folder / "optimizer.pt", "truncate")
    none = lab.resume(output)
    assert none.code == 2 and "온전한 체크포인트가 없다" in none.error and "optimizer.pt" in none.error
    fresh = lab.train(output)
    assert fresh.code == 2 and "끝나지 않은 실행" in fresh.error


def test_damaged_adapter_is_refused_by_name(lab, tmp_path):
    output = tmp_path / "run"
    assert lab.train(output, num_train_epochs=1).code == 0
    assert adapter.find_adapter(output) == output
    harm(output / "adapter_model.safetensors", "flip")
    with pytest.raises(loader.UsageError, match=r"adapter_model\.safetensors"):
        adapter.find_adapter(output)


def disk_fills_up(lab, output: Path, at: int, **options) -> None:
    full = go_on(lab, output, fault=("full", at), **options)
    assert full.code == 2, (at, full.text)
    assert "디스크가 차서" in full.error or "쓸 수 없다" in full.error, (at, full.text)
    assert "Traceback" not in full.text and full.text.count("오류: ") == 1, (at, full.text)
    assert folders_are_whole(output)
    can_resume = checkpoint.newest_valid(output) is not None
    assert ("--resume_from_checkpoint True" in full.error) == can_resume, (at, full.text)


def fill_at(lab, tmp_path: Path, choose, **options) -> list[int]:
    """끝까지 가는 실행의 쓰기를 세고, 고른 쓰기마다 디스크를 채운 뒤 자리를 비우고 끝낸다."""
    if not lab.can_count:
        pytest.skip("C 컴파일러가 없어 쓰기를 셀 수 없다")
    whole = lab.train(tmp_path / "whole", fault=("full", NEVER), **options)
    assert whole.code == 0, whole.text
    tried = choose(whole.writes)
    for at in tried:
        output = tmp_path / f"full-{at}"
        disk_fills_up(lab, output, at, **options)
        if at in tried[::4]:
            done = go_on(lab, output, **options)
            assert done.code == 0, done.text
            last = checkpoint.newest_valid(tmp_path / "whole")
            assert same(state_of(output / last.name), state_of(last))
        shutil.rmtree(output)
    return tried


def test_full_disk_is_one_line_and_the_run_goes_on_afterwards(lab, tmp_path):
    """저장, 어댑터, 곡선과 예시를 쓰다가 디스크가 찬다. 쓰기의 수는 실행마다 조금 다르므로 끝은 남긴다."""
    options = {"num_train_epochs": 0.4, "answers": True}
    fill_at(lab, tmp_path, lambda n: [*range(1, n - 10, n // 6), n - 10], **options)


@pytest.mark.slow
def test_full_disk_at_every_write(lab, tmp_path):
    tried = fill_at(lab, tmp_path, lambda n: list(range(n - 1)), num_train_epochs=0.4)
    print(f"쓰기 {len(tried)}곳")


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_first_signal_saves_and_tells_the_command(lab, tmp_path, name, code):
    output = tmp_path / "run"
    stopped = lab.train(output, signals=[[4, name]])
    assert stopped.code == code, stopped.text
    assert checkpoint.newest_valid(output).name == "checkpoint-5"
    if name != "SIGHUP":
        assert stopped.text.strip().endswith("--resume_from_checkpoint True")
    assert not list(output.glob(".tmp-*"))


def test_second_signal_ends_at_once_without_half_a_checkpoint(lab, tmp_path):
    output = tmp_path / "run"
    stopped = lab.train(output, signals=[[4, "SIGINT", "SIGINT"]])
    assert stopped.code == 130 and checkpoint.newest_valid(output).name == "checkpoint-3", stopped.text
    assert folders_are_whole(output)


@pytest.mark.parametrize("when", ["학습 후 검증 loss", "결과", "검증 질문 7개에"])
def test_ctrl_c_after_the_last_step_costs_only_the_sample_answers(lab, tmp_path, when):
    output = tmp_path / "run"
    stopped = lab.train(output, answers=True, num_train_epochs=1, signals=[[when, "SIGINT"]])
    assert stopped.code == 0 and "Ctrl+C로 멈추었다" in stopped.text and "온전하다" in stopped.text, stopped.text
    for name in ("run.json", "curves.png", "samples.md", "README.md", "adapter_model.safetensors"):
        assert (output / name).stat().st_size > 0
    assert "Traceback" not in stopped.text


@linux
def test_closed_terminal_saves(tiny_neox, tiny_data, tmp_path):
    """터미널을 닫으면 SIGHUP이 오고, 그 뒤의 모든 출력은 오류가 된다."""
    import pty

    output = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, str(ROOT / "finetune-lora.py"), "--base_model", str(tiny_neox),
                                  "--data_path", str(tiny_data), "--output_dir", str(output), "--cutoff_len", "64",
                                  "--batch_size", "4", "--num_train_epochs", "20"])
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        seen = b""
        while b" 10/" not in seen:
            seen += screen.read(4096)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129, seen.decode(errors="replace")
    assert checkpoint.step_of(checkpoint.newest_valid(output)) >= 10 and folders_are_whole(output)


def test_console_that_closes_waits_for_the_save(monkeypatch):
    """Windows의 콘솔 닫기, 로그오프: 처리기가 돌아가면 프로세스가 끝나므로 저장될 때까지 돌아가지 않는다."""
    monkeypatch.setattr(signals, "silence", lambda: None)
    with signals.Interrupt(lambda line: None) as stop:
        assert not stop.console_event(0) and stop.code is None  # CTRL_C는 신호로 온다
        thread = threading.Thread(target=stop.console_event, args=(2,))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and stop.code == 143 and stop.asked
    thread.join(5)
    assert not thread.is_alive()


def test_break_and_ignored_signals(monkeypatch):
    heard = []
    monkeypatch.setattr(signals.signal, "SIGBREAK", 21, raising=False)
    stop = signals.Interrupt(heard.append)
    stop.receive(21)
    assert stop.code == 130 and len(heard) == 1
    if hasattr(signal, "SIGHUP"):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with signals.Interrupt(heard.append):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
        signal.signal(signal.SIGHUP, before)


def test_infinite_loss_stops_before_the_weights_are_touched(lab, tmp_path):
    output = tmp_path / "run"
    stopped = lab.train(output, learning_rate=1e38)
    assert stopped.code == 2 and "step 2에서" in stopped.error and "학습률" in stopped.error, stopped.text
    stopped = lab.train(tmp_path / "late", learning_rate=1e30, num_train_epochs=1)
    assert stopped.code == 2 and "NaN이나 inf" in stopped.error, stopped.text
    last = checkpoint.newest_valid(tmp_path / "late")
    assert last is not None and last.name in stopped.error
    assert all(torch.isfinite(t).all() for t in load_file(last / "adapter_model.safetensors").values())
    assert not (output / "adapter_model.safetensors").exists()


def test_second_run_in_one_folder_is_refused(lab, tmp_path):
    output = tmp_path / "run"
    with files.locked(output):
        refused = lab.train(output)
        assert refused.code == 2 and "다른 실행이 쓰는 중" in refused.error, refused.text
    assert lab.train(output, signals=[[3, "SIGKILL"]]).code == -signal.SIGKILL
    assert go_on(lab, output, num_train_epochs=2).code == 0


BLOCKED = '''
import os, socket
connect, lookup = socket.socket.connect, socket.getaddrinfo

def local(address):
    return isinstance(address, (str, bytes)) or address[0] in ("127.0.0.1", "::1", "localhost", "0.0.0.0")

def tell(what):
    with open(os.environ["BLOCKED_LOG"], "a", encoding="utf-8") as log:
        log.write(repr(what) + "\\n")
    raise OSError(f"막혔다: {what}")

socket.socket.connect = lambda self, address: connect(self, address) if local(address) else tell(address)
socket.socket.connect_ex = lambda self, address: 1 if not local(address) else connect(self, address)
socket.getaddrinfo = lambda host, *rest, **more: (
    lookup(host, *rest, **more) if host is None or local((host,)) else tell(host))
'''


STAGES = '''
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
'''


def test_nothing_leaves_the_machine(tiny_neox, tiny_data, tmp_path):
    """세 단계를 이어서, 이 컴퓨터 밖으로 나가는 길을 막아 둔 프로세스에서 지난다."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED, encoding="utf-8")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "BLOCKED_LOG": str(tmp_path / "log"), "HF_HUB_OFFLINE": "0",
           "PYTHONIOENCODING": "utf-8"}
    output, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    steps = [("finetune-lora.py", "--base_model", str(tiny_neox), "--data_path", str(tiny_data), "--output_dir", output,
              "--cutoff_len", "64", "--num_train_epochs", "1"),
             ("merge-lora.py", "--peft_root", output, "--output_dir", merged),
             ("generate.py", "--base_model", str(tiny_neox), "--peft_root", output, "--ask", "1 더하기 1는?")]
    words = json.dumps([[str(ROOT / name), *flags] for name, *flags in steps])
    done = subprocess.run([sys.executable, "-c", STAGES, words], cwd=tmp_path, env={**os.environ, **env},
                          capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "학습 후 검증 loss" in done.stdout and "가중치: " in done.stdout and (tmp_path / "merged").exists()
    assert not (tmp_path / "log").exists(), (tmp_path / "log").read_text(encoding="utf-8")


def grows_little(lab, output: Path, epochs: float, early: int) -> None:
    done = lab.train(output, num_train_epochs=epochs, val_set_size=0, memory=True)
    assert done.code == 0, done.text
    lines = done.text.splitlines()
    memory, step = {}, 0
    for line in lines:
        word = line.strip().split("/")[0]
        if line.startswith("[RAM] "):
            memory[step] = int(line.split()[1])
        elif word.isdigit():
            step = int(word)
    first = next(value for at, value in sorted(memory.items()) if at >= early)
    print(f"RAM: step {early}에서 {first / 1e6:.1f} MB, step {step}에서 {memory[step] / 1e6:.1f} MB")
    assert memory[step] <= first * 1.05
    sizes = [{file.name: file.stat().st_size for file in folder.iterdir()} for folder in checkpoint.checkpoints(output)]
    grown = {name for name in sizes[0] if abs(sizes[-1][name] - sizes[0][name]) > 64}
    assert grown <= {"trainer_state.json"}, grown


def test_memory_does_not_grow(lab, tmp_path):
    grows_little(lab, tmp_path / "run", 22, 40)


@pytest.mark.slow
def test_two_thousand_steps(lab, tmp_path):
    grows_little(lab, tmp_path / "run", 200, 200)
