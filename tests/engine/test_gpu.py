"""GPU가 있으면 `pytest -m gpu tests/engine/test_gpu.py`로 확인한다: 학습의 커널, attention, 찍은 micro-step, 학습기."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import families
from standin import SHAPES
from standin import add_lora as add_neox_lora
from standin import build as build_neox
from test_train_families import FAMILIES, add_lora, build
from train_ops_check import op_errors

from utils.engine.attention import Documents, FormulaAttention, choose_attention
from utils.engine.families import describe
from utils.engine.train_kernels import CudaOps
from utils.engine.train_layers import restore_embedding
from utils.engine.train_ops import TorchOps
from utils.engine.train_step import TrainStep
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


def random(*shape):
    return torch.randn(*shape, device=CUDA, dtype=half())


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    positions = torch.stack([torch.cat([torch.arange(70), torch.arange(BLOCK - 70)]),
                             torch.cat([torch.arange(5), torch.arange(100), torch.arange(BLOCK - 105)])])
    tokens = torch.randint(0, 304, (ROWS, BLOCK), generator=generator)
    labels = tokens.masked_fill(positions == 0, -100)
    values = {"input_ids": tokens, "labels": labels, "position_ids": positions, "factor": torch.tensor(0.01),
              "keys": torch.tensor([[5, -7], [11, 13]], dtype=torch.int32)}
    return {name: value.to(CUDA) for name, value in values.items()}


def prepare(name: str, rank: int = 8, dropout: float = 0.25):
    """NF4로 양자화하고 모든 선형층에 LoRA를 붙인 작은 모델."""
    model = build(name, hidden_size=128, intermediate_size=256, vocab_size=304, max_position_embeddings=256)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.5)
    model = families.quantize(model.to(half()).cuda(), "nf4", True)
    model = add_lora(model, describe(model).linears(), dropout, rank)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() * 0.3
            parameter.grad = torch.zeros_like(parameter)
    return model


def gradients(step, model, batch):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    loss = float(step.train(batch))
    return loss, torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_equal_the_formulas(name, batch):
    model = prepare(name, rank=11 if name == "qwen3" else 8)
    step = TrainStep(model, 1, 4)
    assert type(step.ops) is CudaOps and type(step.attention) is not FormulaAttention
    errors = op_errors(step.ops, step, half(), CUDA)
    assert max(errors.values()) < 0.006, errors
    ours = gradients(step, model, batch)
    step.ops = TorchOps(step.family)
    theirs = gradients(step, model, batch)
    assert ours[0] == pytest.approx(theirs[0], rel=2e-3)
    close(ours[1], theirs[1], 0.03)


@pytest.mark.parametrize("heads, kv_heads, head_dim, window", [(4, 4, 64, 0), (4, 2, 128, 0), (4, 1, 256, 40)])
def test_attention_is_exact_and_not_the_slow_formula(heads, kv_heads, head_dim, window, batch):
    scale = head_dim ** -0.5
    attention = choose_attention(heads, kv_heads, head_dim, scale, window > 0, half(), CUDA)
    print("attention", head_dim, attention.name)
    assert type(attention) is not FormulaAttention
    q, gradient = (random(ROWS * BLOCK, heads, head_dim) for _ in range(2))
    k, v = (random(ROWS * BLOCK, kv_heads, head_dim) for _ in range(2))
    documents = Documents.find(batch["position_ids"], 9)
    out, saved = attention.forward(q, k, v, documents, window)
    exact = [part.double() for part in (q, k, v, gradient)]
    formula = FormulaAttention(scale)
    close(out, formula.forward(*exact[:3], documents, window)[0])
    wanted = formula.backward(exact[3], *exact[:3], None, [], documents, window)
    for got, want in zip(attention.backward(gradient, q, k, v, out, saved, documents, window), wanted, strict=True):
        close(got, want)


def test_exact_attention_gives_the_same_bits_every_time():
    q, k, v, gradient = (random(1024, 16, 128) for _ in range(4))
    documents = Documents.find(torch.arange(1024, device=CUDA)[None], 2)
    attention = choose_attention(16, 16, 128, 128 ** -0.5, False, half(), CUDA, exact=True)
    out, saved = attention.forward(q, k, v, documents)
    first, *others = ([part.clone() for part in attention.backward(gradient, q, k, v, out, saved, documents)]
                      for _ in range(6))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "qwen3"])
def test_step_equals_autograd_and_its_graph(name, batch):
    model = prepare(name, dropout=0.0)
    theirs = gradients(AutogradStep(model), model, batch)
    for recompute in (0, 2):
        step = TrainStep(model, recompute, max_documents=4)
        ours = gradients(step, model, batch)
        assert ours[0] == pytest.approx(theirs[0], rel=2e-3)
        close(ours[1], theirs[1], 0.05)
        captured = CapturedStep(step, CUDA)
        runs = [gradients(captured, model, batch) for _ in range(3)]
        assert captured.has_captured(batch), captured.path
        close(runs[2][1], ours[1], 0.01)
        assert runs[2][0] == pytest.approx(ours[0], rel=1e-5)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "qwen3", "gemma3_text"])
def test_one_document_a_block_equals_autograd(name):
    """끝을 채운 문서 하나. 여러 문서의 것과 따로 찍고, LoRA가 out에도 있어 attention의 gradient의 행이 넓다."""
    model = prepare(name, dropout=0.0)
    positions = torch.cat([torch.arange(BLOCK - 20), torch.arange(20)]).expand(ROWS, BLOCK).contiguous()
    tokens = torch.randint(0, 304, (ROWS, BLOCK), generator=torch.Generator().manual_seed(1))
    labels = tokens.masked_fill(positions == 0, -100)
    labels[:, BLOCK - 20:] = -100
    alone = {"input_ids": tokens, "labels": labels, "position_ids": positions, "factor": torch.tensor(0.01),
             "keys": torch.zeros(ROWS, 2, dtype=torch.int32)}
    packed = {**alone, "labels": tokens.masked_fill(positions == 0, -100)}
    for recompute in (0, 2):
        step = CapturedStep(TrainStep(model, recompute, max_documents=4), CUDA)
        if step.step.single is None:
            pytest.skip("이 GPU에서는 문서가 하나여도 같은 attention을 쓴다")
        for given, single in ((alone, True), (packed, False)):
            assert step.step.options(given) == {"single": single}
            theirs = gradients(AutogradStep(model), model, {key: value.to(CUDA) for key, value in given.items()})
            for _ in range(3):  # 워밍업, 찍기, 되풀이
                ours = gradients(step, model, given)
                assert ours[0] == pytest.approx(theirs[0], rel=2e-3)
                close(ours[1], theirs[1], 0.05)
            assert step.has_captured(given), step.path
        step.release()


def test_graph_draws_new_masks_for_new_keys(batch):
    step = CapturedStep(TrainStep(prepare("gemma3_text"), 0, max_documents=4), CUDA)
    losses = [float(step.train({**batch, "keys": batch["keys"] + i})) for i in (0, 0, 0, 1, 2)]
    assert losses[1] == losses[2] and len(set(losses[2:])) == 3


@pytest.fixture(scope="module")
def neox():
    SHAPES["tiny"] = {"num_hidden_layers": 3, "hidden_size": 512, "num_attention_heads": 4, "rotary_pct": 0.5}
    return add_neox_lora(build_neox("tiny", half(), True, half()), up=0.05)


def test_dequantize_equals_bitsandbytes(neox):
    from bitsandbytes.functional import dequantize_4bit

    step = TrainStep(neox)
    out = torch.full((4 * 512 * 520,), torch.nan, device=CUDA, dtype=half())
    for projection in step.layers[1].projections()[1:]:  # LoRA가 없어 끝의 칸이 없다
        linear = projection.linears[0]
        wanted = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        assert torch.equal(step.ops.weight(projection, out), wanted)
    restore_embedding(neox)


def test_embedding_is_read_from_pinned_memory(neox, batch):
    step = TrainStep(neox)
    table = torch.randn(30080, 512).to(half()).pin_memory()
    out = torch.empty(ROWS * BLOCK, 512, device=CUDA, dtype=half())
    step.ops.embed(table, batch["input_ids"], out)
    torch.cuda.synchronize()
    assert torch.equal(out.cpu(), table[batch["input_ids"].flatten().cpu()])
    restore_embedding(neox)


def test_autograd_step_is_captured_too(neox, batch):
    step = CapturedStep(AutogradStep(neox), CUDA)
    for _ in range(3):
        gradients(step, neox, batch)
    assert step.has_captured(batch), step.path


def test_training_gives_the_model_back_as_it_was(neox, batch):
    blocks = [{name: batch[name][row].cpu() for name in ("input_ids", "labels", "position_ids")} for row in range(ROWS)]
    weights = ReplicatedWeights(neox, ALONE, fp16=half() is torch.float16)
    step = open_step(neox, MemoryPlan(1), blocks, blocks, CUDA, weights.gradients, print)
    loop = Loop(step, weights, Recipe(4, 0, 4, 1, ROWS, learning_rate=1e-3, seed=42), blocks, blocks, group=ALONE,
                device=CUDA)
    loop.run()
    embedding = neox.get_input_embeddings()
    assert type(embedding) is torch.nn.Embedding and embedding.weight.is_cuda
    assert loop.evaluate()["eval_loss"] > 0
