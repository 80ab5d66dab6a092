"""체크포인트 폴더는 온전하거나 온전하지 않음이 드러나고, 실행의 폴더는 한 번에 한 실행만 쓴다."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from utils import files, seals
from utils.errors import UsageError
from utils.model import checkpoint
from utils.model.folder import ADAPTER_FILES, ADAPTER_WEIGHTS
from utils.train import conditions, run_folder

pytestmark = pytest.mark.quick

FILES = (*checkpoint.RESUMABLE, "optimizer.pt", "rng_state.pth", "optimizer_0/shard.distcp")
RUN = {"run": {"seed": {"id": 1, "shown": "1"}}, "step": 1, "rows": 1}


def write_checkpoint(output: Path, step: int) -> Path:
    final = output / f"checkpoint-{step}"
    staging = seals.stage(final)
    for name in FILES:
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(f"{name} {step}".encode() * 50)
    seals.publish(staging, final, RUN)
    return final


def test_published_checkpoint_is_whole_and_leaves_nothing_behind(tmp_path):
    final = write_checkpoint(tmp_path, 3)
    assert checkpoint.damage(final) is None
    assert checkpoint.newest_valid(tmp_path) == final
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-3"]
    assert seals.read_manifest(final)["run"] == RUN["run"]


def test_steps_are_ordered_as_numbers_and_other_folders_are_no_checkpoints(tmp_path):
    for step in (9, 10, 100):
        write_checkpoint(tmp_path, step)
    for name in ("checkpoint-abc", "checkpoint-", ".tmp-checkpoint-200", "checkpoint-300-merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-400").write_text("파일이다", encoding="utf-8")
    assert [checkpoint.step_of(folder) for folder in checkpoint.checkpoints(tmp_path)] == [9, 10, 100]


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "grow"])
@pytest.mark.parametrize("name", [*FILES, seals.MANIFEST])
def test_any_harm_to_any_file_is_named_and_the_older_one_is_used(tmp_path, name, harm):
    older, newest = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    file = newest / name
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes({"truncate": content[:-1], "flip": flipped, "grow": content + b"x"}[harm])
    found = checkpoint.damage(newest)
    assert name in found
    assert checkpoint.newest_valid(tmp_path) == older


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"files": []}', '{"files": {}, "run": {}}', "[" * 100_000,
                                  '{"files": {"a": 3}, "run": {}}', '{"files": {"../x": {}}, "run": {}}',
                                  '{"files": {"/etc/passwd": {"size": 1}}, "run": {}}',
                                  '{"files": {"C:\\\\x": {"size": 1}}, "run": {}}', '{"files": {"a": {}}, "run": []}'])
def test_manifest_of_any_other_shape_is_damage(tmp_path, text):
    final = write_checkpoint(tmp_path, 1)
    (final / seals.MANIFEST).write_text(text, encoding="utf-8")
    assert checkpoint.damage(final)


def test_publishing_over_an_existing_checkpoint_replaces_it(tmp_path):
    write_checkpoint(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_bytes(b"")
    write_checkpoint(tmp_path, 1)
    assert checkpoint.damage(tmp_path / "checkpoint-1") is None
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-1"]


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        write_checkpoint(tmp_path, step)
    checkpoint.prune(tmp_path, 2, tmp_path / "checkpoint-3")
    assert [checkpoint.step_of(folder) for folder in checkpoint.checkpoints(tmp_path)] == [3, 5, 6]
    (tmp_path / ".tmp-checkpoint-7").mkdir()
    checkpoint.sweep(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-5", "checkpoint-6"]


def test_adapter_files_arrive_with_the_manifest_last(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"old")
    staging = seals.stage(tmp_path / "adapter")
    for name in ADAPTER_FILES:
        (staging / name).write_bytes(b"new")
    seals.publish_files(staging, tmp_path, RUN)
    assert seals.damage(tmp_path, ADAPTER_FILES) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == [*ADAPTER_FILES, seals.MANIFEST]
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(b"odd")
    assert ADAPTER_WEIGHTS in seals.damage(tmp_path, ADAPTER_FILES)


@pytest.mark.parametrize("error, full", [
    (OSError(errno.ENOSPC, "No space left on device"), True),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
    (RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"), True),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), True),
    (RuntimeError("basic_ios::clear: iostream error"), True),
    (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), True),
    (Exception("Error while serializing: I/O error: There is not enough space on the disk. (os error 112)"), True),
    (OSError(errno.EACCES, "Permission denied"), False),
    (ValueError("28"), False),
])
def test_full_disk_is_told_from_other_errors(error, full):
    assert files.is_full_disk(error) == full


def test_second_run_in_one_folder_is_refused_and_a_dead_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "run"
    with files.locked(folder), pytest.raises(UsageError, match="다른 실행이 쓰는 중"), files.locked(folder):
        pass
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from utils import files\n"
            "with files.locked(Path(sys.argv[2])): os._exit(9)")
    assert subprocess.run([sys.executable, "-c", code, str(ROOT), str(folder)]).returncode == 9
    with files.locked(folder):
        pass


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="쓸 수 없다"), files.locked(folder):
            pass


def test_differences_name_old_and_new_and_more_epochs_are_fine():
    def facts(**values):
        return {name: {"id": value, "shown": str(value)} for name, value in values.items()}

    old = facts(seed=1, lora_r=8, num_train_epochs=3)
    assert conditions.differences(old, facts(seed=1, lora_r=8, num_train_epochs=5)) == []
    shorter = conditions.differences(old, facts(seed=2, lora_r=8, num_train_epochs=2))
    assert shorter == ["seed: 1 -> 2", "num_train_epochs: 3 -> 2"]
    moved = {"data_path": {"id": "aa", "shown": "rows.json"}}, {"data_path": {"id": "bb", "shown": "rows.json"}}
    assert conditions.differences(*moved) == ["data_path: rows.json -> rows.json(내용이 다르다)"]
    assert conditions.differences({}, facts(seed=2)) == ["seed: 없음 -> 2"]


def test_rows_split_another_way_are_a_difference_only_when_nothing_else_is():
    def facts(seed, split):
        return {"split": {"id": split, "shown": f"학습 {split}행"}, "seed": {"id": seed, "shown": str(seed)}}

    assert conditions.differences(facts(1, 38), facts(2, 39)) == ["seed: 1 -> 2"]
    (line,) = conditions.differences(facts(1, 38), facts(1, 39))
    assert "split: 학습 38행 -> 학습 39행" in line and "다르게 나누던 버전" in line
    assert "split: 없음 -> 학습 39행" in conditions.differences({"seed": facts(1, 39)["seed"]}, facts(1, 39))[0]


@pytest.mark.parametrize("argv", [
    ["x.py", "--seed", "3", "--resume_from_checkpoint", "--output_dir", "a b"],
    ["x.py", "--resume_from_checkpoint=old/checkpoint-3", "--seed", "3", "--output_dir=a b"],
    ["x.py", "--resume-from-checkpoint", "old/checkpoint-3", "--seed", "3", "--output-dir", "a b"],
])
def test_resume_command_is_the_command_given(monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", argv)
    resumed = run_folder.command({"resume_from_checkpoint": "True"})
    assert resumed.startswith("python x.py") and resumed.endswith("--resume_from_checkpoint True")
    assert resumed.count("resume") == 1 and "--seed 3" in resumed and "a b" in resumed
    elsewhere = run_folder.command({"resume_from_checkpoint": None, "output_dir": "other"})
    assert "resume" not in elsewhere and "a b" not in elsewhere and elsewhere.endswith("--output_dir other")


def test_space_is_asked_for_before_the_run(tmp_path):
    run = run_folder.Run(tmp_path, None, {}, None, "")
    run.require_space(1000)
    with pytest.raises(UsageError, match="MB가 필요한데"):
        run.require_space(10**15)


def test_unfinished_and_finished_folders_are_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune-lora.py", "--output_dir", str(tmp_path)])
    settings = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    assert run_folder.choose_checkpoint(settings, {}, print) is None
    write_checkpoint(tmp_path, 4)
    with pytest.raises(UsageError) as unfinished:
        run_folder.choose_checkpoint(settings, {}, print)
    for word in ("checkpoint-4", "--resume_from_checkpoint True", f"--output_dir {tmp_path}-2"):
        assert word in str(unfinished.value)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "run.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(UsageError, match="덮어쓰지 않는다"):
        run_folder.choose_checkpoint(settings, {}, print)


@pytest.mark.parametrize("names, others", [
    ((), []), ((".lock", ".DS_Store", "checkpoint-3", "train.log", "process.json", "tensorboard"), []),
    (("run.json", "samples.md", "curves.png"), []), (("README.md",), ["README.md"]),
    (("model.safetensors", "config.json"), ["config.json", "model.safetensors"]), (("faq.csv", "out.txt"), [])])
def test_a_new_run_does_not_mix_with_another_model(tmp_path, names, others):
    """기반 모델의 폴더에 쓰면 그 README.md를 덮고, 어댑터와 섞인 모델이 된다."""
    for name in names:
        (tmp_path / name).touch()
    assert run_folder.strangers(tmp_path) == others
    if others:
        with pytest.raises(UsageError, match=f"다른 파일이 있다.*{others[0]}.*새 폴더를 적는다.*-2"):
            run_folder.require_fresh(tmp_path)


def test_a_folder_without_a_name_has_another_name_to_offer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").touch()
    with pytest.raises(UsageError, match="README.md.*train-2"):
        run_folder.require_fresh(Path())
