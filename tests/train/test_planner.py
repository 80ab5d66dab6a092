"""메모리 계획은 예산을 넘지 않고, 모자라면 재계산부터 늘리고, 안 되면 들어가는 길을 말한다."""

import pytest
import torch
from standin import SHAPES, config_of
from tiny import lora_neox

from utils.engine.train_step import NeoxStep
from utils.errors import UsageError
from utils.model.loader import Device
from utils.train.planner import CONTEXT, GB, SAFETY, fit, make_plan, predict

TARGETS = ("query_key_value",)


def plan(shape: str, budget: float, block: int = 1024, micro: int | None = None, batch: int = 16):
    return fit(config_of(shape), budget * GB, block, batch, micro, 8, TARGETS, 8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [256, 512, 1024, 2048])
def test_a_plan_never_exceeds_its_budget(shape, block):
    for budget in (3, 4, 5, 5.5, 8, 12, 24, 80):
        try:
            chosen = plan(shape, budget, block)
        except UsageError:
            continue
        assert sum(chosen.parts.values()) <= budget * GB
        assert 16 % chosen.micro_batch_size == 0
        assert 0 <= chosen.recompute_layers < SHAPES[shape]["num_hidden_layers"]


def test_less_memory_means_more_recomputation_and_never_less_work_saved():
    counts = [plan("5.8b", budget / 10).recompute_layers for budget in range(70, 51, -1)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 5


def test_the_default_fills_the_gpu_without_recomputing():
    for block, micro in ((256, 4), (512, 2), (1024, 1), (2048, 1)):
        chosen = plan("1.3b", 80, block)
        assert (chosen.micro_batch_size, chosen.recompute_layers) == (micro, 0)


def test_asking_for_more_memory_buys_a_larger_micro_batch():
    def asked(budget: float):
        return fit(config_of("1.3b"), budget * GB, 1024, 16, None, 8, TARGETS, 8, grow=True)

    chosen = [asked(budget) for budget in (2, 3, 4, 24)]
    assert [plan.micro_batch_size for plan in chosen] == [1, 1, 2, 4]
    assert [plan.recompute_layers > 0 for plan in chosen] == [True, False, False, False]


def test_asked_micro_batch_is_kept():
    assert plan("1.3b", 80, micro=4).micro_batch_size == 4
    with pytest.raises(UsageError, match="--micro_batch_size를 빼면"):
        plan("1.3b", 2.2, micro=16)


def test_impossible_budgets_name_what_would_fit():
    with pytest.raises(UsageError, match="더 작은 모델"):
        plan("12.8b", 4)
    least = sum(predict(config_of("5.8b"), 512, 1, 27, 8, 8).values()) - CONTEXT
    with pytest.raises(UsageError, match="--cutoff_len 512"):
        plan("5.8b", (least * SAFETY + CONTEXT) / GB + 0.01, 2048)


def test_cpu_needs_no_plan():
    device = Device(torch.device("cpu"), torch.float32, "")
    chosen = make_plan(config_of("1.3b"), device=device, cutoff_len=64, batch_size=4, micro_batch_size=2, lora_r=8,
                       targets=TARGETS, vram_gb=None, max_documents=3)
    assert (chosen.micro_batch_size, chosen.lines()) == (2, [])


def test_the_parts_are_said():
    (total, how) = plan("5.8b", 5.5).lines()
    assert "가중치" in total and "CUDA context" in total and "재계산" in how
    assert "5.00 GB" in plan("5.8b", 5.5).outcome(5.0 * GB)


def test_saved_activations_are_what_the_step_really_keeps(tiny_neox):
    rows, block = 2, 48
    tokens = torch.randint(0, 300, (rows, block))
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(block).expand(rows, -1),
             "factor": torch.tensor(0.03), "keys": torch.zeros(rows, 2, dtype=torch.int32)}
    model = lora_neox(tiny_neox, rank=3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    for recompute in (0, 1):
        step = NeoxStep(model, recompute, 3)
        step.train(batch)
        kept = {id(saved): saved for saved in step.saved if saved is not step.saved[-1]}.values()
        real = step.x.nbytes + sum(saved.qkv.nbytes + saved.h.nbytes + saved.z.nbytes for saved in kept)
        config = model.get_base_model().config.to_dict()
        expected = predict(config, block, rows, recompute, 3, 3)["저장하는 활성값"] * 2  # 여기서는 fp32다
        assert real == pytest.approx(expected, rel=0.2)
