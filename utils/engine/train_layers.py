"""학습 엔진이 모델에서 읽는 것: 층마다의 가중치와 LoRA, 그리고 CPU 메모리에 두는 입력 embedding."""

from dataclasses import dataclass

import torch
from torch import nn

from utils.engine.families import LayerModules, layer_modules, unwrap
from utils.engine.family import Family
from utils.engine.norms import Norm, read_norm
from utils.engine.train_memory import Tails, pad_rank
from utils.model.adapter import base_of

SITES = 8  # 한 층에서 dropout을 거는 자리의 수보다 작지 않은 2의 거듭제곱


class HostEmbedding(nn.Module):
    """핀 고정된 CPU 메모리에 두고 필요한 행만 PCIe로 읽는 입력 embedding. VRAM을 쓰지 않는다.

    표를 매개변수로 두지 않으므로 모델의 장치를 묻는 코드는 여전히 GPU라고 답을 얻는다.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.device = weight.device
        table = weight.detach().cpu()
        self.table = table.pin_memory() if weight.is_cuda else table

    @property
    def weight(self) -> torch.Tensor:
        return self.table

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table[input_ids.cpu()].to(self.device)


def move_embedding(base: nn.Module) -> None:
    """입력 embedding을 CPU 메모리로 옮긴다. 출력 행렬과 한 tensor인 것은 어차피 GPU에 있어야 하므로 부르지 않는다."""
    embedding = base.get_input_embeddings()
    if type(embedding) is nn.Embedding:
        base.set_input_embeddings(HostEmbedding(embedding.weight))


def restore_embedding(model: nn.Module) -> None:
    """`HostEmbedding`을 GPU의 평범한 embedding으로 되돌린다. 학습 뒤의 답 만들기는 GPU에 있는 표를 읽는다."""
    base = base_of(model)
    host = base.get_input_embeddings()
    if isinstance(host, HostEmbedding):
        base.set_input_embeddings(nn.Embedding.from_pretrained(host.table.to(host.device), freeze=True))


@dataclass(frozen=True)
class Adapter:
    """선형층 하나의 LoRA. 출력에 `scale * B dropout(u) A^T`를 더한다.

    Attributes:
        lora_a, lora_b: 매개변수 fp32 [rank, 입력], [출력, rank]. gradient는 그 `.grad`에 더한다.
        padded: 8의 배수로 올린 rank.
        dropout: 버리는 확률.
        site: dropout의 난수를 고르는 번호. 층과 선형층마다 다르다.
        row, rows: 쌓은 출력에서 이 선형층의 첫 행과 행의 수.
        column: 입력 끝의 LoRA 칸에서 이 선형층의 첫 칸.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    rank: int
    padded: int
    scale: float
    dropout: float
    site: int
    row: int
    rows: int
    column: int


@dataclass(frozen=True)
class Projection:
    """같은 입력을 읽어 행렬 곱 하나로 계산하는 선형층들.

    쌓은 가중치는 [rows, columns + tail]이고, 입력도 [tokens, columns + tail]이다. 끝의 tail 칸에서 가중치는 자기의
    `scale * B`, 입력은 `z = dropout(u) A^T`라서 LoRA가 그 행렬 곱에 함께 들어간다.

    Attributes:
        linears: PEFT를 벗긴 층들.
        bias: 쌓은 bias [rows], 모델의 dtype. 하나도 없으면 None.
    """

    linears: tuple[nn.Module, ...]
    adapters: tuple[Adapter, ...]
    bias: torch.Tensor | None
    rows: int
    columns: int
    tail: int


@dataclass(frozen=True)
class Layer:
    """층 하나의 가중치와 상수. 없는 norm은 None이다.

    Attributes:
        post1, post2: 출력에 거는 norm. 잔차의 배율을 곱해 두었다.
        out_bias, down_bias: 잔차에 더하는 bias fp32 [hidden]. 잔차의 배율을 곱해 두었다. 없으면 None.
        window: 볼 수 있는 토큰의 수. 0이면 모두 본다.
        turn: 몇째 rotary 표로 돌리는지. 음수면 돌리지 않는다.
    """

    index: int
    norm1: Norm | None
    norm2: Norm | None
    post1: Norm | None
    post2: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    qkv: Projection
    out: Projection
    mlp: Projection
    down: Projection
    out_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    window: int
    turn: int

    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.out, self.mlp, self.down


def read_layers(base: nn.Module, family: Family, dtype: torch.dtype) -> list[Layer]:
    """모델의 모든 층. 큰 가중치는 베끼지 않는다."""
    return [_layer(index, modules, family, dtype) for index, modules in enumerate(layer_modules(base, family))]


def largest_tails(layers: list[Layer]) -> Tails:
    """층마다 LoRA를 붙인 곳이 다를 수 있으므로 곳마다 가장 넓은 것."""
    return Tails(*(max(projection.tail for projection in place)
                   for place in zip(*(layer.projections() for layer in layers), strict=True)))


def _layer(index: int, modules: LayerModules, family: Family, dtype: torch.dtype) -> Layer:
    site, projections = index * SITES, []
    for group in modules.linears():
        projections.append(_projection(group, site, dtype))
        site += len(group)
    qkv, out, mlp, down = projections
    scale = family.residual_scale
    biases = [None if part.bias is None or family.post_norm else part.bias.float() * scale for part in (out, down)]
    if family.parallel and biases[0] is not None:  # 두 출력을 같은 잔차에 더하므로 한꺼번에 더한다
        biases = [biases[0] + biases[1], None]
    return Layer(
        index, read_norm(modules.norm1, family), read_norm(modules.norm2, family),
        read_norm(modules.post1, family, scale), read_norm(modules.post2, family, scale),
        read_norm(modules.q_norm, family), read_norm(modules.k_norm, family), qkv, out, mlp, down, *biases,
        family.windows[index], family.turns[index])


def _projection(modules: tuple[nn.Module, ...], site: int, dtype: torch.dtype) -> Projection:
    linears = tuple(unwrap(module) for module in modules)
    adapters, row, column = [], 0, 0
    for offset, (module, linear) in enumerate(zip(modules, linears, strict=True)):
        if module is not linear:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            rank = a.shape[0]
            adapters.append(Adapter(a, b, rank, pad_rank(rank), float(module.scaling["default"]),
                                    float(getattr(module.lora_dropout["default"], "p", 0.0)), site + offset, row,
                                    linear.out_features, column))
            column += pad_rank(rank)
        row += linear.out_features
    bias = None
    if any(linear.bias is not None for linear in linears):
        device = next(linear.bias for linear in linears if linear.bias is not None).device
        bias = torch.cat([torch.zeros(linear.out_features, dtype=dtype, device=device) if linear.bias is None
                          else linear.bias.detach().to(dtype) for linear in linears])
    return Projection(linears, tuple(adapters), bias, row, linears[0].in_features, column)
