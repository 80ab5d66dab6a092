"""학습하는 계산이 모델의 계산과 같음을, 그리고 다르면 시작할 때 드러남을 확인한다."""

import contextlib
import io
import itertools
from dataclasses import replace

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from utils import console
from utils.data.encoder import require_known_ids
from utils.engine.attention import DocumentAttention
from utils.engine.train_step import TrainStep
from utils.errors import UsageError
from utils.model.loss import Head
from utils.train import parity, truth
from utils.train.autograd_step import AutogradStep, autograd_ways
from utils.train.dropout import without_dropout

VOCAB, BLOCK = 320, 64
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128}
SMALL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ATTENTION = ["q_proj", "k_proj", "v_proj"]
# 이름 -> (구조, 설정, LoRA를 붙일 층, 걸어야 하는 길)
KINDS = {
    "llama": ("llama", {}, ATTENTION, "조각"),
    "qwen3": ("qwen3", {}, ATTENTION, "조각"),
    "olmo2": ("olmo2", {}, ATTENTION, "조각"),
    "phi(출력 행렬의 bias)": ("phi", {"resid_pdrop": 0.1}, ATTENTION, "조각"),
    "granite(logits를 나눈다)": ("granite", {"logits_scaling": 13.0, "residual_multiplier": 0.22,
                                        "embedding_multiplier": 12.0, "attention_multiplier": 0.1}, ATTENTION, "조각"),
    "hyperclovax(logits에 곱한다)": ("hyperclovax", {"logits_scaling": 0.125, "embedding_multiplier": 10.0},
                                ATTENTION, "조각"),
    "cohere": ("cohere", {"logit_scale": 0.0625}, ATTENTION, "조각"),
    "cohere2(창)": ("cohere2", {"logit_scale": 0.25, "sliding_window": 8}, ATTENTION, "조각"),
    "gemma2(부드러운 한계와 창)": ("gemma2", {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 1.0,
                                     "sliding_window": 8}, ATTENTION, "조각"),
    "gemma3(창)": ("gemma3_text", {"sliding_window": 8}, ATTENTION, "조각"),
    "mistral(창)": ("mistral", {"sliding_window": 8}, ATTENTION, "조각"),
    "falcon_h1(상태)": ("falcon_h1", {"lm_head_multiplier": 0.3, "embedding_multiplier": 5.0, "mamba_d_ssm": 32,
                                    "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8}, ATTENTION, "따로"),
    "bloom(위치 번호가 없다)": ("bloom", {"hidden_dropout": 0.1}, ["query_key_value"], "따로"),
    "gpt2": ("gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128}, ["c_attn"], "조각"),
    "gpt_neo(층마다 다른 창)": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8,
                                   "num_layers": 2}, ATTENTION, ""),
    "opt": ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64, "layerdrop": 0.1}, ATTENTION, ""),
    "mamba(상태)": ("mamba", {"state_size": 4}, ["x_proj"], "따로"),
    "mixtral(전문가)": ("mixtral", {"num_local_experts": 4}, ATTENTION, "조각"),
    "qwen3_moe(전문가)": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
                       ATTENTION, "조각"),
    "gpt_oss(전문가와 sink)": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
                           ATTENTION, "조각"),
}


class Blocks(torch.utils.data.Dataset):
    """길이가 다른 문서 셋과 채운 자리로 된 블록들. 문서는 창(8)보다 길다."""

    max_documents = 4

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict:
        if index >= 3:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        lengths = [24 + index, 14, 12, BLOCK - 50 - index]
        positions = torch.cat([torch.arange(length) for length in lengths])
        tokens = torch.randint(1, VOCAB, (BLOCK,), generator=generator)
        labels = tokens.masked_fill((positions == 0) | (torch.arange(BLOCK) >= 50 + index), -100)
        return {"input_ids": tokens, "labels": labels, "position_ids": positions}


def build(kind: str, changes: dict, targets: list[str], dropout: float = 0.2, **extra):
    """무작위 가중치의 PEFT 모델. 값이 커야 한계와 배율이 손실에 드러난다."""
    sizes = {} if kind == "gpt2" else SIZES
    config = AutoConfig.for_model(kind, **{**SMALL, **sizes, **changes})
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, **extra)
    for parameter in base.parameters():
        parameter.data.mul_(2.0) if parameter.dim() > 1 else None
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM",
                                            fan_in_fan_out=kind == "gpt2"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return model


def oracle(model, block: dict) -> tuple[float, torch.Tensor]:
    """transformers와 peft가 문서마다 따로 낸 손실의 합과 gradient."""
    model.eval()
    starts = [*(block["position_ids"] == 0).nonzero()[:, 0].tolist(), BLOCK]
    total = 0.0
    for start, end in itertools.pairwise(starts):
        labels = block["labels"][start + 1:end]
        if (labels >= 0).any():
            logits = model(input_ids=block["input_ids"][None, start:end]).logits[0, :-1]
            total = total + nn.functional.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=-100)
    total.backward()
    return float(total.detach()), flat(parity.take_gradients(model))


def flat(gradients: dict) -> torch.Tensor:
    return torch.cat([value.flatten() for value in gradients.values()])


def chosen(model, ways=None) -> tuple:
    """(고른 micro-step, 고르지 않은 길마다의 이유). 이유는 --verbose True일 때 보이는 줄이다."""
    console.show_details(True)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as details:
            step = parity.choose_step(ways or autograd_ways(model, BLOCK), model, Blocks(), 4, torch.device("cpu"), len)
    finally:
        console.show_details(False)
    return step, details.getvalue().splitlines()


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_those_of_the_model(name):
    kind, changes, targets, path = KINDS[name]
    model = build(kind, changes, targets)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step, said = chosen(model)
    assert path in step.path, said
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not flat(parity.take_gradients(model)).any()
    for block in Blocks():
        batch = {key: value[None] for key, value in block.items()}
        wanted, gradients = oracle(model, block)
        assert float(step.evaluate(batch)) == pytest.approx(wanted, rel=1e-5)
        with without_dropout(model):
            trained = float(step.train({**batch, "factor": torch.tensor(1.0)}))
        assert trained == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(flat(parity.take_gradients(model)), gradients, rtol=1e-3,
                                   atol=1e-4 * float(gradients.abs().max()))


class Forgetful(AutogradStep):
    """forward가 하는 일 하나를 빠뜨린 micro-step."""

    def __init__(self, model, **changes):
        super().__init__(model)
        self.head = Head(**{**vars(self.head), **changes})
        self.path = "빠뜨린 길"


@pytest.mark.parametrize("name, changes", [
    ("granite(logits를 나눈다)", {"scale": 1.0}),
    ("granite(logits를 나눈다)", {"scale": 1 / 13.5}),
    ("hyperclovax(logits에 곱한다)", {"scale": 8.0}),
    ("gemma2(부드러운 한계와 창)", {"cap": None}),
    ("phi(출력 행렬의 bias)", {"bias": torch.full((VOCAB,), 0.1).index_fill(0, torch.arange(160), 0.0)}),
])
def test_a_factor_left_out_is_caught(name, changes):
    kind, config, targets, _ = KINDS[name]
    model = build(kind, config, targets)
    step, said = chosen(model, [lambda: Forgetful(model, **changes), lambda: AutogradStep(model, whole=True)])
    assert type(step) is AutogradStep and said and "빠뜨린 길" in said[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "granite(logits를 나눈다)", "gemma2(부드러운 한계와 창)", "mixtral(전문가)"])
def test_half_precision_passes_and_still_catches_a_factor(name, dtype):
    kind, config, targets, _ = KINDS[name]
    model = build(kind, config, targets)
    for parameter in model.parameters():
        if not parameter.requires_grad:  # 학습할 때처럼 LoRA만 fp32로 둔다
            parameter.data = parameter.data.to(dtype)
    step, said = chosen(model)
    assert "조각" in step.path and not said
    step, said = chosen(model, [lambda: Forgetful(model, scale=1.5 * step.head.scale), lambda: AutogradStep(model)])
    assert "빠뜨린 길" in said[0]


class Halved(AutogradStep):
    """손실은 맞지만 gradient가 절반인 micro-step."""

    def train(self, batch):
        return 2 * super().train({**batch, "factor": batch["factor"] / 2})


def test_a_wrong_gradient_is_caught_and_without_another_way_refused():
    model = build("llama", {}, ATTENTION)
    with pytest.raises(UsageError, match="gradient") as refused:
        chosen(model, [lambda: Halved(model)])
    assert "\n" not in str(refused.value)


def shaky(**changes):
    """attention이 날카로워 bf16의 forward가 제 gradient를 크게 틀리는 모델."""
    model = build("llama", {"num_hidden_layers": 6, "num_key_value_heads": 2, **changes}, [*ATTENTION, "down_proj"])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parameter.data = (parameter.data * (8 if "_proj" in name else 1)).to(torch.bfloat16)
    return model


def test_rounding_that_shakes_the_model_as_much_does_not_refuse_the_engine():
    model = shaky()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step, said = chosen(model, [lambda: TrainStep(model, 0, 4), lambda: AutogradStep(model)])
    assert type(step) is TrainStep and step.dtype is torch.bfloat16
    assert len(said) == 1 and "fp32로 계산하면 같으므로" in said[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Mistaken(TrainStep):
    """손으로 쓴 길의 한 가지를 틀리게 한 것."""

    def __init__(self, model, mistake: str):
        super().__init__(model, 0, 4)
        self.mistake = mistake
        if mistake == "norm에 더하는 수":
            self.layers = [replace(layer, norm1=replace(layer.norm1, weight=layer.norm1.weight + 0.1))
                           for layer in self.layers]
        elif mistake == "attention의 배율":
            self.attention = DocumentAttention(self.family.attention_scale * 1.05)
        elif mistake == "빠진 LoRA":
            last = self.layers[-1]
            self.layers[-1] = replace(last, down=replace(last.down, adapters=(), tail=0))
        elif mistake == "바뀐 q와 k":
            rotate = self.ops.rotate
            self.ops.rotate = lambda *given: [rotate(*given)[place] for place in (1, 0, 2)]

    def _rotary_table(self, kind, block):
        table = super()._rotary_table(kind, block)
        if self.mistake == "rotary의 base":  # 각도가 모두 조금 크다
            cos, sin = table.chunk(2, -1)
            angle = torch.atan2(sin, cos) * 1.01
            table = torch.cat([angle.cos(), angle.sin()], -1)
        return table


def test_computing_in_fp32_leaves_the_model_as_it_was():
    """4비트 가중치도 fp32로 풀고, 그동안 바뀐 입력 embedding까지 되돌린다."""
    config = AutoConfig.for_model("llama", **SMALL | SIZES | {"hidden_size": 64})
    model = families.quantize(AutoModelForCausalLM.from_config(config).to(torch.bfloat16), "nf4", True)
    states = [parameter.quant_state for parameter in model.parameters() if hasattr(parameter, "quant_state")]
    embedding, before = model.get_input_embeddings(), {name: value.dtype for name, value in model.named_parameters()}
    with truth.in_fp32(model):
        assert parity.model_dtype(model) is torch.float32 and {state.dtype for state in states} == {torch.float32}
        model.set_input_embeddings(nn.Embedding(VOCAB, 64))
    assert states and {state.dtype for state in states} == {torch.bfloat16}
    assert model.get_input_embeddings() is embedding
    assert {name: value.dtype for name, value in model.named_parameters()} == before


MISTAKES = ["norm에 더하는 수", "attention의 배율", "rotary의 base", "바뀐 q와 k", "빠진 LoRA"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_hidden_by_the_rounding_is_still_caught(mistake):
    model = shaky()
    step, said = chosen(model, [lambda: Mistaken(model, mistake), lambda: AutogradStep(model)])
    assert type(step) is AutogradStep and said


class Miscompiled(TrainStep):
    """식은 맞지만 16비트에서만 gradient의 일부가 틀린 것. 커널의 잘못이 이렇다."""

    def train(self, batch):
        loss = super().train(batch)
        if self.dtype is torch.bfloat16:
            for name, parameter in truth.trainable(self.base):
                if "layers.3" in name:
                    parameter.grad.mul_(-1.0)
        return loss


def test_a_mistake_only_in_half_precision_is_caught():
    model = shaky()
    step, said = chosen(model, [lambda: Miscompiled(model, 0, 4), lambda: AutogradStep(model)])
    assert type(step) is AutogradStep and "gradient" in said[0]


def test_a_model_that_sees_the_future_is_refused():
    with pytest.raises(UsageError, match="뒤의 글"):
        chosen(build("bert", {}, ["query"]))


class Unrunnable(AutogradStep):
    """이 구조를 부를 수 없는 micro-step."""

    def evaluate(self, batch):
        raise TypeError("unexpected keyword argument")


def test_a_library_that_lacks_memory_only_shortens_the_comparison(monkeypatch):
    """자동미분의 thread가 cuBLAS의 handle을 만들지 못해도 모델의 탓이 아니다. 더 짧은 글로 비교한다."""
    model = build("llama", {}, ATTENTION)
    monkeypatch.setattr(truth, "LEAST_TOKENS", 4)
    short, backward = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", truth.plain_backward

    def limited(model, block: dict, most: int = BLOCK // 4):
        if block["input_ids"].shape[1] > most:
            raise RuntimeError(short)
        return backward(model, block)

    monkeypatch.setattr(truth, "plain_backward", limited)
    assert truth.find_truth(model, Blocks(), 4, torch.device("cpu")).short["input_ids"].shape[1] == BLOCK // 4
    monkeypatch.setattr(truth, "plain_backward", lambda model, block: limited(model, block, 0))
    with pytest.raises(UsageError, match="메모리가 모자라"):
        chosen(model)


def test_a_step_that_cannot_run_gives_way():
    model = build("llama", {}, ATTENTION)
    step, said = chosen(model, [lambda: Unrunnable(model), *autograd_ways(model, BLOCK)])
    assert type(step) is AutogradStep and "계산하지 못했다" in said[0]


def test_documents_that_see_each_other_are_computed_apart():
    step, said = chosen(build("bloom", {}, ["query_key_value"]))
    assert step.separate and "떼어 놓지 못해" in said[0]


def test_token_outside_the_embedding_is_named(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    tokenizer.add_tokens(["<|새 토큰|>"])
    new = len(tokenizer) - 1
    require_known_ids([0, new - 1], new, tokenizer, "데이터")
    with pytest.raises(UsageError, match=rf"데이터에.*새 토큰.*{new}.*{new}행"):
        require_known_ids([0, new], new, tokenizer, "데이터")
