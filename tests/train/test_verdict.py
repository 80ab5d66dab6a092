"""배우지 못한 학습은 그렇다고 말하고, 그대로 칠 수 있는 명령을 준다. 다음 명령은 배운 학습에만 있다."""

import shlex
from types import SimpleNamespace

import pytest
from conftest import load_script, train_settings

from utils import cli
from utils.paths import BASE_DEMO, DATA_DEMO
from utils.train.records import Schedule
from utils.train.verdict import judge

pytestmark = pytest.mark.quick

finetune_lora = load_script("finetune-lora.py")


def verdict(before, after, *, history=(), steps: int = 60, **flags):
    state = SimpleNamespace(log_history=list(history), best_global_step=10)
    return judge(train_settings(**flags), SimpleNamespace(schedule=Schedule(steps, 3, 6)),
                 SimpleNamespace(before=before, after=after, state=state, started={}, ended={}))


@pytest.fixture
def output(tmp_path, monkeypatch):
    """지금 명령줄의 output_dir."""
    monkeypatch.setattr("sys.argv", ["finetune-lora.py", "--data_path", "내 데이터.csv", "--batch_size", "16",
                                     "--output_dir", str(tmp_path)])
    return str(tmp_path)


def command_of(found) -> dict:
    """해 볼 명령의 플래그. 지금의 서명으로 읽힌다."""
    words = shlex.split(found.lines[-1])
    assert words[:2] == ["python", "finetune-lora.py"]
    return cli.parse(finetune_lora.train, words[2:], {})


@pytest.mark.parametrize("before, after, said", [
    (4.0, 4.5, "나쁘다"), (4.0, 4.0, "거의 배우지 못했다"), (4.0, 4.0001, "거의 배우지 못했다"),
    (7.687, 7.678, "거의 배우지 못했다"),
    (4.0, 3.93, "거의 배우지 못했다")])
def test_worse_and_hardly_better_are_said_and_never_look_well(output, before, after, said, capsys):
    found = verdict(before, after, output_dir=output)
    assert not found.learned and said in found.lines[0] and "-" not in found.lines[0].split("(")[1].split(",")[1]
    assert command_of(found)["output_dir"] == f"{output}-2"
    finetune_lora.say_end(found, "base", output)
    said = capsys.readouterr().out
    assert "다음 명령" not in said and said.rstrip().endswith(found.lines[-1].strip())


def test_learned_ends_with_the_next_commands(output, capsys):
    found = verdict(4.0, 3.0, output_dir=output)
    assert found.learned and found.lines == ()
    finetune_lora.say_end(found, "base", output)
    assert "다음 명령" in capsys.readouterr().out


def test_the_demo_model_is_not_blamed_on_my_own_data(output):
    """데모 모델에 내 데이터를 가르치면 loss는 줄어도 답은 엉뚱하다. 무엇을 해야 하는지 말한다."""
    found = verdict(4.0, 3.0, output_dir=output, base_model=str(BASE_DEMO), data_path="faq.csv")
    assert found.learned and "데모 모델" in found.lines[0]
    assert command_of(found)["base_model"] == "resources/polyglot-ko-1.3b"
    for flags in ({"base_model": str(BASE_DEMO), "data_path": str(DATA_DEMO)}, {"data_path": "faq.csv",
                                                                                "base_model": "other"}):
        assert verdict(4.0, 3.0, output_dir=output, **flags).lines == ()


@pytest.mark.parametrize("flags, steps, changed", [
    ({"learning_rate": 10.0}, 60, {"learning_rate": 0.001}),
    ({"learning_rate": 1e-3}, 60, {"learning_rate": 0.0001}),
])
def test_worse_lowers_the_learning_rate(output, flags, steps, changed):
    given = command_of(verdict(4.0, 5.0, steps=steps, output_dir=output, **flags))
    assert changed.items() <= given.items()


@pytest.mark.parametrize("flags, steps, changed", [
    ({"learning_rate": 1e-6}, 60, {"learning_rate": 1e-5}),
    ({"batch_size": 16}, 3, {"batch_size": None}),
    ({"num_train_epochs": 3.0}, 60, {"num_train_epochs": 9.0}),
])
def test_hardly_better_changes_what_holds_it_back(output, flags, steps, changed):
    given = command_of(verdict(4.0, 3.99, steps=steps, output_dir=output, **flags))
    assert {name: given.get(name) for name in changed} == changed


def test_without_validation_the_training_loss_is_judged(output):
    def rows(*losses):
        return [{"step": number, "loss": loss} for number, loss in enumerate(losses, 1)]

    assert verdict(None, None, history=rows(*[4.0] * 10, *[2.0] * 10), output_dir=output).learned
    assert not verdict(None, None, history=rows(*[4.0] * 20), output_dir=output).learned
    assert verdict(None, None, history=rows(4.0), output_dir=output).learned  # 비교할 것이 없다


def test_overfitting_is_mentioned(output):
    history = [{"step": 10, "eval_loss": 3.0}, {"step": 60, "eval_loss": 3.5}]
    found = verdict(4.0, 3.0, history=history, output_dir=output)
    assert found.learned and "10 step에서 가장 좋았고" in found.lines[0]


def test_a_lower_loss_is_not_praised_when_the_rate_was_wild_or_the_steps_were_few(output):
    """loss만 보면 배운 것 같아도 답은 깨졌거나 그대로다. 권하는 명령은 그 플래그를 되풀이하지 않는다."""
    mine = {"base_model": str(BASE_DEMO), "data_path": "faq.csv", "output_dir": output}
    found = verdict(12.8, 7.8, learning_rate=10.0, **mine)
    assert not found.learned and "학습률 10은 너무 높다" in found.lines[0] and "learning_rate" not in found.lines[-1]
    assert command_of(found)["output_dir"] == f"{output}-2"
    found = verdict(12.8, 11.6, steps=3, batch_size=16, **mine)
    assert found.learned and "3 step뿐이라" in found.lines[0]
    assert all("batch_size" not in line for line in found.lines)
