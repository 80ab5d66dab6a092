"""GPU가 있으면 `pytest -m gpu tests/engine/test_gpu_dpo.py`로 확인한다: 선호 쌍의 micro-step을 찍어 되풀이한 값."""

import math

import pytest
import torch
from made_pairs import make_blocks
from test_gpu import prepare

from utils.data.blocks import make_even
from utils.train import pairs
from utils.train.autograd_step import AutogradStep
from utils.train.batches import read_blocks
from utils.train.group import ALONE
from utils.train.loop import Loop
from utils.train.parity import take_gradients
from utils.train.planner import MemoryPlan
from utils.train.records import Recipe
from utils.train.step import open_step
from utils.train.weights import ReplicatedWeights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA GPU가 없다")]
CUDA = torch.device("cuda")


@pytest.fixture(params=["gpt_neox", "qwen3"])
def loop(request) -> Loop:
    """작은 모델로 선호 쌍을 배우는 루프. 첫 step 전의 비교(`parity`)를 지난 것이다."""
    model = prepare(request.param, dropout=0.0)
    weights = ReplicatedWeights(model, ALONE, fp16=torch.cuda.get_device_capability() < (8, 0))
    train_set, eval_set = make_blocks(24), make_blocks(6, seed=9)
    make_even(train_set, eval_set)
    step = open_step(model, MemoryPlan(2), train_set, eval_set, CUDA, weights.gradients, print)
    made = Loop(step, weights, Recipe(12, 0, 4, 2, 2, 1e-3, 42), train_set, eval_set, group=ALONE, device=CUDA)
    pairs.measure_references(made, print)
    return made


def test_the_captured_step_learns_pairs_from_log_2(loop):
    before = loop.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-3)
    loop.run()
    rows = [row for row in loop.state.log_history if "loss" in row]
    assert "손으로 쓴" in loop.step.path and "CUDA graph" in loop.step.path and "graph 없이" not in loop.step.path
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert rows[-1]["reward_margin"] > 0 and rows[-1]["loss"] < rows[0]["loss"]


def test_the_captured_step_equals_autograd(loop):
    captured, model = loop.step.step, loop.step.model
    batch = {**read_blocks(loop.train_set, [0, 1]), "keys": torch.zeros(2, 2, dtype=torch.int32),
             "factor": torch.tensor(0.25, device=CUDA)}
    take_gradients(model)
    found = [(captured.train(batch).cpu(), take_gradients(model)) for _ in range(3)]  # 워밍업, 찍기, 되풀이
    plain = AutogradStep(model).train({name: value.to(CUDA) for name, value in batch.items()}).cpu()
    theirs = take_gradients(model)
    for values, gradients in found:
        torch.testing.assert_close(values[:2], plain[:2], rtol=0.02, atol=0.02)
        apart = math.sqrt(sum(float((gradients[name] - value).norm()) ** 2 for name, value in theirs.items()))
        assert apart < 0.1 * math.sqrt(sum(float(value.norm()) ** 2 for value in theirs.values()))
