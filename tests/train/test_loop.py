"""학습기의 약속: 토큰 평균 손실, 문서의 격리, 메모리 부족에서의 회복, 정확한 재개."""

import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build_tokenizer, lora_neox
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from utils.engine.train_step import TrainStep
from utils.errors import UsageError
from utils.model.adapter import PromptInfo
from utils.train.autograd_step import AutogradStep
from utils.train.group import ALONE, join_group
from utils.train.loop import Loop
from utils.train.parity import check_isolation
from utils.train.planner import MemoryPlan
from utils.train.records import Recipe
from utils.train.resume import Checkpoints
from utils.train.run_folder import Run
from utils.train.step import open_step
from utils.train.weights import ReplicatedWeights

BLOCK = 32
CPU = torch.device("cpu")


class Blocks(torch.utils.data.Dataset):
    """길이가 제각각인 문서 셋을 담은 블록들. 블록마다 정답의 수가 다르다."""

    max_documents = 3

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if index >= self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        cut = int(torch.randint(4, 20, (1,), generator=generator))
        tokens = torch.randint(0, 300, (BLOCK,), generator=generator)
        positions = torch.cat([torch.arange(cut), torch.arange(6), torch.arange(BLOCK - cut - 6)])
        labels = tokens.masked_fill((positions == 0) | (torch.arange(BLOCK) > 10 + 2 * index), -100)
        return {"input_ids": tokens, "labels": labels, "position_ids": positions}


def neox(folder, dropout: float = 0.2):
    return lora_neox(folder, dropout=dropout)


def llama(dropout: float = 0.2):
    torch.manual_seed(0)
    base = LlamaForCausalLM._from_config(
        LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
        attn_implementation="sdpa")
    return get_peft_model(base, LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"],
                                           task_type="CAUSAL_LM"))


def make(model, *, count: int = 10, micro: int = 2, accumulation: int = 2, steps: int = 4, interval: int = 100,
         evaluates: bool = False, wrap=lambda step: step, checkpoints=None) -> Loop:
    """CPU에서 도는 학습 루프. `wrap`은 micro-step을 감싼다."""
    group, weights = join_group(CPU), ReplicatedWeights(model, join_group(CPU))
    train_set, said = Blocks(count), []
    step = open_step(model, MemoryPlan(micro), train_set, Blocks(3), CPU, weights.gradients, said.append)
    step.step = wrap(step.step)
    loop = Loop(step, weights, Recipe(steps, 0, interval, micro, accumulation, learning_rate=1e-2, seed=42), train_set,
                Blocks(3) if evaluates else None, group=group, device=CPU, checkpoints=checkpoints)
    loop.said = said
    return loop


def losses(loop: Loop) -> list[float]:
    return [entry["loss"] for entry in loop.state.log_history if "loss" in entry]


def adapter(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def run(model, stop_at: int | None = None, **settings):
    loop = make(model, **settings)
    loop.run(should_stop=lambda: loop.state.global_step == stop_at)
    return losses(loop), adapter(model), loop


@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_micro_batches_do_not_change_the_result(architecture, tiny_neox):
    results = []
    for micro, accumulation in ((1, 4), (2, 2), (4, 1)):
        model = neox(tiny_neox) if architecture == "neox" else llama(0.0)
        results.append(run(model, micro=micro, accumulation=accumulation)[:2])
    for other in results[1:]:
        assert other[0] == pytest.approx(results[0][0], abs=1e-5)
        torch.testing.assert_close(other[1], results[0][1], atol=2e-5, rtol=1e-3)


def test_loss_is_the_mean_over_the_tokens_of_the_batch(tiny_neox):
    model = neox(tiny_neox, dropout=0.0)
    loop = make(model, count=4, micro=1, accumulation=4, steps=1)
    nll = tokens = 0.0
    for block in Blocks(4):
        starts = [*(block["position_ids"] == 0).nonzero()[:, 0].tolist(), BLOCK]
        for start, end in itertools.pairwise(starts):
            logits = model(input_ids=block["input_ids"][None, start:end]).logits[0, :-1]
            labels = block["labels"][start + 1:end]
            nll += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            tokens += int((labels >= 0).sum())
    loop.run()
    assert losses(loop)[0] == pytest.approx(nll / tokens, rel=1e-5)


def test_eval_loss_is_the_mean_over_tokens_and_leaves_training_alone(tiny_neox):
    loop = make(neox(tiny_neox), micro=2, evaluates=True)
    nll = sum(float(loop.step.evaluate({**{k: v[None] for k, v in block.items()}, "keys": loop.dropout_keys(1)}))
              for block in Blocks(3))
    tokens = sum(int((block["labels"][1:] >= 0).sum()) for block in Blocks(3))
    assert loop.evaluate() == {"eval_loss": pytest.approx(nll / tokens, rel=1e-6)}
    plain = run(neox(tiny_neox))
    evaluated = run(neox(tiny_neox), evaluates=True, interval=1)
    assert [entry["step"] for entry in evaluated[2].state.log_history if "eval_loss" in entry] == [1, 2, 3, 4]
    assert plain[0] == evaluated[0] and torch.equal(plain[1], evaluated[1])


def test_the_path_is_named(tiny_neox):
    assert "손으로 쓴 gpt_neox" in make(neox(tiny_neox)).step.path
    assert "손으로 쓴 llama" in make(llama()).step.path


class Leaky(TrainStep):
    """문서의 경계를 잊은 micro-step."""

    def evaluate(self, batch):
        positions = torch.arange(batch["position_ids"].shape[1]).expand_as(batch["position_ids"])
        return super().evaluate({**batch, "position_ids": positions})


@pytest.mark.parametrize("step", [Leaky, TrainStep, AutogradStep])
def test_leaking_documents_are_refused(step, tiny_neox):
    model = neox(tiny_neox)
    step = step(model, 0) if step is AutogradStep else step(model, 0, 2)
    arguments = (step, 300, 1, BLOCK, torch.device("cpu"), {"keys": torch.zeros(1, 2, dtype=torch.int32)})
    if type(step) is Leaky:
        with pytest.raises(UsageError, match="떼어 놓지 못해"):
            check_isolation(*arguments)
    else:
        check_isolation(*arguments)


class ShortOfMemory:
    """`limit` 블록보다 크면 gradient를 더하다가 메모리가 모자라는 micro-step."""

    def __init__(self, step, limit: int):
        self.step, self.limit, self.path = step, limit, step.path

    def has_captured(self, batch):
        return False

    def train(self, batch):
        loss = self.step.train(batch)
        if len(batch["input_ids"]) > self.limit:
            raise torch.OutOfMemoryError("시험")
        return loss

    def evaluate(self, batch):
        return self.step.evaluate(batch)

    def release(self):
        self.step.release()

    def recompute_more(self):
        return self.step.recompute_more()


def short_of_memory(limit: int):
    return lambda step: ShortOfMemory(step, limit)


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(tiny_neox):
    settings = {"micro": 4, "accumulation": 2, "count": 16}
    whole = run(neox(tiny_neox), **settings)
    halved = run(neox(tiny_neox), wrap=short_of_memory(1), **settings)
    assert halved[0] == pytest.approx(whole[0], abs=1e-5)
    torch.testing.assert_close(halved[1], whole[1], atol=2e-5, rtol=1e-3)
    assert halved[2].step.rows == 1
    assert ["2로" in line or "1로" in line for line in halved[2].said] == [True, True]


def test_a_block_that_never_fits_is_one_line(tiny_neox):
    with pytest.raises(UsageError, match="--cutoff_len 16"):
        run(neox(tiny_neox), wrap=short_of_memory(0))


def test_a_run_that_diverges_stops_before_its_weights_are_touched(tiny_neox):
    class Infinite(ShortOfMemory):
        def train(self, batch):
            return self.step.train(batch) * (math.inf if loop.state.global_step == 2 else 1.0)

    model = neox(tiny_neox)
    loop = make(model, wrap=lambda step: Infinite(step, 99))
    two_steps = run(neox(tiny_neox), steps=4, stop_at=2)
    with pytest.raises(UsageError, match="step 3에서 loss"):
        loop.run()
    assert torch.equal(adapter(model), two_steps[1])


@pytest.mark.parametrize("architecture", ["neox", "llama"])
@pytest.mark.parametrize("step", [3, 4])
def test_resume_is_the_same_run(architecture, step, tiny_neox, tmp_path):
    def model():
        return neox(tiny_neox) if architecture == "neox" else llama()

    def store(checkpoint=None) -> Checkpoints:
        opened = Run(tmp_path, checkpoint, {}, PromptInfo({}, "<|endoftext|>", 2, BLOCK), "")
        return Checkpoints(opened, build_tokenizer(tmp_path / "tokenizer"), 10, ALONE, print)

    settings = {"steps": 7, "interval": 2, "evaluates": True}
    straight = run(model(), **settings)
    run(model(), stop_at=step, checkpoints=store(), **settings)
    resumed = model()
    loop = make(resumed, checkpoints=store(tmp_path / f"checkpoint-{step}"), **settings)
    loop.checkpoints.restore(loop)
    assert loop.state.global_step == step
    loop.run()
    assert torch.equal(adapter(resumed), straight[1])
    assert losses(loop) == straight[0]
