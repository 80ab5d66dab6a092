"""손으로 쓴 GPT-NeoX의 micro-step은 HF의 층과 같은 손실과 gradient를 낸다. 커널은 모든 세대에서 컴파일된다."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from utils.data.blocks import document_mask
from utils.engine.attention import Documents, FormulaAttention
from utils.engine.cuda import CompileError, compile_to_cubin
from utils.engine.train_layers import HostEmbedding, restore_embedding, why_not
from utils.engine.train_ops import SOURCE, TorchOps, drop_scale, drop_threshold
from utils.engine.train_step import NeoxStep
from utils.model.loss import cross_entropy_
from utils.train.autograd_step import AutogradStep

ROWS, BLOCK = 2, 48


class SameDrop(nn.Module):
    """HF의 LoRA dropout 자리에 놓여, 손으로 쓴 길과 같은 난수로 버린다."""

    def __init__(self, layer: int, keys: torch.Tensor, p: float):
        super().__init__()
        self.layer, self.keys, self.p = layer, keys, p

    def forward(self, x):
        flat = x.flatten(0, 1)
        return (flat * drop_scale(self.keys, *flat.shape, self.layer, self.p)).view_as(x).float()


def make_model(folder, dropout: float = 0.0, quantize: bool = False, rank: int = 3):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from utils.model.loader import Device, load_base

    if quantize:
        base = load_base(folder, Device(torch.device("cpu"), torch.float32, ""), "4bit")
    else:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=6, lora_dropout=dropout,
                                            target_modules=["query_key_value"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
        elif "bias" in name or "norm" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return model


def make_batch(vocab: int = 300) -> dict:
    torch.manual_seed(2)
    positions = torch.stack([torch.cat([torch.arange(11), torch.arange(BLOCK - 11)]),
                             torch.cat([torch.arange(30), torch.arange(5), torch.arange(BLOCK - 35)])])
    tokens = torch.randint(0, vocab, (ROWS, BLOCK))
    labels = torch.where((positions == 0) | (torch.rand(ROWS, BLOCK) < 0.2), -100, tokens)
    return {"input_ids": tokens, "labels": labels, "position_ids": positions, "factor": torch.tensor(0.03),
            "keys": torch.tensor([[5, -7], [11, 13]], dtype=torch.int32)}


def gradients(model) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def run(step, model, batch) -> tuple[float, dict]:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad.zero_()
    loss = float(step.train(batch))
    return loss, gradients(model)


@pytest.mark.parametrize("quantize, dropout, recompute", [(False, 0, 0), (False, 0.3, 0), (False, 0.3, 1),
                                                          (True, 0.1, 1)])
def test_loss_and_gradients_equal_the_hf_layers(tiny_neox, quantize, dropout, recompute):
    model, batch = make_model(tiny_neox, dropout, quantize), make_batch()
    assert why_not(model) is None
    ours = run(NeoxStep(model, recompute, max_documents=3), model, batch)
    for index, layer in enumerate(model.get_base_model().gpt_neox.layers):
        if dropout:
            layer.attention.query_key_value.lora_dropout["default"] = SameDrop(index, batch["keys"], dropout)
    theirs = run(AutogradStep(model), model, batch)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    for name, gradient in theirs[1].items():
        assert gradient.norm() > 0
        torch.testing.assert_close(ours[1][name], gradient, rtol=2e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


def test_recomputed_layers_give_the_same_bits(tiny_neox):
    model, batch = make_model(tiny_neox, 0.2), make_batch()
    kept, again = (run(NeoxStep(model, n, 3), model, batch) for n in (0, 1))
    assert kept[0] == again[0]
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


def test_evaluation_equals_the_unpacked_model(tiny_neox):
    model, batch = make_model(tiny_neox), make_batch()
    total = float(NeoxStep(model, 0, 3).evaluate(batch))
    expected = 0.0
    for row in range(ROWS):
        starts = [*(batch["position_ids"][row] == 0).nonzero()[:, 0].tolist(), BLOCK]
        for start, end in pairwise(starts):
            ids, labels = batch["input_ids"][row:row + 1, start:end], batch["labels"][row, start + 1:end]
            logits = model(input_ids=ids).logits[0, :-1]
            nll = nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            expected += float(nll.nan_to_num())
    assert total == pytest.approx(expected, rel=1e-6)


def test_masks_do_not_depend_on_how_the_batch_is_split():
    keys = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    whole = drop_scale(keys, 2 * 16, 64, 3, 0.25)
    halves = [drop_scale(keys[row:row + 1], 16, 64, 3, 0.25) for row in (0, 1)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(halves[0], halves[1])
    assert not torch.equal(whole, drop_scale(keys, 2 * 16, 64, 4, 0.25))


def test_masks_drop_the_asked_share_without_bias():
    scale = drop_scale(torch.tensor([[9, 9]], dtype=torch.int32), 2048, 512, 0, 0.05)
    assert float((scale == 0).float().mean()) == pytest.approx(0.05, abs=0.001)
    assert float(scale.mean()) == pytest.approx(1, abs=0.002)
    assert drop_threshold(0.0) == (0, 1.0)


def test_embedding_on_the_host_gives_the_same_rows_and_comes_back(tiny_neox):
    model, batch = make_model(tiny_neox), make_batch()
    body = model.get_base_model().gpt_neox
    wanted, before = float(NeoxStep(model, 0, 3).evaluate(batch)), body.embed_in.weight.clone()
    body.embed_in = HostEmbedding(body.embed_in.weight)
    assert float(NeoxStep(model, 0, 3).evaluate(batch)) == wanted
    assert torch.equal(body.embed_in(batch["input_ids"]), before[batch["input_ids"]])
    restore_embedding(model)
    assert type(body.embed_in) is nn.Embedding and torch.equal(body.embed_in.weight, before)


def test_documents_are_found_without_reading_values():
    batch = make_batch()
    offsets = Documents.find(batch["position_ids"], 7).offsets.tolist()
    assert offsets == [0, 11, 48, 78, 83, 96, 96, 96]


def test_attention_formula_equals_autograd():
    batch, heads = make_batch(), (ROWS * BLOCK, 2, 8)
    torch.manual_seed(3)
    q, k, v, gradient = (torch.randn(heads, requires_grad=True) for _ in range(4))
    documents = Documents.find(batch["position_ids"], 7)
    form = FormulaAttention()
    parts = [part.view(ROWS, BLOCK, 2, 8).transpose(1, 2) for part in (q, k, v)]
    wanted = nn.functional.scaled_dot_product_attention(*parts, attn_mask=document_mask(batch["position_ids"]))
    wanted = wanted.transpose(1, 2).reshape(heads)
    expected = torch.autograd.grad(wanted, (q, k, v), gradient)
    out, saved = form.forward(q, k, v, documents)
    torch.testing.assert_close(out, wanted)
    for got, want in zip(form.backward(gradient, q, k, v, out, saved, documents), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_rotation_is_undone():
    ops = TorchOps(torch.cat([torch.randn(9, 8).cos(), torch.zeros(9, 8)], -1))
    angles = torch.randn(9, 8)
    ops.table = torch.cat([angles.cos(), angles.sin()], -1)
    qkv, positions = torch.randn(5, 2, 3, 24), torch.tensor([[0, 1, 2, 0, 8]])
    turned, back = qkv.clone(), torch.empty_like(qkv)
    ops.rotate(turned, positions)
    assert not torch.allclose(turned, qkv)
    ops.unrotate(*turned.unbind(2), positions, back)
    torch.testing.assert_close(back, qkv)


def test_cross_entropy_equals_torch():
    logits = torch.randn(6, 40, requires_grad=True)
    targets = torch.tensor([1, -100, 3, 39, 0, -100])
    nll = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    (expected,) = torch.autograd.grad(nll.sum() * 0.5, logits)
    work = logits.detach().clone()
    torch.testing.assert_close(cross_entropy_(work, targets, torch.tensor(0.5)), nll)
    torch.testing.assert_close(work, expected)


def test_other_models_are_refused_with_a_reason(tiny_neox):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=2))
    assert "llama" in why_not(llama)
    base = AutoModelForCausalLM.from_pretrained(tiny_neox, dtype=torch.float32)
    assert "LoRA" in why_not(get_peft_model(base, LoraConfig(target_modules=["query_key_value", "dense"])))


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("hidden, heads, rotary, rank", [(2048, 16, 64, 8), (5120, 40, 64, 5)])
def test_kernels_compile_for_every_generation(capability, hidden, heads, rotary, rank):
    constants = {"HIDDEN": hidden, "HEADS": heads, "HEAD_DIM": hidden // heads, "ROTARY": rotary, "RANK": rank,
                 "PADDED_RANK": -(-rank // 8) * 8, "BF16": int(capability >= (8, 0))}
    try:
        assert compile_to_cubin(SOURCE.read_text(encoding="utf-8"), capability, constants)
    except CompileError as error:
        if "NVRTC" not in str(error):
            raise
        pytest.skip(str(error))
