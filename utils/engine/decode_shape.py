"""토큰을 만드는 커널이 아는 구조(`Shape`)와, 그 구조의 모델에서 층의 모듈을 찾는 법."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """커널이 알아야 하는 구조의 모든 것.

    Attributes:
        rms: RMS norm인지. 아니면 layer norm이다.
        pre_norm, post_norm: 선형층의 입력과 출력에 norm을 거는지. Gemma 3는 둘 다, EXAONE 4는 출력에만 건다.
        parallel: attention과 MLP가 같은 잔차를 읽는지(GPT-NeoX).
        interleaved: q, k, v가 머리마다 번갈아 있는 한 행렬인지(GPT-NeoX).
        rotary: 머리에서 돌리는 칸의 수.
        inv_freqs: rotary의 종류마다 (주파수 [rotary / 2], cos과 sin의 배율).
        windows: 층마다의 창. 0이면 모두 본다.
        turns: 층마다의 rotary의 종류. 음수면 돌리지 않는다.
        final_norm: 마지막 norm의 이름.
    """

    kind: str
    hidden: int
    ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rms: bool
    norm_offset: float
    eps: float
    pre_norm: bool
    post_norm: bool
    parallel: bool
    interleaved: bool
    gated: bool
    activation: str
    rotary: int
    inv_freqs: tuple[tuple[torch.Tensor, float], ...]
    windows: tuple[int, ...]
    turns: tuple[int, ...]
    attention_scale: float
    attention_cap: float
    logit_cap: float
    logit_scale: float
    residual_scale: float
    embedding_scale: float
    final_norm: str


@dataclass(frozen=True)
class LayerModules:
    """층 하나의 모듈. 없는 norm은 None이다."""

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


STATIC_ROTARY = {"default", "linear", "llama3", "yarn"}  # 길이에 따라 주파수가 달라지지 않는 것들
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "silu": "silu"}
GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "exaone4", "hyperclovax", "granite"}
LARGEST = 8192   # 커널이 다루는 hidden의 최댓값
MOST_HEAD = 256  # 머리의 최대 크기


def shape_of(model) -> Shape | str:
    """모델의 구조. 커널이 모르는 구조면 그 이유."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    if config.model_type == "gpt_neox":
        shape = _neox(base)
    elif config.model_type in GATED:
        shape = _gated(base)
    else:
        return f"{config.model_type} 구조"
    return shape if isinstance(shape, str) else _unfit(shape) or shape


def layer_modules(base, shape: Shape) -> list[LayerModules]:
    """층마다의 모듈."""
    if shape.kind == "gpt_neox":
        return [LayerModules(layer.input_layernorm, layer.post_attention_layernorm, None, None, None, None,
                             (layer.attention.query_key_value,), (layer.attention.dense,), (layer.mlp.dense_h_to_4h,),
                             (layer.mlp.dense_4h_to_h,)) for layer in base.gpt_neox.layers]
    names = {"exaone4": (None, None, "post_attention_layernorm", "post_feedforward_layernorm"),
             "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm",
                             "post_feedforward_layernorm"),
             "hyperclovax": ("input_layernorm", "post_attention_layernorm",
                             *(("post_norm1", "post_norm2") if shape.post_norm else (None, None)))}
    norms = names.get(shape.kind, ("input_layernorm", "post_attention_layernorm", None, None))
    found = []
    for layer in base.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        found.append(LayerModules(
            *(name and getattr(layer, name) for name in norms),
            getattr(attention, "q_norm", None), getattr(attention, "k_norm", None),
            (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)))
    return found


def _neox(base) -> Shape | str:
    config, rotary = base.config, base.gpt_neox.rotary_emb
    if config.rope_parameters["rope_type"] not in STATIC_ROTARY:
        return f"길이에 따라 바뀌는 rotary({config.rope_parameters['rope_type']})"
    head_dim = config.hidden_size // config.num_attention_heads
    return Shape(
        kind="gpt_neox", hidden=config.hidden_size, ff=config.intermediate_size, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, kv_heads=config.num_attention_heads, head_dim=head_dim,
        context=config.max_position_embeddings, rms=False, norm_offset=0.0, eps=config.layer_norm_eps, pre_norm=True,
        post_norm=False, parallel=config.use_parallel_residual, interleaved=True, gated=False,
        activation=ACTIVATION_NAMES.get(config.hidden_act, config.hidden_act), rotary=2 * len(rotary.inv_freq),
        inv_freqs=((rotary.inv_freq, rotary.attention_scaling),), windows=(0,) * config.num_hidden_layers,
        turns=(0,) * config.num_hidden_layers, attention_scale=head_dim ** -0.5, attention_cap=0.0, logit_cap=0.0,
        logit_scale=1.0, residual_scale=1.0, embedding_scale=1.0, final_norm="gpt_neox.final_layer_norm")


def _gated(base) -> Shape | str:
    """llama와 그 친척들: RMS norm, 나뉜 q/k/v, gate와 up이 있는 MLP."""
    config, kind, rotary = base.config, base.config.model_type, base.model.rotary_emb
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or 0
    windows = [window if name == "sliding_attention" or kind == "mistral" else 0 for name in types]
    if set(types) - {"full_attention", "sliding_attention"}:
        return f"모르는 attention({', '.join(sorted(set(types)))})"
    if kind == "gemma3_text":
        names = sorted(set(types))
        kinds = [(getattr(rotary, f"{name}_inv_freq"), getattr(rotary, f"{name}_attention_scaling")) for name in names]
        rope_types, turns = set(rotary.rope_type.values()), [names.index(name) for name in types]
        if config.use_bidirectional_attention:
            return "양방향 attention"
    else:
        kinds, rope_types, turns = [(rotary.inv_freq, rotary.attention_scaling)], {rotary.rope_type}, [0] * len(types)
    if kind == "exaone4" and config.sliding_window is not None:  # 전체를 보는 층은 돌리지 않는다
        turns = [0 if name == "sliding_attention" else -1 for name in types]
    if rope_types - STATIC_ROTARY:
        return f"길이에 따라 바뀌는 rotary({', '.join(sorted(rope_types - STATIC_ROTARY))})"
    scaling = getattr(config, "logits_scaling", 1.0)
    embedding_scale = getattr(config, "embedding_multiplier", 1.0)
    if kind == "gemma3_text":  # 모델의 dtype으로 반올림해 곱한다
        embedding_scale = float(base.get_input_embeddings().embed_scale.to(base.get_input_embeddings().weight.dtype))
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    return Shape(
        kind=kind, hidden=config.hidden_size, ff=config.intermediate_size, layers=config.num_hidden_layers, heads=heads,
        kv_heads=config.num_key_value_heads, head_dim=head_dim, context=config.max_position_embeddings, rms=True,
        norm_offset=1.0 if kind == "gemma3_text" else 0.0, eps=config.rms_norm_eps, pre_norm=kind != "exaone4",
        post_norm=kind in ("gemma3_text", "exaone4") or getattr(config, "use_post_norm", False), parallel=False,
        interleaved=False, gated=True, activation=ACTIVATION_NAMES.get(activation, activation),
        rotary=2 * len(kinds[0][0]), inv_freqs=tuple(kinds), windows=tuple(windows), turns=tuple(turns),
        attention_scale=base.model.layers[0].self_attn.scaling, attention_cap=0.0,
        logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0,
        logit_scale=scaling if kind == "hyperclovax" else 1 / scaling,
        residual_scale=getattr(config, "residual_multiplier", 1.0), embedding_scale=embedding_scale,
        final_norm="model.norm")


def _unfit(shape: Shape) -> str | None:
    """커널이 다루지 못하는 크기. 다룰 수 있으면 None."""
    q_dim, kv_dim = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.activation not in ACTIVATION_NAMES.values():
        return f"활성 함수 {shape.activation}"
    if shape.hidden % 128 or shape.ff % 128 or q_dim % 128 or kv_dim % 16:
        return "128의 배수가 아닌 크기"
    if shape.hidden > LARGEST or shape.head_dim % 16 or shape.head_dim > MOST_HEAD or shape.rotary % 2:
        return "커널이 모르는 크기"
    return None
