"""이어서 배운 것은 한 번에 배운 것과 한 비트도 다르지 않고, 조건이 바뀌면 이어 가지 않는다."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_rows
from faults import same, state_of

from utils import seals
from utils.model import checkpoint
from utils.model.adapter import read_prompt_info
from utils.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LONG = {"num_train_epochs": 4.4}  # 40 step, 4 step마다 평가하고 저장한다
STEPS = 40


@pytest.fixture(scope="module")
def straight(lab, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight") / "run"
    done = lab.train(output, **LONG)
    assert done.code == 0, done.text
    return output


def cut_and_resume(lab, output: Path, after: int, **options):
    """`after` step의 알림에서 신호를 보내 그다음 step에서 멈추고, 알려 준 대로 이어 간다."""
    cut = lab.train(output, signals=[[after, "SIGTERM"]], **options)
    assert cut.code == 143 and f"checkpoint-{after + 1}에 저장하고" in cut.text, cut.text
    assert checkpoint.newest_valid(output) == output / f"checkpoint-{after + 1}"
    done = lab.resume(output, **{name: value for name, value in options.items() if name != "oom"})
    assert done.code == 0 and f"이어 가기: {output / f'checkpoint-{after + 1}'}" in done.text, done.text


@pytest.mark.parametrize("after", [6, 12, 19, 39])
def test_resumed_run_is_the_same_run(lab, straight, tmp_path, after):
    """7(아무것의 배수도 아니고), 13(둘째 epoch), 20(평가하고 저장한 자리), 40(마지막 step)에서 끊는다."""
    output = tmp_path / "run"
    cut_and_resume(lab, output, after, **LONG)
    assert same(state_of(output / f"checkpoint-{STEPS}"), state_of(straight / f"checkpoint-{STEPS}"))
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (straight / name).read_bytes()


def test_run_cut_after_the_last_step_takes_no_further_step(lab, straight, tmp_path):
    output = tmp_path / "run"
    done = lab.train(output, signals=[[STEPS, "SIGINT"]], **LONG)
    assert done.code == 130, done.text
    assert lab.resume(output, **LONG).code == 0
    newest = checkpoint.newest_valid(output)
    assert checkpoint.step_of(newest) == STEPS and same(state_of(newest), state_of(straight / newest.name))


def test_early_stopping_keeps_its_count(lab, tmp_path):
    for rate in (0.1, 0.3, 1, 3):  # 검증 loss가 출렁이게 학습률을 높인다
        options = {**LONG, "learning_rate": rate, "early_stopping_patience": 2}
        whole = tmp_path / f"whole-{rate}"
        assert lab.train(whole, **options).code == 0
        stopped = checkpoint.step_of(checkpoint.newest_valid(whole))
        if stopped < STEPS:
            break
    assert 12 <= stopped < STEPS
    for name, after in (("once", stopped - 3), ("late", stopped - 1)):
        cut_and_resume(lab, tmp_path / name, after, **options)
        newest = checkpoint.newest_valid(tmp_path / name)
        assert checkpoint.step_of(newest) == stopped
        assert same(state_of(newest), state_of(whole / newest.name))


def test_micro_batch_halved_for_memory_stays_halved(lab, tmp_path):
    options = {"micro_batch_size": 4, "oom": 3}
    done = lab.train(tmp_path / "whole", **options)
    assert done.code == 0 and "micro batch를 2로 줄여" in done.text, done.text
    cut_and_resume(lab, tmp_path / "cut", 10, **options)
    newest = checkpoint.newest_valid(tmp_path / "cut")
    assert seals.read_manifest(newest)["rows"] == 2
    assert same(state_of(newest), state_of(tmp_path / "whole" / newest.name))


@pytest.fixture(scope="module")
def cut(lab, tmp_path_factory):
    output = tmp_path_factory.mktemp("cut") / "run"
    assert lab.train(output, signals=[[3, "SIGINT"]]).code == 130
    return output


@pytest.mark.parametrize("flag, value, named", [
    ("seed", 7, "seed: 42 -> 7"),
    ("lora_r", 4, "lora_r: 8 -> 4"),
    ("batch_size", 8, "batch_size: 4 -> 8"),
    ("learning_rate", 0.01, "learning_rate: 0.001 -> 0.01"),
    ("prompt_template", "instruction-output", "prompt_template: default -> instruction-output"),
    ("num_train_epochs", 1, "num_train_epochs: 2.0 -> 1.0"),
    ("lora_target_modules", "dense", "lora_target_modules: query_key_value -> dense"),
    ("early_stopping_patience", 2, "early_stopping_patience: None -> 2"),
    ("train_on_inputs", False, "train_on_inputs: True -> False"),
])
def test_changed_run_is_refused_by_name(lab, cut, flag, value, named):
    before = sorted(file.name for file in cut.rglob("*"))
    refused = lab.resume(cut, **{flag: value})
    assert refused.code == 2 and named in refused.error, refused.text
    assert sorted(file.name for file in cut.rglob("*")) == before


def test_changed_data_and_base_are_refused_by_name(lab, cut, tmp_path, tiny_neox):
    data = write_rows(tmp_path / "other.json", 41)
    base = tmp_path / "base"
    base.mkdir()
    for file in Path(tiny_neox).iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "rotary_pct": 0.25}), encoding="utf-8")
    refused = lab.resume(cut, data_path=data, base_model=base)
    assert refused.code == 2, refused.text
    assert "data_path: " in refused.error and f"-> {data}" in refused.error and "base_model: " in refused.error


def test_moved_base_and_data_of_the_same_content_are_the_same_run(lab, cut, tmp_path, tiny_neox, tiny_data):
    base, data = tmp_path / "moved", tmp_path / "rows.json"
    base.mkdir()
    for file in Path(tiny_neox).iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    data.write_bytes(Path(tiny_data).read_bytes())
    stopped = lab.resume(cut, base_model=base, data_path=data, signals=[[6, "SIGINT"]])
    assert stopped.code == 130, stopped.text


def test_a_resumed_run_writes_the_date_that_it_began_with(lab, tmp_path, tiny_neox):
    """대화 템플릿이 오늘을 적어도, 다른 날에 이어 배우는 글은 시작한 날의 것이다."""
    base, output, template = tmp_path / "base", tmp_path / "run", tmp_path / "dated.json"
    shutil.copytree(tiny_neox, base)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = ("{{ strftime_now('%Y.%m.%d') }} {% for message in messages %}{{ message.content }}"
                               "{% if message.role == 'user' %}: {% else %}{{ eos_token }}{% endif %}{% endfor %}")
    tokenizer.save_pretrained(base)
    template.write_text('{"name": "chat", "date": "2020-01-02"}', encoding="utf-8")
    assert lab.train(output, base_model=base, prompt_template=template, signals=[[3, "SIGINT"]]).code == 130
    done = lab.resume(output, base_model=base, prompt_template="chat")
    assert done.code == 0, done.text
    assert read_prompt_info(output).template == {"name": "chat", "date": "2020-01-02"}


def test_nothing_is_resumed_unasked_and_a_named_checkpoint_is_that_one(lab, tmp_path):
    output = tmp_path / "run"
    assert lab.train(output, signals=[[5, "SIGINT"]]).code == 130
    refused = lab.train(output)
    assert refused.code == 2 and "끝나지 않은 실행이 있다" in refused.error and "checkpoint-6" in refused.error
    assert "--resume_from_checkpoint True" in refused.error and f"--output_dir {output}-2" in refused.error
    named = lab.train(output, resume_from_checkpoint=output / "checkpoint-5", signals=[[7, "SIGINT"]])
    assert f"이어 가기: {output / 'checkpoint-5'}" in named.text and named.code == 130
    for wrong in (output, output / "checkpoint-77", tmp_path):
        assert lab.train(output, resume_from_checkpoint=wrong).code == 2


def test_finished_run_says_so_and_more_epochs_go_on(lab, tmp_path):
    output = tmp_path / "run"
    assert lab.train(output, records=True, num_train_epochs=1).code == 0
    again = lab.resume(output, num_train_epochs=1)
    assert again.code == 2 and "이미 끝난 실행" in again.error and str(output) in again.error
    fresh = lab.train(output, num_train_epochs=1)
    assert fresh.code == 2 and "덮어쓰지 않는다" in fresh.error
    more = lab.resume(output, num_train_epochs=2)
    log = state_of(checkpoint.newest_valid(output))["log"]
    assert more.code == 0, more.text
    rates = [entry["learning_rate"] for entry in log if entry.get("step") == 10 and "loss" in entry]
    assert rates and rates[0] > 0
    missing = lab.resume(tmp_path / "none")
    assert missing.code == 2 and "이어 갈 온전한 체크포인트가 없다" in missing.error
    assert not (tmp_path / "none").exists()


def test_record_of_a_resumed_run_counts_all_its_seconds(lab, tmp_path):
    output = tmp_path / "run"
    assert lab.train(output, signals=[[13, "SIGTERM"]]).code == 143
    before = seals.read_manifest(output / "checkpoint-14")["seconds"]
    done = lab.resume(output, records=True)
    assert done.code == 0, done.text
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert 0 < before < run["train_seconds"] < before + done.seconds
    learned = run["tokens_per_second"] * run["train_seconds"]
    assert learned == pytest.approx(run["data"]["train_tokens"] * run["settings"]["num_train_epochs"])


def test_two_processes_resume_exactly(lab, tmp_path):
    """한 프로세스에만 신호를 보내도 둘이 같은 step에서 멈추고, 이어서 배운 것이 한 번에 배운 것과 같다."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    cut = lab.train(output, world=2, signals=[[5, "SIGTERM"]])
    assert cut.code == 143 and "checkpoint-6에 저장하고 멈추었다" in cut.text, cut.text
    assert (output / "checkpoint-6" / "rng_state_1.pth").is_file()
    for done in (lab.resume(output, world=2), lab.train(whole, world=2)):
        assert done.code == 0, done.text
    last = checkpoint.newest_valid(whole)
    assert same(state_of(output / last.name), state_of(last))
    assert seals.read_manifest(last)["run"]["processes"]["id"] == 2
