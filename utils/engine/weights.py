"""GPT-NeoX 모델의 가중치를 토큰 하나를 만드는 커널이 읽는 꼴로 모으는 일을 맡는다. 큰 행렬은 베끼지 않는다."""

from dataclasses import dataclass

import torch

ROWS = 16  # 커널이 한 번에 다루는 행의 수
NF4_BLOCK = 64


@dataclass(frozen=True)
class Matrix:
    """선형층 하나.

    Attributes:
        weight: 16비트 [출력, 입력] 또는 NF4 바이트.
        scale: NF4 블록의 절댓값. 16비트 가중치면 None.
        group: 이중 양자화에서 절댓값 256개마다의 fp32 절댓값. 아니면 None.
        offset: 이중 양자화에서 절댓값에 더하는 수.
        bias: fp32 [출력].
        shape: (출력, 입력).
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    group: torch.Tensor | None
    offset: float
    bias: torch.Tensor
    shape: tuple[int, int]

    def pointers(self) -> tuple:
        return self.weight, self.scale, self.group, self.offset


@dataclass(frozen=True)
class Adapter:
    """query_key_value의 LoRA. 배율은 `up`에 곱해 둔다.

    Attributes:
        split_down: A를 16비트 둘로 나눈 [16의 배수로 올린 2r, 입력]. 앞의 r행이 위 절반, 다음 r행이 아래 절반.
        up: B fp32 [출력, r].
        down: A [r, 입력], 모델의 dtype.
        up_16bit: B [출력, r], 모델의 dtype.
    """

    split_down: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    up_16bit: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """층 하나의 가중치. norm은 (weight, bias)를 fp32로 둔 것이다."""

    norm1: tuple[torch.Tensor, torch.Tensor]
    norm2: tuple[torch.Tensor, torch.Tensor]
    qkv: Matrix
    dense: Matrix
    up: Matrix
    down: Matrix
    adapter: Adapter | None


def why_not(model) -> str | None:
    """이 모델에 커널을 쓸 수 없는 까닭. 쓸 수 있으면 None."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    if config.model_type != "gpt_neox":
        return f"{config.model_type} 구조"
    if next(model.parameters()).device.type != "cuda":
        return "GPU가 아님"
    if not config.use_parallel_residual or config.hidden_act != "gelu":
        return "병렬 잔차와 gelu가 아님"
    if config.rope_parameters["rope_type"] != "default":
        return "늘린 rotary"
    head = config.hidden_size // config.num_attention_heads
    if config.hidden_size % 128 or config.intermediate_size % 128 or head % 16 or head > 256:
        return "커널이 모르는 크기"
    edges = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    dtype = edges[0].dtype
    if {edge.dtype for edge in edges} not in ({torch.float16}, {torch.bfloat16}):
        return f"{dtype} 가중치"
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(edges[0].device)[0] < 8:
        return "bf16이 없는 GPU"
    kinds = set()
    for layer in base.gpt_neox.layers:
        for name, module in _linears(layer).items():
            linear = getattr(module, "base_layer", module)
            if hasattr(module, "base_layer") and (name != "query_key_value" or _odd_adapter(module)):
                return f"{name}의 어댑터"
            state = getattr(linear.weight, "quant_state", None)
            if state is None and linear.weight.dtype != dtype:
                return f"{type(linear).__name__} 가중치"
            if state and (state.quant_type, state.blocksize, linear.weight.dtype) != ("nf4", NF4_BLOCK, torch.uint8):
                return "NF4가 아닌 4비트"
            kinds.add("plain" if state is None else f"nested={state.nested}")
    return None if len(kinds) == 1 else "층마다 다른 가중치"


class Weights:
    """모델 전체의 가중치.

    Attributes:
        layers: `Layer`의 목록.
        nf4, double_quant: 가중치의 꼴.
        code: 이중 양자화의 8비트 코드표 fp32 [256]. 아니면 None.
        rank: LoRA의 r. 없으면 0.
    """

    def __init__(self, model):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        body = base.gpt_neox
        self.embedding = base.get_input_embeddings().weight.detach()
        self.head = _whole_rows(base.get_output_embeddings().weight.detach())
        self.final_norm = _norm(body.final_layer_norm)
        self.eps = float(base.config.layer_norm_eps)
        self.dtype = self.embedding.dtype
        state = getattr(_unwrap(body.layers[0].attention.dense)[0].weight, "quant_state", None)
        self.nf4, self.double_quant = state is not None, state is not None and state.nested
        self.code = state.state2.code.float().contiguous() if self.double_quant else None
        self.layers = [self._layer(layer) for layer in body.layers]
        ranks = [layer.adapter.up.shape[1] for layer in self.layers if layer.adapter]
        self.rank = max(ranks, default=0)
        self.turns = _turns(body.rotary_emb, base.config.max_position_embeddings, self.embedding.device)

    def _layer(self, layer) -> Layer:
        matrices = {name: _matrix(_unwrap(module)[0]) for name, module in _linears(layer).items()}
        adapter = _unwrap(layer.attention.query_key_value)[1]
        return Layer(_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm), matrices["query_key_value"],
                     matrices["dense"], matrices["dense_h_to_4h"], matrices["dense_4h_to_h"],
                     adapter and _adapter(*adapter, torch.float16 if self.nf4 else self.dtype, self.dtype))


def _whole_rows(weight: torch.Tensor) -> torch.Tensor:
    """행을 16의 배수까지 0으로 채운다. 알려진 모델은 이미 배수이므로 베끼지 않는다."""
    return torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % ROWS))


def _linears(layer) -> dict:
    return {"query_key_value": layer.attention.query_key_value, "dense": layer.attention.dense,
            "dense_h_to_4h": layer.mlp.dense_h_to_4h, "dense_4h_to_h": layer.mlp.dense_4h_to_h}


def _unwrap(module) -> tuple:
    """PEFT가 감싼 선형층에서 (본래의 층, (A, B, 배율) 또는 None)을 꺼낸다."""
    if not hasattr(module, "base_layer"):
        return module, None
    name = module.active_adapters[0]
    return module.base_layer, (module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach(),
                               module.scaling[name])


def _odd_adapter(module) -> bool:
    names = module.active_adapters
    return bool(len(names) != 1 or names[0] not in module.lora_A or module.merged or module.lora_variant
                or module.lora_B[names[0]].bias is not None)


def _norm(module) -> tuple[torch.Tensor, torch.Tensor]:
    return module.weight.detach().float(), module.bias.detach().float()


def _matrix(linear) -> Matrix:
    weight, state = linear.weight.detach(), getattr(linear.weight, "quant_state", None)
    shape = tuple(weight.shape if state is None else state.shape)
    bias = torch.zeros(shape[0], device=weight.device) if linear.bias is None else linear.bias.detach().float()
    if state is None:
        return Matrix(weight.contiguous(), None, None, 0.0, bias, shape)
    if state.nested:
        return Matrix(weight, state.absmax, state.state2.absmax, float(state.offset), bias, shape)
    return Matrix(weight, state.absmax.float(), None, 0.0, bias, shape)


def _adapter(down, up, scaling: float, split_dtype: torch.dtype, dtype: torch.dtype) -> Adapter:
    down, up = down.float(), up.float() * scaling
    rank = down.shape[0]
    split = torch.zeros(-(-2 * rank // ROWS) * ROWS, down.shape[1], dtype=split_dtype, device=down.device)
    split[:rank] = down
    split[rank : 2 * rank] = down - split[:rank].float()
    return Adapter(split, up.contiguous(), down.to(dtype), up.to(dtype))


def _turns(rotary, context: int, device: torch.device) -> torch.Tensor:
    """위치마다의 (cos, sin) fp32 [context, rotary/2, 2]."""
    angles = torch.arange(context, device=device)[:, None] * rotary.inv_freq.float().to(device)
    return (torch.stack((angles.cos(), angles.sin()), -1) * rotary.attention_scaling).contiguous()
