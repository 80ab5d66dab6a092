"""모델의 가중치를 토큰 하나를 만드는 커널이 읽는 꼴로 모은다. 큰 행렬은 베끼지 않는다."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from utils.engine.decode_space import INT8, NF4, ROWS, WIDE, lora_rows
from utils.engine.families import NF4_BLOCK, LayerModules, layer_modules, rotary_frequencies
from utils.engine.family import Family
from utils.engine.norms import Norm, read_norm
from utils.model.adapter import base_of


@dataclass(frozen=True)
class Matrix:
    """행렬 하나.

    Attributes:
        weight: 16비트 [출력, 입력], int8 [출력, 입력] 또는 NF4 바이트 [출력 * 입력 / 2, 1].
        scale: NF4 블록(64칸)의 절댓값. 이중 양자화면 8비트다. NF4가 아니면 None.
        group: 이중 양자화에서 절댓값 256개마다의 fp32 절댓값. 아니면 None.
        offset: 이중 양자화에서 절댓값에 더하는 수.
        row_scale: int8 가중치의 행마다의 배율 fp32 [출력]. 아니면 None.
        shape: (출력, 입력).
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    group: torch.Tensor | None
    offset: float
    row_scale: torch.Tensor | None
    shape: tuple[int, int]


@dataclass(frozen=True)
class Adapter:
    """나란한 행렬들의 LoRA. 어댑터가 없는 행렬의 자리는 0이고, r이 작은 것은 0으로 채운다.

    Attributes:
        down: A [행렬의 수, `lora_rows(r)`, 입력], 커널의 활성값의 dtype. 행을 0으로 채우고 배율을 곱한 것이다.
        up: B fp32 [전체 출력, r]. 행렬이 하나면 모델의 것을 베끼지 않는다.
        down_fp32: MLP의 뒤쪽 행렬의 A fp32 [r, 입력]. 모델의 것 그대로다. 다른 행렬이면 None.
        scaling: `down_fp32`에 곱할 배율.
    """

    down: torch.Tensor
    up: torch.Tensor
    down_fp32: torch.Tensor | None
    scaling: float


@dataclass(frozen=True)
class Linear:
    """나란히 곱하는 행렬들(q, k, v나 gate, up) 또는 행렬 하나.

    Attributes:
        bias: fp32 [전체 출력]. 없으면 None.
        row_scale: int8 가중치의 행마다의 배율 fp32 [전체 출력]. 아니면 None.
    """

    parts: tuple[Matrix, ...]
    bias: torch.Tensor | None
    row_scale: torch.Tensor | None
    adapter: Adapter | None

    @property
    def rows(self) -> int:
        return sum(part.shape[0] for part in self.parts)


@dataclass(frozen=True)
class Layer:
    """층 하나의 가중치. 없는 norm은 None이다.

    Attributes:
        norm1, norm2: attention과 MLP의 입력에 거는 norm.
        post1, post2: attention과 MLP의 출력에 거는 norm. 잔차의 배율을 곱해 둔 것이다.
        q_norm, k_norm: 머리마다 거는 norm의 weight fp32 [head_dim].
    """

    norm1: Norm | None
    norm2: Norm | None
    post1: Norm | None
    post2: Norm | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    qkv: Linear
    out: Linear
    mlp: Linear
    down: Linear


class Weights:
    """모델 전체의 가중치.

    Attributes:
        family: 구조.
        layers: `Layer`의 목록.
        kind: WIDE, NF4, INT8.
        double_quant: NF4의 절댓값도 양자화했는지.
        code: 이중 양자화의 8비트 코드표 fp32 [256]. 아니면 None.
        rank: LoRA의 r 가운데 가장 큰 것. 없으면 0.
        dtype: 16비트 가중치와 질문을 읽을 때의 q, k, v의 dtype.
        act_dtype: 선형층의 입력의 dtype. NF4와 int8은 fp16이다: bf16보다 정밀하다.
        embedding_scale: 입력 embedding에 곱하는 수.
        rotary: rotary의 종류마다 (주파수 [rotary / 2], cos과 sin의 배율).
        head: 출력 행렬 [어휘를 16의 배수로 올린 것, hidden]. 묶인 구조면 embedding과 같은 메모리다.
    """

    def __init__(self, model, family: Family):
        base = base_of(model)
        self.family = family
        self.embedding = base.get_input_embeddings().weight.detach()
        self.head = _whole_rows(base.get_output_embeddings().weight.detach())
        self.dtype = self.embedding.dtype
        self.embedding_scale = family.scale_of_embedding(self.dtype)
        self.rotary = rotary_frequencies(base, family)
        modules = layer_modules(base, family)
        state = getattr(unwrap(modules[0].out[0])[0].weight, "quant_state", None)
        self.kind = weight_kind(unwrap(modules[0].out[0])[0])
        self.act_dtype = self.dtype if self.kind == WIDE else torch.float16
        self.double_quant = state is not None and state.nested
        self.code = state.state2.code.float().contiguous() if self.double_quant else None
        self.rank = max((adapter[0].shape[0] for layer in modules for group in layer.linears() for module in group
                         if (adapter := unwrap(module)[1])), default=0)
        self.final_norm = read_norm(base.get_submodule(family.final_norm), family)
        self.layers = [self._layer(layer) for layer in modules]

    def _layer(self, modules: LayerModules) -> Layer:
        family = self.family
        norms = [read_norm(module, family) for module in (modules.norm1, modules.norm2)]
        posts = [read_norm(module, family, family.residual_scale) for module in (modules.post1, modules.post2)]
        heads = [module and read_norm(module, family).weight for module in (modules.q_norm, modules.k_norm)]
        *before, down = modules.linears()
        return Layer(*norms, *posts, *heads, *map(self._linear, before), self._linear(down, mlp_down=True))

    def _linear(self, modules: Sequence, mlp_down: bool = False) -> Linear:
        pairs = [unwrap(module) for module in modules]
        parts = tuple(_matrix(linear) for linear, _ in pairs)
        biases = [linear.bias for linear, _ in pairs]
        bias = None
        if any(item is not None for item in biases):
            bias = torch.cat([part.weight.new_zeros(part.shape[0], dtype=torch.float32) if item is None
                              else item.detach().float() for part, item in zip(parts, biases, strict=True)])
        row_scale = torch.cat([part.row_scale for part in parts]) if self.kind == INT8 else None
        adapters = [adapter for _, adapter in pairs]
        return Linear(parts, bias, row_scale, self._adapter(parts, adapters, mlp_down) if any(adapters) else None)

    def _adapter(self, parts: tuple[Matrix, ...], adapters: list, mlp_down: bool) -> Adapter:
        down = parts[0].weight.new_zeros(len(parts), lora_rows(self.rank), parts[0].shape[1], dtype=self.act_dtype)
        ups = []
        for part, adapter, rows in zip(parts, adapters, down, strict=True):
            if adapter:
                rows[: len(adapter[0])] = adapter[0].float() * adapter[2]
            ups.append(self._padded(adapter[1], 1) if adapter else rows.new_zeros(part.shape[0], self.rank).float())
        return Adapter(down, ups[0] if len(ups) == 1 else torch.cat(ups),
                       self._padded(adapters[0][0], 0) if mlp_down else None, adapters[0][2] if mlp_down else 1.0)

    def _padded(self, lora: torch.Tensor, dim: int) -> torch.Tensor:
        """r을 0으로 채운 fp32의 A나 B. dim은 r의 차원이다. 채울 것이 없으면 모델의 것 그대로다."""
        spare = self.rank - lora.shape[dim]
        if spare:
            lora = torch.nn.functional.pad(lora, (0, spare) if dim else (0, 0, 0, spare))
        return lora.float().contiguous()


def shape_dtype(model) -> torch.dtype:
    """활성값과 16비트 가중치의 dtype."""
    base = base_of(model)
    return base.get_input_embeddings().weight.dtype


def why_not_weights(model, family: Family) -> str | None:
    """구조는 알지만 가중치의 꼴이나 어댑터를 커널이 읽지 못하는 이유. 읽을 수 있으면 None."""
    base = base_of(model)
    edges = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    dtype = edges[0].dtype
    if {edge.dtype for edge in edges} not in ({torch.float16}, {torch.bfloat16}):
        return f"{str(dtype).removeprefix('torch.')} 가중치"
    kinds = set()
    for layer in layer_modules(base, family):
        for group in layer.linears():
            for module in group:
                linear = getattr(module, "base_layer", module)
                if hasattr(module, "base_layer") and _odd_adapter(module):
                    return "LoRA의 변형(DoRA, bias, 여러 어댑터)"
                kind = weight_kind(linear)
                if kind is None or (kind == WIDE and linear.weight.dtype != dtype):
                    return f"{type(linear).__name__}({linear.weight.dtype}) 가중치"
                state = getattr(linear.weight, "quant_state", None)
                kinds.add((kind, state is not None and state.nested))
    return None if len(kinds) == 1 else "층마다 꼴이 다른 가중치"


def weight_kind(linear) -> int | None:
    """선형층의 가중치의 꼴. 커널이 모르는 꼴이면 None."""
    state = getattr(linear.weight, "quant_state", None)
    if state is not None:
        known = (state.quant_type, state.blocksize, linear.weight.dtype) == ("nf4", NF4_BLOCK, torch.uint8)
        return NF4 if known else None
    if linear.weight.dtype == torch.int8:
        return INT8 if _int8_scales(linear) is not None else None
    return WIDE if type(linear) is torch.nn.Linear else None


def unwrap(module) -> tuple:
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


def _whole_rows(weight: torch.Tensor) -> torch.Tensor:
    """행을 16의 배수까지 0으로 채운다. 알려진 모델은 이미 배수이므로 베끼지 않는다."""
    return weight if len(weight) % ROWS == 0 else torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % ROWS))


def _int8_scales(linear) -> torch.Tensor | None:
    """bitsandbytes의 int8 선형층의 행마다의 절댓값. 127로 나누면 배율이다. 한 번 계산한 뒤에는 state로 옮겨져 있다."""
    scales = getattr(linear.weight, "SCB", None)
    return getattr(getattr(linear, "state", None), "SCB", None) if scales is None else scales


def _matrix(linear) -> Matrix:
    weight, state = linear.weight.detach(), getattr(linear.weight, "quant_state", None)
    if state is None:
        scales = _int8_scales(linear)
        row_scale = None if scales is None else scales.float().to(weight.device) / 127
        return Matrix(weight.contiguous(), None, None, 0.0, row_scale, tuple(weight.shape))
    if state.nested:
        return Matrix(weight, state.absmax, state.state2.absmax, float(state.offset), None, tuple(state.shape))
    return Matrix(weight, state.absmax.float(), None, 0.0, None, tuple(state.shape))
