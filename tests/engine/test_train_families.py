"""모든 구조의 손으로 쓴 micro-step은 transformers와 peft의 층과 같은 손실과 LoRA gradient를 낸다."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from utils.engine.families import describe, layer_modules, unwrap
from utils.engine.train_layers import SITES
from utils.engine.train_ops import drop_scale
from utils.engine.train_step import TrainStep

BLOCK, ROWS = 40, 2
SIZES = {"vocab_size": 203, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None,
         "pad_token_id": None}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
SCALED = {"attention_multiplier": 0.2, "residual_multiplier": 0.6, "embedding_multiplier": 3.0, "logits_scaling": 2.5}
LLAMA3 = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 7}
# 이름 -> 설정. 저마다의 드문 스위치를 모두 켠다
FAMILIES = {
    "gpt_neox": {"rotary_pct": 0.5, "hidden_size": 64},
    "gpt_neox-sequential": {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.25,
                            "hidden_act": "gelu_new", "hidden_size": 64, "tie_word_embeddings": True},
    "llama": GROUPED | LLAMA3 | {"attention_bias": True, "mlp_bias": True},
    "llama-linear": GROUPED | {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "mistral": GROUPED | {"sliding_window": 9},
    "qwen2": GROUPED | {"tie_word_embeddings": True},
    "qwen2-window": GROUPED | MIXED | {"use_sliding_window": True},
    "qwen3": GROUPED | {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 24},
    "gemma": GROUPED | {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "gemma3_text": GROUPED | MIXED | {"query_pre_attn_scalar": 40, "final_logit_softcapping": 2.0,
                                      "num_key_value_heads": 1},
    "exaone4": GROUPED | MIXED | {"sliding_window_pattern": 2},
    "exaone4-full": GROUPED | {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "hyperclovax": GROUPED | SCALED | {"use_post_norm": True, "attention_bias": True, "mlp_bias": True},
    "hyperclovax-plain": GROUPED | {"use_post_norm": False},
    "granite": GROUPED | SCALED | {"attention_bias": True, "mlp_bias": True},
}


class SameDrop(nn.Module):
    """PEFT의 dropout 자리에 놓여, 엔진과 같은 난수로 버린다. 문서를 따로 계산해도 블록 안의 자리로 버린다."""

    def __init__(self, site: int, p: float, place: dict):
        super().__init__()
        self.site, self.p, self.place = site, p, place

    def forward(self, x):
        keys = self.place["keys"][self.place["row"]:self.place["row"] + 1]
        whole = drop_scale(keys, BLOCK, x.shape[-1], self.site, self.p)
        return x * whole[self.place["start"]:self.place["start"] + x.shape[1]].to(x.dtype)


def build(name: str, **changes) -> nn.Module:
    """norm, bias, 가중치가 모두 무작위인 작은 진짜 모델."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(name.split("-")[0], **(SIZES | FAMILIES[name] | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def add_lora(model: nn.Module, targets, dropout: float = 0.0, rank: int = 3) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    tuned = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout,
                                             target_modules=list(targets), task_type="CAUSAL_LM"))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
            parameter.grad = torch.zeros_like(parameter)
    return tuned


def make_batch() -> dict:
    torch.manual_seed(2)
    positions = torch.stack([torch.cat([torch.arange(11), torch.arange(BLOCK - 11)]),
                             torch.cat([torch.arange(20), torch.arange(4), torch.arange(BLOCK - 24)])])
    tokens = torch.randint(0, SIZES["vocab_size"], (ROWS, BLOCK))
    labels = torch.where((positions == 0) | (torch.rand(ROWS, BLOCK) < 0.2), -100, tokens)
    return {"input_ids": tokens, "labels": labels, "position_ids": positions, "factor": torch.tensor(0.03),
            "keys": torch.tensor([[5, -7], [11, 13]], dtype=torch.int32)}


def separately(model: nn.Module, batch: dict, place: dict) -> torch.Tensor:
    """문서를 하나씩, 묶지도 나누지도 않고 transformers로 계산한 손실."""
    total = torch.zeros(())
    for row in range(ROWS):
        starts = [*(batch["position_ids"][row] == 0).nonzero()[:, 0].tolist(), BLOCK]
        for start, end in pairwise(starts):
            place.update(row=row, start=start)
            logits = model(input_ids=batch["input_ids"][row:row + 1, start:end], use_cache=False).logits[0, :-1]
            labels = batch["labels"][row, start + 1:end]
            total = total + nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total * batch["factor"]


def compare(model: nn.Module, batch: dict, dropout: float, recompute: int) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    step = TrainStep(model, recompute, max_documents=3)
    loss = step.train(batch)
    ours = {name: p.grad.clone() for name, p in trained.items()}
    place = {"keys": batch["keys"], "row": 0, "start": 0}
    base, family = model.get_base_model(), describe(model)
    for index, layer in enumerate(layer_modules(base, family)):
        for slot, module in enumerate(m for group in layer.linears() for m in group):
            if module is not unwrap(module) and dropout:
                module.lora_dropout["default"] = SameDrop(index * SITES + slot, dropout, place)
    wanted = separately(model, batch, place)
    expected = dict(zip(trained, torch.autograd.grad(wanted, list(trained.values())), strict=True))
    assert float(loss) == pytest.approx(wanted.item(), rel=2e-6)
    for name, gradient in expected.items():
        error = float((ours[name] - gradient).norm() / gradient.norm())
        assert gradient.norm() > 0 and error < 1e-4, (name, error)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_transformers_on_separate_documents(name):
    model = build(name)
    family = describe(model)
    assert not isinstance(family, str), family
    assert describe(model.config.to_dict()) == family == describe(model.config)
    compare(add_lora(model, family.linears(), 0.3), make_batch(), 0.3, 1)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "qwen3", "hyperclovax"])
def test_lora_may_sit_on_any_set_of_linear_layers(name):
    family = describe(build(name))
    names = list(family.linears())
    for targets in ([names[0]], [names[-1]], names[1:3], [names[0], names[-1]]):
        compare(add_lora(build(name), targets, 0.2, rank=9), make_batch(), 0.2, 2)


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3_text", "granite"])
def test_recomputation_gives_the_same_bits(name):
    model = build(name)
    model = add_lora(model, describe(model).linears(), 0.2)
    results = []
    for recompute in (0, 1, 2):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad.zero_()
        loss = TrainStep(model, recompute, 3).train(make_batch())
        results.append([loss, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_evaluation_has_no_dropout():
    model = add_lora(build("qwen3"), ["q_proj", "down_proj"], 0.5)
    batch = make_batch()
    plain = copy.deepcopy(model).eval()
    wanted = separately(plain, batch, {}) / batch["factor"]
    assert float(TrainStep(model, 0, 3).evaluate(batch)) == pytest.approx(float(wanted), rel=1e-5)


def test_unknown_models_are_refused_in_one_line():
    from transformers import AutoConfig, AutoModelForCausalLM

    qwen = build("qwen3")
    assert describe({"model_type": "mixtral"}) == "모르는 구조(mixtral)"
    dynamic = SIZES | GROUPED | {"model_type": "llama", "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    assert "rotary" in describe(dynamic)
    assert "활성" in describe(SIZES | GROUPED | {"model_type": "llama", "hidden_act": "relu"})
    dropping = AutoConfig.for_model("llama", **(SIZES | GROUPED), attention_dropout=0.1)
    assert "dropout" in describe(AutoModelForCausalLM.from_config(dropping), training=True)
    assert not isinstance(describe(dropping), str)  # 답을 만드는 데는 상관없다
    assert "LoRA" in describe(add_lora(build("llama"), ["q_proj", "embed_tokens"]), training=True)
    assert "배우는" in describe(qwen, training=True)
