"""GPU가 있는 사람이 `pytest -m gpu tests/test_gpu.py` 하나로 확인한다: 커널, attention, 찍은 micro-step, 학습기."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from standin import SHAPES, add_lora, build

from utils.engine.attention import Documents, FormulaAttention, choose_attention
from utils.engine.train_layers import restore_embedding
from utils.engine.train_ops import CudaOps, TorchOps
from utils.engine.train_step import NeoxStep
from utils.train.autograd_step import AutogradStep
from utils.train.graph_step import CapturedStep
from utils.train.group import ALONE
from utils.train.loop import Loop
from utils.train.planner import MemoryPlan
from utils.train.records import Recipe
from utils.train.step import open_step
from utils.train.weights import ReplicatedWeights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA GPU가 없다")]
CUDA = torch.device("cuda")
BLOCK, ROWS = 192, 2


def half() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def close(got, wanted, limit=0.01):
    error = float((got.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-20))
    assert error < limit, error


@pytest.fixture(scope="module")
def model():
    SHAPES["tiny"] = {"num_hidden_layers": 3, "hidden_size": 512, "num_attention_heads": 4, "rotary_pct": 0.5}
    return add_lora(build("tiny", half(), True, half()), up=0.05)


@pytest.fixture(scope="module")
def ops(model):
    step = NeoxStep(model)
    assert type(step.ops) is CudaOps
    return step.ops, TorchOps(step.ops.table), step.layers[1]


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    positions = torch.stack([torch.cat([torch.arange(70), torch.arange(BLOCK - 70)]),
                             torch.cat([torch.arange(5), torch.arange(100), torch.arange(BLOCK - 105)])])
    tokens = torch.randint(0, 30000, (ROWS, BLOCK), generator=generator)
    labels = tokens.masked_fill(positions == 0, -100)
    values = {"input_ids": tokens, "labels": labels, "position_ids": positions, "factor": torch.tensor(0.01),
              "keys": torch.tensor([[5, -7], [11, 13]], dtype=torch.int32)}
    return {name: value.to(CUDA) for name, value in values.items()}


def random(*shape):
    return torch.randn(*shape, device=CUDA, dtype=half())


def poisoned(*shape):
    return torch.full(shape, torch.nan, device=CUDA, dtype=half())


@pytest.mark.parametrize("keys", [None, [[5, -7], [11, 13]]])
def test_norms(ops, keys):
    cuda, formula, layer = ops
    keys = None if keys is None else torch.tensor(keys, dtype=torch.int32, device=CUDA)
    x, results = random(64, 512), []
    gradient, d1, d2 = random(64, 512), random(64, 520), random(64, 512)
    for side in (cuda, formula):
        outs = [poisoned(64, 520), poisoned(64, 512), poisoned(64, 512), poisoned(64, 8)]
        side.norms(layer, x, keys, *outs)
        dx, dropped = gradient.clone(), poisoned(64, 512)
        side.norms_backward(layer, x, keys, d1, d2, dx, dropped)
        results.append([*outs, dx, dropped])
    for got, wanted in zip(*results, strict=True):
        close(got, wanted)


def test_dequantize_equals_bitsandbytes(ops):
    from bitsandbytes.functional import dequantize_4bit

    cuda, formula, layer = ops
    out = poisoned(4 * 512 * 512)
    for linear in (layer.dense, layer.up, layer.down):
        wanted = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        assert torch.equal(cuda.weight(linear, out), wanted)
    wide = cuda.weight(layer.qkv, out, layer).clone()
    assert torch.equal(wide, formula.weight(layer.qkv, poisoned(4 * 512 * 512), layer))


def test_rotation_gelu_and_loss(ops, batch):
    cuda, formula, _ = ops
    tokens, positions = ROWS * BLOCK, batch["position_ids"]
    qkv, h, d = random(tokens, 4, 3, 128), random(tokens, 2048), random(tokens, 2048)
    parts = [random(tokens, 4, 128) for _ in range(3)]
    logits, results = random(tokens, 30080), []
    for side in (cuda, formula):
        turned, back, out, dh = qkv.clone(), torch.empty_like(qkv), torch.empty_like(h), d.clone()
        side.rotate(turned, positions)
        side.unrotate(*parts, positions, back)
        side.gelu(h, out)
        side.gelu_backward(h, dh)
        work = logits.clone()
        nll = side.cross_entropy(work, batch["labels"].flatten(), batch["factor"])
        results.append([turned, back, out, dh, nll, work])
    for got, wanted in zip(*results, strict=True):
        close(got, wanted)
    assert torch.equal(results[0][4] == 0, batch["labels"].flatten() < 0)


def test_embedding_is_read_from_pinned_memory(ops, batch):
    table = torch.randn(30080, 512).to(half()).pin_memory()
    out = poisoned(ROWS * BLOCK, 512)
    ops[0].embed(table, batch["input_ids"], out)
    torch.cuda.synchronize()
    assert torch.equal(out.cpu(), table[batch["input_ids"].flatten().cpu()])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_is_exact_and_not_the_slow_formula(head_dim, batch):
    attention = choose_attention(4, head_dim, half(), CUDA)
    print("attention", head_dim, attention.name)
    assert type(attention) is not FormulaAttention
    q, k, v, gradient = (random(ROWS * BLOCK, 4, head_dim) for _ in range(4))
    documents = Documents.find(batch["position_ids"], 9)
    out, saved = attention.forward(q, k, v, documents)
    exact = [part.double() for part in (q, k, v, gradient)]
    formula = FormulaAttention()
    close(out, formula.forward(*exact[:3], documents)[0])
    wanted = formula.backward(exact[3], *exact[:3], None, [], documents)
    for got, want in zip(attention.backward(gradient, q, k, v, out, saved, documents), wanted, strict=True):
        close(got, want)


def gradients(step, model, batch):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    loss = float(step.train(batch))
    return loss, torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.requires_grad])


def test_step_equals_autograd_and_its_graph(model, batch):
    for layer in model.get_base_model().gpt_neox.layers:
        layer.attention.query_key_value.lora_dropout["default"].p = 0.0
    theirs = gradients(AutogradStep(model), model, batch)
    for recompute in (0, 2):
        step = NeoxStep(model, recompute, max_documents=4)
        ours = gradients(step, model, batch)
        assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
        close(ours[1], theirs[1], 0.03)
        captured = CapturedStep(step, CUDA)
        runs = [gradients(captured, model, batch) for _ in range(3)]
        assert captured.captured, captured.path
        close(runs[2][1], ours[1], 0.01)
        assert runs[2][0] == pytest.approx(ours[0], rel=1e-5)
    for layer in model.get_base_model().gpt_neox.layers:
        layer.attention.query_key_value.lora_dropout["default"].p = 0.05


def test_graph_draws_new_masks_for_new_keys(model, batch):
    step = CapturedStep(NeoxStep(model, 0, max_documents=4), CUDA)
    losses = [float(step.train({**batch, "keys": batch["keys"] + i})) for i in (0, 0, 0, 1, 2)]
    assert losses[1] == losses[2] and len(set(losses[2:])) == 3


def test_autograd_step_is_captured_too(model, batch):
    restore_embedding(model)  # 앞의 테스트들이 RAM에 둔 embedding은 graph에 찍히지 않는다
    step = CapturedStep(AutogradStep(model), CUDA)
    for _ in range(3):
        gradients(step, model, batch)
    assert step.captured, step.path


def test_training_gives_the_model_back_as_it_was(model, batch):
    blocks = [{name: batch[name][row].cpu() for name in ("input_ids", "labels", "position_ids")} for row in range(ROWS)]
    weights = ReplicatedWeights(model, ALONE, fp16=half() is torch.float16)
    step = open_step(model, MemoryPlan(1), blocks, blocks, CUDA, weights.gradients, print)
    loop = Loop(step, weights, Recipe(4, 0, 4, 1, ROWS, learning_rate=1e-3, seed=42), blocks, blocks, group=ALONE,
                device=CUDA)
    loop.run()
    embedding = model.get_input_embeddings()
    assert type(embedding) is torch.nn.Embedding and embedding.weight.is_cuda
    assert loop.evaluate() > 0
