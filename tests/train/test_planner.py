"""메모리 계획은 예산을 넘지 않고, 모자라면 재계산부터 늘리고, 안 되면 들어가는 길을 말한다."""

from dataclasses import replace

import pytest
import torch
from standin import SHAPES, config_of
from test_train_families import BLOCK, FAMILIES, add_lora, build, make_batch

from utils.engine.families import describe
from utils.engine.train_memory import attention_bytes
from utils.engine.train_step import TrainStep
from utils.errors import UsageError
from utils.train.planner import GB, SAFETY, MemoryPlan, cap_allocator, fit, make_plan
from utils.train.prediction import CONTEXT, WORKSPACE, Workload, find_family, predict

pytestmark = pytest.mark.quick

TARGETS = ("query_key_value",)


def work_of(shape: str, block: int = 1024, targets: tuple[str, ...] = TARGETS, max_documents: int = 8) -> Workload:
    return Workload(config_of(shape), targets, 8, block, max_documents)


def plan(shape: str, budget: float, block: int = 1024, micro: int | None = None, batch: int = 16):
    return fit(work_of(shape, block), budget * GB, batch, micro)


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
        return fit(work_of("1.3b"), budget * GB, 16, grow=True)

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
    least = sum(predict(work_of("5.8b", 512), 1, 27).values()) - CONTEXT
    with pytest.raises(UsageError, match="--cutoff_len 512"):
        plan("5.8b", (least * SAFETY + CONTEXT) / GB + 0.01, 2048)


def test_cpu_needs_no_plan():
    chosen = make_plan(work_of("1.3b", 64), torch.device("cpu"), 4, 2, vram_gb=None, exact=False)
    assert (chosen.micro_batch_size, chosen.lines()) == (2, [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA GPU가 없다")
def test_the_allocator_never_holds_more_than_the_budget():
    device = torch.device("cuda", torch.cuda.current_device())
    room = torch.cuda.memory_reserved(device) + (64 << 20)
    try:
        cap_allocator(MemoryPlan(1, parts={"CUDA context": CONTEXT}, budget=room + CONTEXT), device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(128 << 20, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_exact_attention_needs_a_copy_of_dq_for_every_part_of_the_card():
    work = work_of("1.3b", max_documents=2)
    plain, exact, small = (predict(replace(work, processors=processors), 1, 0)["작업 공간"]
                           for processors in (0, 132, 28))
    copies = -(-132 // (2 * work.config["num_attention_heads"]))
    assert exact - plain == pytest.approx((copies - 1) * 4 * (1024 + 128 * 2) * 2048, rel=0.03)
    assert small == plain  # RTX 3060


def test_the_parts_are_said():
    (total, how) = plan("5.8b", 5.5).lines()
    assert "가중치" in total and "CUDA context" in total and "재계산" in how
    assert "5.00 GB" in plan("5.8b", 5.5).outcome(5.0 * GB)


ALL_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_activations_and_buffers_are_what_the_step_really_keeps(name):
    model = build(name)
    family = describe(model)
    config, targets = model.config.to_dict(), tuple(family.linears())
    batch, model = make_batch(), add_lora(model, targets)
    tokens = batch["input_ids"].numel()
    for recompute in (0, 1):
        step = TrainStep(model, recompute, 3)
        step.train(batch)
        kept = {id(saved): saved for saved in step.saved if saved is not step.saved[-1]}.values()
        tensors = [part for saved in kept for part in vars(saved).values() if isinstance(part, torch.Tensor)]
        z = [part for layer in step.z for part in layer.values()]
        # norm의 통계는 늘 fp32다. 나머지는 여기서만 fp32라 예측(16비트)의 두 배다
        real = sum(tensor.nbytes for tensor in [*step.x, *tensors, *z]) + 2 * step.stats.nbytes
        # attention의 출력은 backward가 끝나며 놓았다
        attended = (family.layers - recompute) * tokens * attention_bytes(family)
        expected = predict(Workload(config, targets, 3, BLOCK, 3), 2, recompute)
        assert real == 2 * (expected["저장하는 활성값"] - attended)
        shared = sum(part.nbytes for part in vars(step.saved[-1]).values() if isinstance(part, torch.Tensor))
        buffers = shared + sum(buffer.nbytes for buffer in [*step.buffers.values(), step.unpacker.buffer])
        assert buffers / 2 < expected["작업 공간"] - WORKSPACE


def test_planner_and_trainer_ask_one_rule():
    for name in FAMILIES:
        model = build(name)
        targets = tuple(describe(model).linears())
        assert find_family(model.config.to_dict(), targets) == describe(add_lora(model, targets), training=True)
    config = build("llama").config.to_dict()
    assert find_family(config, ("q_proj", "lm_head")) is None
    assert find_family(config | {"hidden_act": "relu"}, ("q_proj",)) is None
    assert find_family(config | {"attention_dropout": 0.1}, ("q_proj",)) is None


def test_all_linear_layers_need_more_than_one():
    one, every = (predict(work_of("1.3b", targets=targets), 1, 0) for targets in (TARGETS, ALL_NEOX))
    assert every["어댑터와 optimizer"] > 2 * one["어댑터와 optimizer"]
    assert every["저장하는 활성값"] > one["저장하는 활성값"]
