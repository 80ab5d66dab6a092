"""토큰 하나를 만드는 커널들의 차례와, 그 커널들이 읽고 쓰는 메모리."""

import ctypes
from collections.abc import Callable

import torch

from utils.engine.decode_plan import ATTENDERS, CHOOSERS, SPLITS, THREADS, Plan
from utils.engine.family import Family
from utils.engine.kv_cache import KvCache
from utils.engine.norms import Norm
from utils.engine.weights import Adapter, Layer, Linear, Weights

KERNELS = ["project", "attend", "head", "choose"]
READ_KERNELS = ["read_lora", "read_linear", "read_many", "activate_rows", "normalize", "split_heads", "join_heads",
                "read_cache"]
LINES_KERNELS = ["project_lines", "head_lines"]
PARALLEL_KERNELS = ["contract", "contract_lines"]
SEQUENTIAL_KERNELS = ["contract_attention", "contract_mlp", "contract_attention_lines", "contract_mlp_lines"]
PARTS = ("qkv", "out", "mlp", "down")


class MatrixArgument(ctypes.Structure):
    """커널의 `Matrix`."""

    _fields_ = [("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("group", ctypes.c_void_p),
                ("offset", ctypes.c_float)]


class LinearArgument(ctypes.Structure):
    """커널의 `Linear`."""

    _fields_ = [("part", MatrixArgument * 3), ("lora_a", MatrixArgument)] + [
        (name, ctypes.c_void_p) for name in ("bias", "row_scale", "lora_b")]


class LoraOfActArgument(ctypes.Structure):
    """커널의 `LoraOfAct`."""

    _fields_ = [("a", ctypes.c_void_p), ("partial", ctypes.c_void_p), ("scale", ctypes.c_float)]


class NormArgument(ctypes.Structure):
    """커널의 `Norm`."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class ResidualArgument(ctypes.Structure):
    """커널의 `Residual`."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "y", "post", "x_out")]


class AttentionArgument(ctypes.Structure):
    """커널의 `Attention`."""

    _fields_ = [("layer", ctypes.c_int), ("window", ctypes.c_int), ("turn", ctypes.c_int),
                ("q_norm", ctypes.c_void_p), ("k_norm", ctypes.c_void_p)]


class AttendArgument(ctypes.Structure):
    """커널의 `Attend`."""

    _fields_ = [("attention", AttentionArgument)] + [(name, ctypes.c_void_p)
                                                     for name in ("pages", "state", "done", "out")]


class DecodeStep:
    """토큰 하나의 커널들. 잔차와 상태를 담은 메모리를 쥔다.

    Args:
        kernels: 이름마다의 커널. `kernel(grid, block, *args, shared=, overlap=)`로 실행한다.

    Attributes:
        x: 잔차 fp32 [hidden]. 시작할 때 마지막 질문 토큰의 잔차를 넣는다.
        state: int32 [6]: 위치, 답의 길이, top_k, n-gram의 크기, 시드 둘.
        settings: fp32 [3]: 온도, top_p, 페널티.
        told: 고른 토큰 int32 [문맥]. 핀 고정된 CPU 메모리라서 GPU를 기다리지 않고 읽는다.
        adapter_on: fp32 [1]. 0이면 어댑터를 더하지 않는다.
    """

    def __init__(self, weights: Weights, plan: Plan, kernels: dict[str, Callable], vocab: int):
        self.weights, self.plan, self.kernels = weights, plan, kernels
        family, device = weights.family, weights.embedding.device
        self.cache = KvCache(family, weights.rotary, device)
        q_dim, kv_dim = family.heads * family.head_dim, family.kv_heads * family.head_dim
        self.x = torch.zeros(family.hidden, device=device)
        self._other_x = torch.zeros_like(self.x)
        self._y = torch.zeros_like(self.x)
        self._qkv = torch.zeros(q_dim + 2 * kv_dim, device=device)
        self._attended = torch.zeros(2, q_dim, dtype=torch.int16, device=device)
        self._act = torch.zeros(2, family.ff, dtype=torch.int16, device=device)
        self._partial = torch.zeros(family.heads, SPLITS, family.head_dim + 2, device=device)
        self._done = torch.zeros(2 * family.heads, dtype=torch.int32, device=device)
        self.logits = torch.zeros(-(-vocab // 4) * 4, device=device)[:vocab]  # 커널은 16바이트씩 읽는다
        self.state = torch.zeros(6, dtype=torch.int32, device=device)
        self.settings = torch.zeros(3, device=device)
        self.adapter_on = torch.ones(1, device=device)
        self.answer = torch.zeros(family.context, dtype=torch.int32, device=device)
        self.told = torch.zeros(family.context, dtype=torch.int32)
        if device.type == "cuda":
            self.told = self.told.pin_memory()
        self._lora_partial = torch.zeros(plan.mlp_blocks * max(1, weights.rank), device=device)
        self._layers = [self._arguments(index, layer) for index, layer in enumerate(weights.layers)]
        self.head_argument = LinearArgument()
        self.head_argument.part[0] = MatrixArgument(weights.head.data_ptr(), None, None, 0.0)

    def run(self, overlap: bool, soon: bool = False) -> None:
        """토큰 하나: `x`를 층마다 지나 로짓을 얻고 다음 토큰을 골라 그 embedding을 `x`에 넣는다.

        Args:
            overlap: 앞 커널이 끝나기 전에 다음 커널을 시작하게 한다(compute capability 9.0부터).
            soon: q, k, v를 곱하는 커널이 attention까지 센다. 볼 위치가 `Plan.attend_soon` 이하일 때만 켠다.
        """
        plan, kernels, family = self.plan, self.kernels, self.weights.family
        code, adapter = self.weights.code, self.adapter_on
        pending = None  # 아직 잔차에 더하지 않은 y의 norm(POST_NORM)
        for index, (layer, arguments) in enumerate(zip(self.weights.layers, self._layers, strict=True)):
            linear, attention, lora = arguments
            norm1, norm2 = norm_argument(layer.norm1), norm_argument(layer.norm2)
            project = (norm1, linear["qkv"], norm2, linear["mlp"], lora, code, adapter)
            contract = (self.x, self._y, self._attended, self._act, code, adapter, linear["out"], linear["down"], lora)
            grid = plan.project_qkv
            kernels["project"]((grid.blocks,), (THREADS,), self._residual(self.x, pending, self._other_x), *project,
                               plan.qkv_blocks, grid.slots, self._qkv, self._act,
                               self._attend(attention) if soon else AttendArgument(), shared=grid.shared,
                               overlap=overlap and index > 0)
            if not soon:
                kernels["attend"]((family.heads // plan.queries, SPLITS), (ATTENDERS,), self._qkv, attention,
                                  self.cache.table, self.state, self._partial, self._done, self._attended,
                                  overlap=overlap)
            grid = plan.contract_out
            if family.parallel:
                kernels["contract"]((grid.blocks,), (THREADS,), *contract, grid.slots // 2, shared=grid.shared,
                                    overlap=overlap)
                continue
            kernels["contract_attention"]((grid.blocks,), (THREADS,), *contract, grid.slots, shared=grid.shared,
                                          overlap=overlap)
            # 출력의 norm이 있으면 두 잔차 x를 번갈아 쓴다. 다른 블록이 읽는 x를 고치지 않기 위해서다
            source, target = (self._other_x, self.x) if family.post_norm else (self.x, None)
            grid = plan.project_mlp
            kernels["project"]((grid.blocks,), (THREADS,), self._residual(source, layer.post1, target), *project,
                               0, grid.slots, self._qkv, self._act, AttendArgument(), shared=grid.shared,
                               overlap=overlap)
            grid = plan.contract_down
            kernels["contract_mlp"]((grid.blocks,), (THREADS,), *contract, grid.slots, shared=grid.shared,
                                    overlap=overlap)
            pending = layer.post2
        self.choose(overlap, pending)

    def choose(self, overlap: bool, pending: Norm | None = None) -> None:
        """`x`의 로짓을 얻고 다음 토큰을 고른다."""
        weights, grid = self.weights, self.plan.head
        self.kernels["head"]((grid.blocks,), (THREADS,), self._residual(self.x, pending, None),
                             norm_argument(weights.final_norm), self.head_argument, self.logits, grid.slots,
                             shared=grid.shared, overlap=overlap)
        self.pick(overlap)

    def pick(self, overlap: bool = False) -> None:
        """지금의 로짓에서 다음 토큰을 고른다."""
        self.kernels["choose"]((1,), (CHOOSERS,), self.logits, self.state, self.settings, self.answer, self.told,
                               self.weights.embedding, self.x, shared=self.plan.choose_shared, overlap=overlap)

    def linear_arguments(self, index: int) -> dict[str, LinearArgument]:
        return self._layers[index][0]

    def attention_argument(self, index: int) -> AttentionArgument:
        return self._layers[index][1]

    def _attend(self, attention: AttentionArgument) -> AttendArgument:
        return AttendArgument(attention, *map(_pointer, (self.cache.table, self.state, self._done, self._attended)))

    def _residual(self, x: torch.Tensor, post: Norm | None, target: torch.Tensor | None) -> ResidualArgument:
        if post is None:
            return ResidualArgument(x.data_ptr(), None, None, None if target is None else target.data_ptr())
        return ResidualArgument(x.data_ptr(), self._y.data_ptr(), post.weight.data_ptr(),
                                None if target is None else target.data_ptr())

    def _arguments(self, index: int, layer: Layer) -> tuple[dict[str, LinearArgument], AttentionArgument,
                                                            LoraOfActArgument]:
        linears = {name: self._linear(getattr(layer, name), name) for name in PARTS}
        family, adapter = self.weights.family, layer.down.adapter
        attention = AttentionArgument(index, family.windows[index], family.turns[index], _pointer(layer.q_norm),
                                      _pointer(layer.k_norm))
        return linears, attention, lora_of_act(adapter, self._lora_partial)

    def _linear(self, linear: Linear, name: str) -> LinearArgument:
        argument = LinearArgument()
        for place, part in enumerate(linear.parts):
            argument.part[place] = MatrixArgument(_pointer(part.weight), _pointer(part.scale), _pointer(part.group),
                                                  part.offset)
        argument.bias, argument.row_scale = _pointer(linear.bias), _pointer(linear.row_scale)
        if linear.adapter is not None:
            argument.lora_b = _pointer(linear.adapter.up)
            if name != "down":
                argument.lora_a = MatrixArgument(_pointer(linear.adapter.down), None, None, 0.0)
        return argument


def kernel_names(family: Family) -> list[str]:
    post = ["post_lines"] if family.post_norm else []
    return KERNELS + READ_KERNELS + LINES_KERNELS + post + (PARALLEL_KERNELS if family.parallel else SEQUENTIAL_KERNELS)


def lora_of_act(adapter: Adapter | None, partial: torch.Tensor) -> LoraOfActArgument:
    """MLP의 뒤쪽 행렬에 붙은 LoRA. 블록들의 몫을 partial에 적는다."""
    if adapter is None:
        return LoraOfActArgument()
    return LoraOfActArgument(adapter.down_fp32.data_ptr(), partial.data_ptr(), adapter.scaling)


def norm_argument(norm: Norm | None) -> NormArgument:
    return NormArgument() if norm is None else NormArgument(_pointer(norm.weight), _pointer(norm.bias))


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
