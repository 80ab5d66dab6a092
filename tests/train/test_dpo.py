"""선호 쌍의 학습: 논문의 식과 같은 손실과 gradient, 어느 길로도 같은 값, 비트까지 같은 재개, 끝까지 도는 학습."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call_script, train_settings
from made_pairs import BETA, BLOCK, make_blocks, make_pairs
from tiny import build_tokenizer, lora_neox
from torch.nn import functional as F

from utils.data.blocks import IGNORE, PairedDataset, Split, shifted_targets
from utils.data.documents import Documents
from utils.engine.train_step import TrainStep
from utils.errors import UsageError
from utils.model.adapter import PromptInfo
from utils.model.objective import learn, measured, objective, score, slopes, tally
from utils.train import defaults, pairs, verdict
from utils.train.autograd_step import AutogradStep
from utils.train.batches import n_targets, read_blocks
from utils.train.group import ALONE, join_group
from utils.train.loop import Loop
from utils.train.parity import choose_step, nudged, take_gradients
from utils.train.planner import MemoryPlan
from utils.train.records import Plan, Recipe, Result, Schedule
from utils.train.resume import Checkpoints
from utils.train.run_folder import Run
from utils.train.state import TrainState
from utils.train.step import open_step
from utils.train.weights import ReplicatedWeights

CPU = torch.device("cpu")


def log_likelihood(model, documents: Documents, index: int) -> torch.Tensor:
    """모델의 forward를 문서 하나에 불러 구한 답 전체의 로그 가능도."""
    tokens, learned = documents.document(index)
    scores = model(input_ids=torch.from_numpy(np.asarray(tokens, np.int64))[None]).logits[0, :-1].log_softmax(-1)
    own = scores.gather(1, torch.from_numpy(np.asarray(tokens[1:], np.int64))[:, None])[:, 0]
    return own[torch.from_numpy(learned[1:].copy())].sum()


def published(model, dataset: PairedDataset) -> tuple[torch.Tensor, list[float], float]:
    """(논문의 손실의 평균, 쌍마다의 보상의 차이, 고른 답의 보상의 평균): 정책과 어댑터를 끈 모델을 문서마다 부른다."""
    documents, losses, margins, chosen = dataset._documents, [], [], []
    for number in range(len(documents) // 2):
        policy = [log_likelihood(model, documents, 2 * number + side) for side in (0, 1)]
        with model.disable_adapter(), torch.no_grad():
            reference = [log_likelihood(model, documents, 2 * number + side) for side in (0, 1)]
        margin = BETA * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
        losses.append(-torch.log(torch.sigmoid(margin)))
        margins.append(float(margin.detach()))
        chosen.append(float(BETA * (policy[0] - reference[0]).detach()))
    return torch.stack(losses).mean(), margins, np.mean(chosen)


def measure_references(model, dataset: PairedDataset, step) -> None:
    with torch.no_grad(), model.disable_adapter():
        for index in range(len(dataset)):
            batch = read_blocks(dataset, [index])
            dataset.references[index] += step.evaluate({**batch, "keys": None})[0].nan_to_num()


STEPS = {
    "손으로 쓴 길": lambda model: TrainStep(model, 0, 12),
    "재계산": lambda model: TrainStep(model, 1, 12),
    "자동미분": lambda model: AutogradStep(model),
    "한 번에": lambda model: AutogradStep(model, whole=True),
    "문서마다": lambda model: AutogradStep(model, separate=True),
    "문서마다 한 번에": lambda model: AutogradStep(model, separate=True, whole=True),
}


@pytest.mark.parametrize("name", STEPS)
def test_loss_and_gradients_equal_the_published_formula(name, tiny_neox):
    model, dataset = lora_neox(tiny_neox, dropout=0.0), make_blocks()
    take_gradients(model)
    measure_references(model, dataset, AutogradStep(model))
    with nudged(model):
        expected, margins, chosen = published(model, dataset)
        expected.backward()
        theirs = take_gradients(model)
        step = STEPS[name](model)
        indices = [*range(len(dataset)), -1]  # -1은 모자라는 자리를 채운 빈 블록이다
        batches = [read_blocks(dataset, indices[at:at + 2]) for at in range(0, len(indices), 2)]
        count = sum(n_targets(batch) for batch in batches)
        assert count == len(margins)
        values = sum(step.train({**batch, "keys": None, "factor": 1 / count.float()}) for batch in batches)
        ours = take_gradients(model)
        evaluated = sum(tally(step.evaluate({**batch, "keys": None}), batch) for batch in batches) / count
    assert values[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert values[1] == pytest.approx(np.mean(margins), abs=1e-5)  # 백쯤인 두 합의 차이다
    assert values[2] == pytest.approx(np.mean([margin > 0 for margin in margins]))
    assert values[3] == pytest.approx(float(chosen), abs=1e-5)
    torch.testing.assert_close(evaluated[:4].float(), values, rtol=1e-5, atol=1e-6)
    assert {key for key, value in theirs.items() if value.abs().max() > 0} == set(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=2e-4, atol=1e-6 * float(value.abs().max()) + 1e-8)


@pytest.mark.quick
def test_slopes_are_the_derivative_of_the_loss():
    dataset = make_blocks(6)
    dataset.references += torch.linspace(-3, 3, dataset.references.numel()).view_as(dataset.references)
    batch = read_blocks(dataset, [*range(len(dataset)), -1])
    nll = torch.rand(batch["input_ids"].numel(), requires_grad=True)
    counted = (shifted_targets(batch["labels"]) != IGNORE).flatten()
    batch["factor"] = torch.tensor(0.25)
    values = objective(nll * counted, batch)
    values[0].backward()
    torch.testing.assert_close(slopes((nll * counted).detach(), batch).flatten() * counted, nll.grad)
    gradient = torch.ones(len(nll), 1)
    assert torch.equal(learn(batch, gradient, lambda factor: (nll * counted * factor).detach()), values.detach())
    torch.testing.assert_close(gradient[:, 0] * counted, nll.grad)
    assert torch.equal(measured(nll, batch).isnan(), batch["reference"].isnan())


@pytest.mark.quick
def test_a_tie_is_half_right_and_far_margins_stay_finite():
    ratios = torch.tensor([[2.0, 2.0, 400.0, -100.0, -500.0, 0.0, torch.nan, torch.nan]])
    loss, margin, right, chosen = score(ratios, {"beta": torch.ones(1)}).tolist()
    assert loss == pytest.approx(0.6931472 + 500) and (margin, right, chosen) == (0, 1.5, -98)
    assert float(F.softplus(torch.tensor(0.0))) == pytest.approx(np.log(2))


class NoReference(TrainStep):
    """기준을 빼는 것을 잊은 micro-step."""

    def train(self, batch):
        return super().train({**batch, "reference": batch["reference"] * 0} if "reference" in batch else batch)


class WrongSide(TrainStep):
    """gradient의 부호를 뒤집은 micro-step."""

    def train(self, batch):
        return super().train({**batch, "beta": -batch["beta"], "reference": batch["reference"]})


@pytest.mark.parametrize("wrong", [NoReference, WrongSide])
def test_the_first_step_check_sees_a_wrong_preference_step(wrong, tiny_neox):
    model, dataset, said = lora_neox(tiny_neox, dropout=0.0), make_blocks(), []
    take_gradients(model)
    chosen = choose_step([lambda: wrong(model, 0, 12), lambda: AutogradStep(model)], model, dataset, 12, CPU,
                         said.append)
    assert type(chosen) is AutogradStep and len(said) == 1
    assert type(choose_step([lambda: TrainStep(model, 0, 12)], model, dataset, 12, CPU, said.append)) is TrainStep


def make_loop(model, micro: int = 1, accumulation: int = 4, checkpoints: Checkpoints | None = None) -> Loop:
    weights, dataset, eval_set = ReplicatedWeights(model, join_group(CPU)), make_blocks(12), make_blocks(3, seed=9)
    step = open_step(model, MemoryPlan(micro), dataset, eval_set, CPU, weights.gradients, lambda line: None)
    loop = Loop(step, weights, Recipe(6, 0, 3, micro, accumulation, 1e-2, 42), dataset, eval_set,
                group=join_group(CPU), device=CPU, checkpoints=checkpoints)
    pairs.measure_references(loop, lambda line: None)
    return loop


def test_training_starts_at_log_2_and_does_not_depend_on_the_micro_batch(tiny_neox):
    found = []
    for micro, accumulation in ((1, 4), (2, 2), (4, 1)):
        loop = make_loop(lora_neox(tiny_neox, dropout=0.0), micro, accumulation)
        assert loop.evaluate() == {"eval_loss": pytest.approx(np.log(2), abs=1e-7), "eval_reward_margin": 0.0,
                                   "eval_reward_accuracy": 0.5, "eval_chosen_reward": 0.0,
                                   "eval_chosen_likelier": pytest.approx(2 / 3, abs=0.4)}
        loop.run()
        rows = [row for row in loop.state.log_history if "loss" in row]
        assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and rows[0]["reward_margin"] == 0
        assert rows[-1]["reward_margin"] > max(0, rows[1]["reward_margin"])  # 처음 보는 쌍들이라 둘째 step은 흔들린다
        found.append([row["loss"] for row in rows])
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("stop", [3, 4])
def test_resume_is_the_same_run(stop, tiny_neox, tmp_path):
    def store(checkpoint: Path | None = None) -> Checkpoints:
        opened = Run(tmp_path, checkpoint, {}, PromptInfo({}, "<|endoftext|>", 2, BLOCK), "")
        return Checkpoints(opened, build_tokenizer(tmp_path / "tokenizer"), 10, ALONE, print)

    def history(loop: Loop) -> list[tuple]:
        return [tuple(row.get(name) for name in ("step", "loss", "reward_margin", "grad_norm", "eval_loss",
                                                 "eval_reward_accuracy")) for row in loop.state.log_history]

    straight = make_loop(lora_neox(tiny_neox, dropout=0.2))
    straight.run()
    first = make_loop(lora_neox(tiny_neox, dropout=0.2), checkpoints=store())
    first.run(should_stop=lambda: first.state.global_step == stop)
    resumed = make_loop(lora_neox(tiny_neox, dropout=0.2), checkpoints=store(tmp_path / f"checkpoint-{stop}"))
    resumed.checkpoints.restore(resumed)
    resumed.run()
    assert history(resumed) == history(straight)
    assert all(map(torch.equal, resumed.weights.parameters, straight.weights.parameters))


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory) -> Path:
    rows = [{"prompt": f"{n} 더하기 {n}는?", "chosen": f"{2 * n}입니다.", "rejected": f"{2 * n}야."} for n in range(24)]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def flags(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    return ["--base_model", str(base), "--data_path", str(data), "--output_dir", str(output), "--cutoff_len", "56",
            "--batch_size", "4", "--num_train_epochs", "2", "--val_set_size", "10", *more]


def test_a_run_from_the_file_to_the_report(tiny_neox, pair_file, tmp_path, capsys):
    whole = tmp_path / "run"
    out = call_script(capsys, "finetune-lora.py", *flags(tiny_neox, pair_file, whole, "--learning_rate", "3e-3"))
    assert "데이터: 24쌍" in out and "DPO, beta 0.1" in out and "보상의 차이" in out and "말하면" not in out
    run = json.loads((whole / "run.json").read_text(encoding="utf-8"))
    assert run["data"]["rows"] == 24 and run["settings"]["dpo_beta"] == 0.1
    assert run["eval_loss_before"] == pytest.approx(np.log(2), abs=1e-6) and run["eval_loss_after"] < np.log(2)
    assert run["reward_accuracy_before"] == 0.5 < run["reward_accuracy_after"]
    assert run["reward_margin_before"] == 0 < run["reward_margin_after"]
    assert f"보상의 차이 0.000 -> {run['reward_margin_after']:.3f}" in out
    samples = (whole / "samples.md").read_text(encoding="utf-8")
    assert samples.count("**모범 답**") == run["data"]["validation_rows"] and "입니다." in samples and "야." not in [
        line.strip("> ") for line in samples.splitlines()]
    assert (whole / "curves.png").stat().st_size > 1000


@pytest.mark.quick
def test_values_not_given_follow_the_data():
    free, config = replace(train_settings(), learning_rate=None), {"model_type": "gpt_neox"}
    ordinary, paired = defaults.fill(free, config), defaults.fill(free, config, pairs=True)
    assert paired.learning_rate < ordinary.learning_rate and (ordinary.dpo_beta, paired.dpo_beta) == (None, 0.1)
    given = defaults.fill(replace(free, learning_rate=2e-5, dpo_beta=0.5), config, pairs=True)
    assert (given.learning_rate, given.dpo_beta) == (2e-5, 0.5)
    words = Documents(np.zeros(0), np.zeros(0), np.zeros(1), np.zeros(0))
    assert "dpo_beta 0.5는 쓰지 않는다" in pairs.plan_lines(given, words)[0]
    assert pairs.plan_lines(ordinary, words) == []
    assert "beta 0.5" in pairs.plan_lines(given, make_pairs())[1]


@pytest.mark.quick
def test_pairs_that_do_not_fit_are_counted_and_all_is_refused():
    documents, lines = make_pairs(6), []
    documents.cutoff_len = int(np.median(np.diff(documents.offsets).reshape(-1, 2).sum(1)))
    settings, parts = train_settings(cutoff_len=documents.cutoff_len), Split(np.arange(8), np.arange(8, 12))
    train, held_out = pairs.drop_long_pairs(settings, documents, parts, lines.append)
    assert not len(train) % 2 and 0 < len(train) + len(held_out) < 12 and "긴 쌍을 뺐다" in lines[0]
    documents.cutoff_len = 5
    with pytest.raises(UsageError, match="--cutoff_len을 늘린다"):
        pairs.drop_long_pairs(settings, documents, parts, lines.append)


@pytest.mark.quick
def test_the_verdict_speaks_of_held_out_rewards(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["finetune-lora.py", "--output_dir", str(tmp_path)])
    before = {"eval_loss": 0.6931, "eval_reward_margin": 0.0, "eval_reward_accuracy": 0.5, "eval_chosen_reward": 0.0,
              "eval_chosen_likelier": 0.25}

    def judge(after: float, chosen: float = 0.1):
        row = {"step": 4, "eval_loss": after, "eval_reward_margin": 1.5, "eval_reward_accuracy": 0.875,
               "eval_chosen_reward": chosen, "eval_chosen_likelier": 0.75}
        state = TrainState(8, 8, best_metric=after, best_global_step=4, log_history=[row])
        result = Result(None, state, "", 0.6931, after, 1.0, False, True, started=before)
        plan = Plan(Schedule(60, 3, 6), MemoryPlan(1), 1, 1)
        settings = train_settings(output_dir=str(tmp_path), learning_rate=3e-5, dpo_beta=0.1)
        return verdict.judge(settings, plan, result)

    for found in (judge(0.4), judge(0.69)):
        assert "50.0% -> 87.5%" in found.lines[0] and "0.000 -> 1.500" in found.lines[0]
        assert "25.0% -> 75.0%" in found.lines[0]
    assert judge(0.4).learned and len(judge(0.4).lines) == 1
    assert not judge(0.69).learned and "--learning_rate 9e-05" in judge(0.69).lines[-1]
    assert len(judge(0.4, chosen=-0.1).lines) == 1  # 두 답의 차이에 비할 만큼 내려가지 않았다
    broken = judge(0.2, chosen=-0.5)
    assert "고른 답의 보상도 내려갔다(-0.500)" in broken.lines[1] and "--learning_rate 1e-05" in broken.lines[-1]
