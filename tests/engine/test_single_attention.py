"""블록 하나가 문서 하나일 때의 길: 언제 그 길로 가는지, 그 길의 손실과 gradient가 문서마다의 길과 같은지."""

import pytest
import torch
from test_train_families import add_lora, build
from torch import nn

from utils.engine.attention import Documents, FormulaAttention
from utils.engine.families import describe
from utils.engine.single_attention import is_single
from utils.engine.train_step import TrainStep
from utils.errors import UsageError
from utils.train.parity import check_options

BLOCK = 24


def make_batch(*lengths: int, learned: int = 1) -> dict[str, torch.Tensor]:
    """길이가 `lengths`인 문서들의 블록 하나. 앞의 `learned`개만 배우고, 나머지는 끝을 채운 것처럼 배우지 않는다."""
    torch.manual_seed(sum(lengths))
    assert sum(lengths) == BLOCK
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    tokens = torch.randint(0, 200, (1, BLOCK))
    learns = (positions > 0) & (torch.arange(BLOCK) < sum(lengths[:learned]))
    return {"input_ids": tokens, "labels": tokens.masked_fill(~learns, -100), "position_ids": positions,
            "keys": torch.tensor([[5, -7]], dtype=torch.int32), "factor": torch.tensor(0.05)}


class Unbounded(FormulaAttention):
    """문서의 경계를 보지 않는 인과 attention. 블록 전체가 문서 하나라고 본다."""

    name = "경계 없는 torch 식"

    def _weights(self, q, k, documents, window):
        rows, block = documents.positions.shape
        whole = Documents(torch.arange(block).expand(rows, block), documents.offsets)
        return super()._weights(q, k, whole, window)


def learn(model: nn.Module, step: TrainStep, batch: dict, **options) -> tuple[float, torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    loss = float(step.train(batch, **options))
    return loss, torch.cat([parameter.grad.flatten() for parameter in trained])


@pytest.mark.parametrize("lengths, learned, single", [
    ((24,), 1, True), ((20, 4), 1, True), ((10, 10, 4), 1, True), ((10, 14), 2, False), ((10, 10, 4), 2, False)])
def test_only_blocks_that_learn_one_document_are_single(lengths, learned, single):
    batch = make_batch(*lengths, learned=learned)
    assert is_single(batch) is single
    two = {name: torch.cat([value, make_batch(12, 12, learned=2)[name]]) for name, value in batch.items()
           if value.dim() == 2}
    assert not is_single(two)  # 블록마다 그래야 한다


@pytest.mark.parametrize("name", ["gpt_neox", "qwen3", "qwen2-window"])
@pytest.mark.parametrize("recompute", [0, 2])
def test_a_padded_document_learns_the_same_without_boundaries(name, recompute):
    model = build(name)
    model = add_lora(model, describe(model).linears(), 0.1)
    step, batch = TrainStep(model, recompute, 3), make_batch(20, 4)
    assert step.options(batch) == {"single": False}  # 이 장치에는 더 빠른 것이 없다
    wanted = learn(model, step, batch)
    step.single = Unbounded(step.family.attention_scale)
    assert step.options(batch) == {"single": True}
    got = learn(model, step, batch, single=True)
    assert got[0] == pytest.approx(wanted[0], rel=1e-6)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=1e-6)


def test_packed_documents_never_take_the_path_without_boundaries():
    model = build("qwen3")
    step, batch = TrainStep(add_lora(model, describe(model).linears()), 0, 3), make_batch(10, 14, learned=2)
    step.single = Unbounded(step.family.attention_scale)
    wanted = learn(step.base, step, batch)
    assert step.options(batch) == {"single": False}
    leaked = learn(step.base, step, batch, single=True)  # 이 길로 갔다면 틀렸을 것이다
    assert abs(leaked[0] - wanted[0]) > 1e-4 * wanted[0]


def test_the_start_up_check_refuses_a_wrong_path_for_one_document():
    class Wrong(Unbounded):
        def backward(self, *args):
            return [part * 1.5 for part in super().backward(*args)]

    model = build("qwen3")
    model = add_lora(model, describe(model).linears())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    step, short = TrainStep(model, 0, 3), {**make_batch(10, 14, learned=2), "keys": None}
    step.single = Unbounded(step.family.attention_scale)
    check_options(step, model, short)
    step.single = Wrong(step.family.attention_scale)
    with pytest.raises(UsageError, match="문서가 하나인 블록"):
        check_options(step, model, short)
