"""손으로 쓴 micro-step의 조각들: 4비트 GPT-NeoX, dropout의 난수, attention, CPU에 둔 embedding."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from utils.data.blocks import document_mask
from utils.engine.attention import DocumentAttention, Documents, FormulaAttention
from utils.engine.families import describe
from utils.engine.family import Family
from utils.engine.train_layers import SITES, HostEmbedding, restore_embedding
from utils.engine.train_ops import drop_scale, drop_threshold
from utils.engine.train_step import TrainStep
from utils.model.loss import cross_entropy_
from utils.train.autograd_step import AutogradStep

ROWS, BLOCK = 2, 48


class SameDrop(nn.Module):
    """HF의 LoRA dropout 자리에 놓여, 손으로 쓴 길과 같은 난수로 버린다."""

    def __init__(self, site: int, keys: torch.Tensor, p: float):
        super().__init__()
        self.site, self.keys, self.p = site, keys, p

    def forward(self, x):
        flat = x.flatten(0, 1)
        return (flat * drop_scale(self.keys, *flat.shape, self.site, self.p)).view_as(x).float()


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
    assert isinstance(describe(model, training=True), Family)
    ours = run(TrainStep(model, recompute, max_documents=3), model, batch)
    for index, layer in enumerate(model.get_base_model().gpt_neox.layers):
        if dropout:
            layer.attention.query_key_value.lora_dropout["default"] = SameDrop(index * SITES, batch["keys"], dropout)
    theirs = run(AutogradStep(model), model, batch)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    for name, gradient in theirs[1].items():
        assert gradient.norm() > 0
        torch.testing.assert_close(ours[1][name], gradient, rtol=2e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


def test_recomputed_layers_give_the_same_bits(tiny_neox):
    model, batch = make_model(tiny_neox, 0.2), make_batch()
    kept, again = (run(TrainStep(model, n, 3), model, batch) for n in (0, 1))
    assert kept[0] == again[0]
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


def test_evaluation_equals_the_unpacked_model(tiny_neox):
    model, batch = make_model(tiny_neox), make_batch()
    total = float(TrainStep(model, 0, 3).evaluate(batch))
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
    wanted, before = float(TrainStep(model, 0, 3).evaluate(batch)), body.embed_in.weight.clone()
    body.embed_in = HostEmbedding(body.embed_in.weight)
    assert float(TrainStep(model, 0, 3).evaluate(batch)) == wanted
    assert torch.equal(body.embed_in(batch["input_ids"]), before[batch["input_ids"]])
    restore_embedding(model)
    assert type(body.embed_in) is nn.Embedding and torch.equal(body.embed_in.weight, before)


def test_documents_are_found_without_reading_values():
    batch = make_batch()
    offsets = Documents.find(batch["position_ids"], 7).offsets.tolist()
    assert offsets == [0, 11, 48, 78, 83, 96, 96, 96]


@pytest.mark.parametrize("kv_heads, window", [(4, 0), (2, 0), (1, 6)])
@pytest.mark.parametrize("kind", [FormulaAttention, DocumentAttention])
def test_attention_formula_equals_autograd(kind, kv_heads, window):
    batch, tokens, scale = make_batch(), ROWS * BLOCK, 0.4
    torch.manual_seed(3)
    q, gradient = (torch.randn(tokens, 4, 8, requires_grad=True) for _ in range(2))
    k, v = (torch.randn(tokens, kv_heads, 8, requires_grad=True) for _ in range(2))
    documents, form = Documents.find(batch["position_ids"], 7), kind(scale)
    parts = [part.view(ROWS, BLOCK, -1, 8).transpose(1, 2) for part in (q, k, v)]
    mask = document_mask(batch["position_ids"])
    mask = mask.triu(1 - window) if window else mask
    wanted = nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=True)
    wanted = wanted.transpose(1, 2).reshape(tokens, 4, 8)
    expected = torch.autograd.grad(wanted, (q, k, v), gradient)
    with torch.no_grad():
        out, saved = form.forward(q, k, v, documents, window)
        torch.testing.assert_close(out, wanted)
        found = form.backward(gradient, q, k, v, out, saved, documents, window)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_cross_entropy_equals_torch():
    logits = torch.randn(6, 40, requires_grad=True)
    targets = torch.tensor([1, -100, 3, 39, 0, -100])
    nll = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    (expected,) = torch.autograd.grad(nll.sum() * 0.5, logits)
    work = logits.detach().clone()
    torch.testing.assert_close(cross_entropy_(work, targets, torch.tensor(0.5)), nll)
    torch.testing.assert_close(work, expected)
