"""모델 구조를 데이터로 적은 것(`Family`)과, 그 구조의 모델에서 층의 모듈을 찾는 법.

학습(planner, trainer)과 답 만들기(decoder)가 모두 `describe` 하나에 묻는다. `Family`가 나오면 손으로 쓴 빠른 길로 가고,
글자가 나오면 그것이 빠른 길을 쓰지 않는 이유다. 새 구조를 더하는 법은 이 폴더의 README.md에 있다.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from utils.engine.family import GEMMA, Family
from utils.model.adapter import base_of
from utils.model.configs import auto_config

NF4_BLOCK = 64
STATIC_ROTARY = {"default", "linear", "llama3", "yarn"}  # 글의 길이에 따라 주파수가 달라지지 않는 것들
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
                    "silu": "silu", "swish": "silu"}
LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "exaone4", "hyperclovax", "granite"}
LARGEST_HIDDEN = 8192  # norm 커널의 블록 하나(1,024스레드 x 8값)가 다루는 가장 긴 행
LARGEST_HEAD = 256  # flash attention이 아는 가장 큰 머리


@dataclass(frozen=True)
class LayerModules:
    """층 하나의 모듈. 없는 norm은 None이다. PEFT가 감싼 선형층은 감싼 그대로다."""

    norm1: nn.Module | None
    norm2: nn.Module | None
    post1: nn.Module | None
    post2: nn.Module | None
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    qkv: tuple[nn.Module, ...]
    out: tuple[nn.Module, ...]
    mlp: tuple[nn.Module, ...]
    down: tuple[nn.Module, ...]

    def linears(self) -> Iterator[tuple[nn.Module, ...]]:
        yield from (self.qkv, self.out, self.mlp, self.down)


def describe(source, training: bool = False) -> Family | str:
    """모델이나 설정의 구조. 빠른 길이 모르는 구조면 한 줄의 이유.

    Args:
        source: causal LM(PEFT로 감싼 것도), `PretrainedConfig`, config.json의 dict 가운데 하나. 설정만 주면 가중치를
            올리기 전에 물을 수 있다. 모델을 주면 선형층의 종류까지 본다.
        training: 학습할 것인지. 모델이 스스로 거는 dropout과 LoRA의 변형을 함께 본다.
    """
    base = base_of(source)
    config = _config(base)
    if isinstance(config, str):
        return config
    if config.model_type == "gpt_neox":
        family = _neox(config)
    elif config.model_type in LLAMA_LIKE:
        family = _llama_like(config)
    else:
        return f"모르는 구조({config.model_type})"
    if isinstance(family, str):
        return family
    reason = _odd_size(family)
    if reason is None and training and family.dropout:
        reason = "LoRA 말고도 dropout이 있는 모델"
    if reason is None and isinstance(base, nn.Module):
        reason = _odd_modules(base, family)
    if reason is None and training and isinstance(base, nn.Module):
        reason = _untrainable(source, base, family)
    return family if reason is None else reason


def layer_modules(base: nn.Module, family: Family) -> list[LayerModules]:
    """층마다의 모듈. `base`는 PEFT의 껍질을 벗긴 causal LM이다."""
    if family.interleaved:
        return [LayerModules(layer.input_layernorm, layer.post_attention_layernorm, None, None, None, None,
                             (layer.attention.query_key_value,), (layer.attention.dense,),
                             (layer.mlp.dense_h_to_4h,), (layer.mlp.dense_4h_to_h,))
                for layer in base.gpt_neox.layers]
    norms = ("input_layernorm", "post_attention_layernorm", None, None)
    if family.kind == "gemma3_text":
        norms = ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm",
                 "post_feedforward_layernorm")
    elif family.kind == "exaone4":
        norms = (None, None, "post_attention_layernorm", "post_feedforward_layernorm")
    elif family.post_norm:
        norms = ("input_layernorm", "post_attention_layernorm", "post_norm1", "post_norm2")
    heads = ("q_norm", "k_norm") if family.qk_norm else (None, None)
    return [LayerModules(*(name and getattr(layer, name) for name in norms),
                         *(name and getattr(layer.self_attn, name) for name in heads),
                         (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                         (layer.self_attn.o_proj,), (layer.mlp.gate_proj, layer.mlp.up_proj), (layer.mlp.down_proj,))
            for layer in base.model.layers]


def rotary_frequencies(base: nn.Module, family: Family) -> tuple[tuple[torch.Tensor, float], ...]:
    """`rotary_kinds`마다 (주파수 fp32 [rotary / 2], cos과 sin에 곱하는 수). 모델의 rotary 모듈이 계산해 둔 값이다."""
    rotary = (base.gpt_neox if family.interleaved else base.model).rotary_emb
    names = ["" if kind is None else f"{kind}_" for kind in family.rotary_kinds]
    return tuple((getattr(rotary, f"{name}inv_freq"), getattr(rotary, f"{name}attention_scaling")) for name in names)


def rotary_edge(config) -> float:
    """rotary의 주파수가 갈리는 길이(토큰). 글이 이보다 길면 앞의 토큰들도 다른 주파수로 돌린다. 갈리지 않으면 inf다.

    Phi-3.5와 Phi-4-mini의 longrope가 그렇다. 길이가 다른 글을 한 forward에 묶거나, 짧을 때 읽은 K를 길어진 다음에도
    쓰면 값이 틀린다. dynamic도 길이를 보지만 문맥 안에서는 바뀌지 않는다.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = bool(rope) and all(isinstance(each, dict) for each in rope.values())  # 층의 종류마다 다른 모델
    ropes = rope.values() if by_layer else [rope]
    return min((each["original_max_position_embeddings"] for each in ropes if each.get("rope_type") == "longrope"),
               default=math.inf)


def unwrap(module: nn.Module) -> nn.Module:
    """PEFT가 감싼 선형층이면 그 안의 본래 층."""
    return getattr(module, "base_layer", module)


def _config(base):
    """설정 객체. dict면 transformers가 빠진 값을 채우게 한다."""
    if not isinstance(base, dict):
        return base.config if isinstance(base, nn.Module) else base
    settings = {name: value for name, value in base.items() if name != "transformers_version"}
    kind = settings.pop("model_type", None)
    if kind != "gpt_neox" and kind not in LLAMA_LIKE:
        return f"모르는 구조({kind})"
    return auto_config().for_model(kind, **settings)


def _neox(config) -> Family | str:
    rope = config.rope_parameters
    if rope["rope_type"] not in STATIC_ROTARY:
        return f"길이에 따라 바뀌는 rotary({rope['rope_type']})"
    head_dim = config.hidden_size // config.num_attention_heads
    return Family(
        kind="gpt_neox", hidden=config.hidden_size, ff=config.intermediate_size, layers=config.num_hidden_layers,
        vocab=config.vocab_size, context=config.max_position_embeddings, heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads, head_dim=head_dim, rms=False, norm_offset=0.0, eps=config.layer_norm_eps,
        pre_norm=True, post_norm=False, qk_norm=False, parallel=bool(config.use_parallel_residual), interleaved=True,
        gated=False, activation=ACTIVATION_NAMES.get(config.hidden_act, config.hidden_act),
        rotary=int((getattr(config, "head_dim", None) or head_dim) * rope.get("partial_rotary_factor", 1.0)),
        rotary_kinds=(None,),
        turns=(0,) * config.num_hidden_layers, windows=(0,) * config.num_hidden_layers,
        attention_scale=head_dim ** -0.5, logit_scale=1.0, logit_cap=0.0, residual_scale=1.0, embedding_scale=1.0,
        tied=bool(config.tie_word_embeddings), final_norm="gpt_neox.final_layer_norm",
        dropout=bool(config.hidden_dropout or config.attention_dropout))


def _llama_like(config) -> Family | str:
    """llama와 그 친척들: RMSNorm, 나뉜 q, k, v, 문이 있는 MLP, 차례로 읽는 잔차."""
    kind, heads = config.model_type, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if set(types) - {"full_attention", "sliding_attention"}:
        return f"모르는 attention({', '.join(sorted(set(types)))})"
    if getattr(config, "use_bidirectional_attention", None):
        return "양방향 attention"
    window = getattr(config, "sliding_window", None) or 0
    windows = tuple(window if name == "sliding_attention" or kind == "mistral" else 0 for name in types)
    rotary_kinds, turns, ropes = (None,), (0,) * len(types), [config.rope_parameters]
    if kind == "gemma3_text":  # 전체를 보는 층과 창이 있는 층의 theta가 다르다
        rotary_kinds = tuple(sorted(set(types)))
        turns = tuple(rotary_kinds.index(name) for name in types)
        ropes = [config.rope_parameters[name] for name in rotary_kinds]
    elif kind == "exaone4" and config.sliding_window is not None:  # 전체를 보는 층은 돌리지 않는다
        turns = tuple(0 if name == "sliding_attention" else -1 for name in types)
    moving = {rope["rope_type"] for rope in ropes} - STATIC_ROTARY
    if moving:
        return f"길이에 따라 바뀌는 rotary({', '.join(sorted(moving))})"
    partial = {rope.get("partial_rotary_factor", 1.0) for rope in ropes}
    if partial != {1.0}:
        return "머리의 일부만 돌리는 llama 계열"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if kind == "gemma" and activation == "gelu":
        activation = "gelu_pytorch_tanh"  # 공식 가중치의 설정이 이렇게 적혀 있지만 tanh 근사를 뜻한다
    scaling = getattr(config, "logits_scaling", 1.0)
    attention_scale = head_dim ** -0.5
    if kind == "gemma3_text":
        attention_scale = config.query_pre_attn_scalar ** -0.5
    elif kind in ("granite", "hyperclovax"):
        attention_scale = config.attention_multiplier
    embedding_scale = config.hidden_size ** 0.5 if kind in GEMMA else getattr(config, "embedding_multiplier", 1.0)
    post_norm = kind in ("gemma3_text", "exaone4") or bool(getattr(config, "use_post_norm", False))
    return Family(
        kind=kind, hidden=config.hidden_size, ff=config.intermediate_size, layers=config.num_hidden_layers,
        vocab=config.vocab_size, context=config.max_position_embeddings, heads=heads,
        kv_heads=config.num_key_value_heads, head_dim=head_dim, rms=True, norm_offset=1.0 if kind in GEMMA else 0.0,
        eps=config.rms_norm_eps, pre_norm=kind != "exaone4", post_norm=post_norm,
        qk_norm=kind in ("qwen3", "gemma3_text", "exaone4"), parallel=False, interleaved=False, gated=True,
        activation=ACTIVATION_NAMES.get(activation, activation), rotary=head_dim, rotary_kinds=rotary_kinds,
        turns=turns, windows=windows, attention_scale=float(attention_scale),
        logit_scale=float(scaling if kind == "hyperclovax" else 1 / scaling),
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        residual_scale=float(getattr(config, "residual_multiplier", 1.0)), embedding_scale=float(embedding_scale),
        tied=bool(config.tie_word_embeddings), final_norm="model.norm",
        dropout=bool(getattr(config, "attention_dropout", 0.0)))


def _odd_size(family: Family) -> str | None:
    if family.activation not in ACTIVATION_NAMES.values():
        return f"모르는 활성 함수({family.activation})"
    if family.hidden % 8 or family.ff % 8 or family.head_dim % 8 or family.rotary % 4:
        return "8의 배수가 아닌 크기"
    if family.hidden > LARGEST_HIDDEN or family.head_dim > LARGEST_HEAD:
        return f"너무 큰 은닉값({family.hidden})이나 머리({family.head_dim})"
    if family.heads % family.kv_heads:
        return "q의 머리를 k와 v의 머리에 똑같이 나눌 수 없는 구조"
    return None


def _odd_modules(base: nn.Module, family: Family) -> str | None:
    """선형층이 평범하거나 NF4이고 모양이 구조와 맞는지 본다."""
    shapes = list(family.linears().values())
    for layer in layer_modules(base, family):
        for wrapped, shape in zip((m for group in layer.linears() for m in group), shapes, strict=True):
            linear = unwrap(wrapped)
            state = getattr(linear.weight, "quant_state", None)
            four_bit = state is not None and state.quant_type == "nf4" and state.blocksize == NF4_BLOCK
            if type(linear) is not nn.Linear and not four_bit and type(linear).__name__ != "Linear8bitLt":
                return f"모르는 선형층({type(linear).__name__})이나 NF4가 아닌 4비트"
            if (linear.in_features, linear.out_features) != (shape.columns, shape.rows):
                return f"설정과 다른 모양의 선형층({linear.out_features} x {linear.in_features})"
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return "출력 행렬이 평범한 선형층이 아닌 모델"
    return None


def _untrainable(model: nn.Module, base: nn.Module, family: Family) -> str | None:
    """배우는 것이 선형층에 붙은 평범한 LoRA뿐인지 본다."""
    expected = 0
    for layer in layer_modules(base, family):
        for module in (m for group in layer.linears() for m in group):
            if type(unwrap(module)).__name__ == "Linear8bitLt":
                return "8비트 가중치"
            if unwrap(module) is module:
                continue
            if list(module.active_adapters) != ["default"] or module.merged:
                return "LoRA가 하나가 아니거나 이미 합친 모델"
            plain = type(module.lora_A["default"]) is nn.Linear and not module.use_dora.get("default", False)
            if not plain or module.lora_B["default"].bias is not None or getattr(module, "lora_variant", None):
                return "LoRA의 변형(DoRA, bias)"
            expected += 2
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    if expected == 0 or trained != expected:
        return "배우는 것이 선형층의 LoRA만이 아닌 모델"
    return None
