"""학습기의 약속: 토큰 평균 손실, 문서의 격리, 메모리 부족에서의 회복, 정확한 재개, 여러 프로세스의 합."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_neox
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from utils.captured import check_isolation
from utils.engine.train_step import TrainStep
from utils.errors import UsageError
from utils.microstep import AutogradStep
from utils.trainer import LeanTrainer

BLOCK = 32


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
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return get_peft_model(base, LoraConfig(r=4, lora_dropout=dropout, target_modules=["query_key_value"],
                                           task_type="CAUSAL_LM"))


def llama(dropout: float = 0.2):
    torch.manual_seed(0)
    base = LlamaForCausalLM._from_config(
        LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
        attn_implementation="sdpa")
    return get_peft_model(base, LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"],
                                           task_type="CAUSAL_LM"))


def make(model, folder, count: int = 10, micro: int = 2, accumulation: int = 2, trainer=LeanTrainer, **settings):
    arguments = {"max_steps": 4, "save_strategy": "no", **settings}
    args = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=micro, learning_rate=1e-2,
                             gradient_accumulation_steps=accumulation, logging_steps=1, use_cpu=True, report_to=[],
                             disable_tqdm=True, **arguments)
    return trainer(model, args, Blocks(count), Blocks(3))


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def run(model, folder, **settings):
    trainer = make(model, folder, **settings)
    trainer.train()
    return losses(trainer), adapter(model), trainer


@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_micro_batches_do_not_change_the_result(architecture, tiny_neox, tmp_path):
    results = []
    for micro, accumulation in ((1, 4), (2, 2), (4, 1)):
        model = neox(tiny_neox) if architecture == "neox" else llama(0.0)
        results.append(run(model, tmp_path, micro=micro, accumulation=accumulation)[:2])
    for other in results[1:]:
        assert other[0] == pytest.approx(results[0][0], abs=1e-5)
        torch.testing.assert_close(other[1], results[0][1], atol=2e-5, rtol=1e-3)


def test_loss_is_the_mean_over_the_tokens_of_the_batch(tiny_neox, tmp_path):
    model = neox(tiny_neox, dropout=0.0)
    trainer = make(model, tmp_path, count=4, micro=1, accumulation=4, max_steps=1)
    nll = tokens = 0.0
    for block in Blocks(4):
        starts = [*(block["position_ids"] == 0).nonzero()[:, 0].tolist(), BLOCK]
        for start, end in itertools.pairwise(starts):
            logits = model(input_ids=block["input_ids"][None, start:end]).logits[0, :-1]
            labels = block["labels"][start + 1:end]
            nll += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            tokens += int((labels >= 0).sum())
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(nll / tokens, rel=1e-5)


def test_eval_loss_is_the_mean_over_tokens_and_leaves_training_alone(tiny_neox, tmp_path):
    trainer = make(neox(tiny_neox), tmp_path, micro=2)
    nll = sum(float(trainer.step.evaluate({**{k: v[None] for k, v in block.items()}, **trainer._keys(1)}))
              for block in Blocks(3))
    tokens = sum(int((block["labels"][1:] >= 0).sum()) for block in Blocks(3))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nll / tokens, rel=1e-6)
    plain = run(neox(tiny_neox), tmp_path)
    evaluated = run(neox(tiny_neox), tmp_path, eval_strategy="steps", eval_steps=1)
    assert plain[0] == evaluated[0] and torch.equal(plain[1], evaluated[1])


def test_the_path_is_named(tiny_neox, tmp_path):
    assert "손으로 쓴 gpt_neox" in make(neox(tiny_neox), tmp_path).path
    assert "손으로 쓴 llama" in make(llama(), tmp_path).path


class Leaky(TrainStep):
    """문서의 경계를 잊은 micro-step."""

    def evaluate(self, batch):
        positions = torch.arange(batch["position_ids"].shape[1]).expand_as(batch["position_ids"])
        return super().evaluate({**batch, "position_ids": positions})


@pytest.mark.parametrize("step", [Leaky, TrainStep, AutogradStep])
def test_leaking_documents_are_refused(step, tiny_neox):
    model = neox(tiny_neox)
    step = step(model, 0) if step is AutogradStep else step(model, 0, 2)
    arguments = (step, 300, 1, BLOCK, {"keys": torch.zeros(1, 2, dtype=torch.int32)})
    if type(step) is Leaky:
        with pytest.raises(UsageError, match="떼어 놓지 못해"):
            check_isolation(*arguments)
    else:
        check_isolation(*arguments)


class ShortOfMemory:
    """`limit` 블록보다 크면 gradient를 더하다가 메모리가 모자라는 micro-step."""

    def __init__(self, step, limit: int):
        self.step, self.limit, self.path = step, limit, step.path

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
    class Trainer(LeanTrainer):
        def _choose_step(self):
            self.said = []
            self.say = self.said.append
            return ShortOfMemory(super()._choose_step(), limit)

    return Trainer


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(tiny_neox, tmp_path):
    settings = {"micro": 4, "accumulation": 2, "count": 16}
    whole = run(neox(tiny_neox), tmp_path, **settings)
    halved = run(neox(tiny_neox), tmp_path, trainer=short_of_memory(1), **settings)
    assert halved[0] == pytest.approx(whole[0], abs=1e-5)
    torch.testing.assert_close(halved[1], whole[1], atol=2e-5, rtol=1e-3)
    assert halved[2].rows == 1
    assert ["2로" in line or "1로" in line for line in halved[2].said] == [True, True]


def test_a_block_that_never_fits_is_one_line(tiny_neox, tmp_path):
    with pytest.raises(UsageError, match="--cutoff_len 16"):
        run(neox(tiny_neox), tmp_path, trainer=short_of_memory(0))


@pytest.mark.parametrize("architecture", ["neox", "llama"])
@pytest.mark.parametrize("step", [3, 4])
def test_resume_is_the_same_run(architecture, step, tiny_neox, tmp_path):
    def model():
        return neox(tiny_neox) if architecture == "neox" else llama()

    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    straight = run(model(), tmp_path / "a", **settings)
    resumed = model()
    trainer = make(resumed, tmp_path / "b", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert torch.equal(adapter(resumed), straight[1])
    assert losses(trainer) == straight[0]


SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from pathlib import Path
from test_trainer import adapter, losses, make, neox
model = neox(Path({folder!r}))
trainer = make(model, {output!r}, count=11, micro={micro}, accumulation={accumulation}, max_steps=5)
assert trainer.args.world_size == {world}
evaluated = trainer.evaluate()["eval_loss"]
trainer.train()
if trainer.args.process_index == 0:
    torch.save((adapter(model), losses(trainer), evaluated), {output!r} + "/result.pt")
"""


def test_two_processes_equal_one(tmp_path):
    folder = build_neox(tmp_path / "model")
    results = []
    for world, micro, accumulation in ((1, 2, 2), (2, 1, 2)):
        output = tmp_path / f"world{world}"
        output.mkdir()
        script = output / "run.py"
        script.write_text(SCRIPT.format(root=str(Path(__file__).parents[1]), tests=str(Path(__file__).parent),
                                        folder=str(folder), output=str(output), micro=micro, world=world,
                                        accumulation=accumulation), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
                   str(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(output / "result.pt"))
    one, two = results
    torch.testing.assert_close(two[0], one[0], atol=1e-5, rtol=1e-4)
    assert two[1] == pytest.approx(one[1], abs=1e-5)
    assert two[2] == pytest.approx(one[2], abs=1e-5)
