"""질문을 읽는다: 질문을 조각으로 나누어 행렬 곱으로 지나며 KV cache를 채운다."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from utils.engine.decode_plan import SPLIT_THREADS, THREADS
from utils.engine.decode_space import ROWS
from utils.engine.decode_step import DecodeStep, MatrixArgument
from utils.engine.norms import Norm
from utils.engine.read_plan import MANY_ROWS, MANY_TOKENS, READ_TOKENS, READERS
from utils.engine.weights import Adapter, Layer

CAPTURED = 32, 64, 96, 128  # 한 조각으로 끝나는 짧은 질문의 길이. 질문은 이 가운데 하나로 채운다
PIECE = 512             # 긴 질문을 나누어 읽는 길이
MANY = 256              # 토큰이 이만큼이면 블록이 더 크게 맡는 커널로 곱한다
# 짧은 질문의 attention을 고르는 차례. cuDNN은 함께 읽는 질문의 수에 따라 다른 커널을 고를 수 있어 뒤에 둔다
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Group:
    """attention을 함께 세는 질문들. 질문마다 `size`개로 채워 세고, 저마다의 past번째 위치부터 온다.

    Attributes:
        table: 질문마다의 쪽의 주소 [질문의 수, 쪽의 수].
        starts: 질문마다 제 토큰이 시작하는 행과, 마지막 질문이 끝나는 행 int32 [질문의 수 + 1]. None이면 채운 것까지
            이어져 있다.
    """

    table: torch.Tensor
    size: int
    starts: torch.Tensor | None = None
    past: int = 0


class Prefill:
    """질문의 토큰을 읽어 cache를 채우고 마지막 토큰의 잔차 fp32 [hidden]을 돌려준다.

    짧은 질문은 길이마다 CUDA graph로 캡처해 둔다. 커널을 하나씩 부르는 시간이 계산보다 길기 때문이다. 긴 질문은
    조각마다 앞 조각들의 K, V를 cache에서 풀어 함께 본다. 메모리는 층 하나의 K, V만큼만 든다.
    """

    def __init__(self, step: DecodeStep):
        self._step, self._weights, self._kernels = step, step.weights, step.kernels
        self._device = self._weights.embedding.device
        self._grouped = self._weights.family.heads != self._weights.family.kv_heads
        self._backends = [each for each in BACKENDS
                          if not self._grouped or each != SDPBackend.EFFICIENT_ATTENTION]
        self._pool = self._stream = None
        if self._device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
            self._read = torch.zeros(CAPTURED[-1], self._weights.family.hidden, device=self._device)
        self._graphs: dict[int, tuple] = {}

    @torch.inference_mode()
    def __call__(self, input_ids: list[int]) -> torch.Tensor:
        ids, table = torch.tensor(input_ids), self._step.cache.table
        if len(ids) <= CAPTURED[-1]:
            if self._pool is None:
                return self.many([input_ids], table[None])[0]
            graph, captured_ids = self._graph(_captured(len(ids)))
            captured_ids[: len(ids)].copy_(ids)
            graph.replay()
            return self._read[len(ids) - 1]
        with self._aside():
            for past in range(0, len(ids), PIECE):  # 마지막 토큰의 것만 남기고 놓는다
                piece = ids[past : past + PIECE].to(self._device)
                x = self._piece(piece, [Group(table[None], len(piece), past=past)])[-1].clone()
        return x

    @torch.inference_mode()
    def many(self, questions: list[list[int]], tables: torch.Tensor) -> torch.Tensor:
        """질문마다의 마지막 토큰의 잔차 fp32 [질문의 수, hidden]. 짧은 질문은 한 번에 읽는다.

        행렬 곱은 채우지 않은 토큰들을 이어 놓고 한다. 토큰의 수와 상관없이 같은 차례로 더하고, attention은 하나씩 읽을
        때와 같은 길이로 채워 질문마다 세므로, 하나씩 읽은 것과 비트까지 같다.

        Args:
            tables: 질문마다 K, V를 적을 쪽의 주소 [질문의 수, 쪽의 수].
        """
        x = torch.empty(len(questions), self._weights.family.hidden, device=self._device)
        sizes = [_captured(len(question)) for question in questions]
        order = sorted((index for index, size in enumerate(sizes) if size), key=lambda index: sizes[index])
        if order:
            ends = torch.tensor([0] + [len(questions[index]) for index in order]).cumsum(0)
            starts = ends.to(self._device, torch.int32)
            groups, begin = [], 0
            for size, same in groupby(order, key=lambda index: sizes[index]):
                same = list(same)
                groups.append(Group(tables[same], size, starts[begin : begin + len(same) + 1]))
                begin += len(same)
            ids = torch.tensor([token for index in order for token in questions[index]], device=self._device)
            with self._aside():
                x[order] = self._piece(ids, groups)[ends[1:] - 1]
        own = self._step.cache.table.clone()
        for index, question in enumerate(questions):
            if sizes[index] is None:
                self._step.cache.table.copy_(tables[index])
                x[index] = self(question)
        self._step.cache.table.copy_(own)
        return x

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """제 stream에서 계산한다. 앞의 일이 끝난 뒤에 시작하고, 뒤의 일은 이것이 끝난 뒤에 시작한다."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, size: int) -> None:
        """길이 `size`의 graph를 미리 만든다."""
        if self._pool is not None:
            self._graph(size)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _graph(self, size: int) -> tuple:
        """(graph, 토큰을 넣는 자리 [size]). 잔차는 `_read`에 나온다."""
        if size not in self._graphs:
            ids = torch.zeros(size, dtype=torch.long, device=self._device)
            graph, groups = torch.cuda.CUDAGraph(), [Group(self._step.cache.table[None], size)]
            with self._aside():
                self._piece(ids, groups)
            self._stream.synchronize()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                self._read[:size].copy_(self._piece(ids, groups))
            self._graphs[size] = graph, ids
        return self._graphs[size]

    def _piece(self, ids: torch.Tensor, groups: list[Group]) -> torch.Tensor:
        """토큰 ids [T]를 지난 잔차 fp32 [T, hidden]. 질문마다 제 토큰만 본다."""
        x = F.embedding(ids, self._weights.embedding).float() * self._weights.embedding_scale
        for index, layer in enumerate(self._weights.layers):
            self._layer(x, index, layer, groups)
        return x

    def _layer(self, x: torch.Tensor, index: int, layer: Layer, groups: list[Group]) -> None:
        """x [T, hidden]에 층 하나를 더한다."""
        # 다 쓴 것을 바로 놓도록 이름을 붙이지 않고 이어서 부른다
        attention = self._product(
            self._attend(self._product(self._normalize(x, layer.norm1), index, "qkv"), index, groups), index, "out")
        if not self._weights.family.parallel:
            self._add(x, attention, layer.post1)
        second = self._mlp(self._normalize(x, layer.norm2), index)
        if self._weights.family.parallel:
            self._add(x, attention, layer.post1)
        self._add(x, second, layer.post2)

    def _attend(self, qkv: torch.Tensor, index: int, groups: list[Group]) -> torch.Tensor:
        """qkv [T, q + k + v] -> attention의 출력, 선형층의 입력 [T, q]. K, V를 cache에 적는다."""
        attended = qkv.new_empty(len(qkv), self._weights.family.q_width, dtype=self._weights.act_dtype)
        for group in groups:
            self._attend_group(qkv, attended, index, group)
        return attended

    def _attend_group(self, qkv: torch.Tensor, attended: torch.Tensor, index: int, group: Group) -> None:
        """질문들의 attention을 세어 attended의 제 행에 적는다."""
        family, lines, past, size = self._weights.family, len(group.table), group.past, group.size
        total, block = past + size, (-(-family.head_dim // 32) * 32,)
        query = qkv.new_empty(lines, family.heads, size, family.head_dim)
        # 문맥을 넘어 채운 자리에는 적지 않는다. 보지 않는 V도 NaN이면 0을 곱해 NaN이 된다
        make = qkv.new_zeros if total > family.context else qkv.new_empty
        keys, values = make(2, lines, family.kv_heads, total, family.head_dim)
        if past:  # 긴 질문은 하나씩 읽는다
            self._kernels["read_cache"]((past, family.kv_heads), block, group.table, index, total, keys, values)
        self._kernels["split_heads"]((lines * size, family.heads + family.kv_heads), (SPLIT_THREADS,), qkv,
                                     self._step.attention_argument(index), group.table, group.starts, past, size, total,
                                     query, keys, values)
        attention = self._attention(query, keys, values, family.windows[index])
        self._kernels["join_heads"]((lines * size,), (SPLIT_THREADS,), attention, *attention.stride()[:3], group.starts,
                                    size, attended)

    def _attention(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int) -> torch.Tensor:
        """query [줄, heads, T, d], keys와 values [줄, kv_heads, total, d]. T는 total의 끝에 맞춘다."""
        family, tokens, total = self._weights.family, query.shape[2], keys.shape[2]
        if window and total > window:
            lines = zip(query.split(1), keys.split(1), values.split(1), strict=True)
            return torch.cat([self._windowed(*line, window) for line in lines])
        mask, causal = (None, True) if tokens == total else (causal_lower_right(tokens, total), False)
        with sdpa_kernel(self._backends, set_priority=True) if total <= CAPTURED[-1] else nullcontext():
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal,
                                                  scale=family.attention_scale, enable_gqa=self._grouped)

    def _windowed(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int) -> torch.Tensor:
        """가까운 window개만 보는 attention. 줄 하나씩 센다.

        K, V 머리를 q 머리의 수만큼 늘려서 준다. 늘리지 않고 mask와 함께 주면 KV 머리 하나(Gemma 3)를 틀리게 세는 구현이
        있다.
        """
        family, tokens, total = self._weights.family, query.shape[2], keys.shape[2]
        begin = max(0, total - tokens - window + 1)  # 조각의 첫 토큰이 볼 수 있는 데부터만 본다
        rows = torch.arange(total - tokens, total, device=query.device)[:, None]
        columns = torch.arange(begin, total, device=query.device)
        mask = (columns <= rows) & (columns > rows - window)
        keys, values = (one[:, :, begin:].repeat_interleave(family.heads // family.kv_heads, dim=1)
                        for one in (keys, values))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=family.attention_scale)

    def _mlp(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """x [T, hidden] -> MLP의 출력 [T, hidden]."""
        both = self._product(x, index, "mlp")
        # 문이 없으면 제자리에서 바꾼다
        act = x.new_empty(len(x), self._weights.family.ff) if self._weights.family.gated else both.view(x.dtype)
        self._kernels["activate_rows"]((-(-act.numel() // THREADS),), (THREADS,), both, act, act.numel())
        return self._product(act, index, "down")

    def _normalize(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """x fp32 [T, hidden] -> 선형층의 입력 16비트 [T, hidden]."""
        out = torch.empty_like(x, dtype=self._weights.act_dtype)
        weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
        self._kernels["normalize"]((len(x),), (THREADS,), x, weight, bias, out, None)
        return out

    def _add(self, x: torch.Tensor, output: torch.Tensor, post: Norm | None) -> None:
        """선형층의 출력 16비트 [T, hidden]을 잔차 x에 더한다. 출력의 norm이 있으면 그것을 건다."""
        if post is None:
            x.add_(output, alpha=self._weights.family.residual_scale)
        else:
            self._kernels["normalize"]((len(x),), (THREADS,), output.float(), post.weight, post.bias, None, x)

    def _product(self, x: torch.Tensor, index: int, name: str) -> torch.Tensor:
        """x [T, 입력] -> [T, 나란한 행렬들의 출력]. 어댑터가 켜져 있으면 더한다."""
        step, (tokens, columns) = self._step, x.shape
        linear, argument = getattr(self._weights.layers[index], name), step.linear_arguments(index)[name]
        first, second = ([part.shape[0] for part in linear.parts] + [0])[:2]
        z = self._lora_down(x, linear.adapter)
        blocks, row_warps, shared = step.plan.reads.grid(linear.rows)
        out = torch.empty(tokens, linear.rows, dtype=self._weights.dtype, device=x.device)
        name, grid, split = "read_linear", (blocks, -(-tokens // READ_TOKENS)), row_warps
        if tokens >= MANY and step.plan.reads.fits_many:
            name, shared = "read_many", step.plan.reads.many_shared
            grid = -(-linear.rows // MANY_ROWS), -(-tokens // MANY_TOKENS)
            split = (READERS // 32 // row_warps).bit_length() - 1
        self._kernels[name](grid, (READERS,), x, argument, first, second, linear.rows, columns, tokens, split,
                            self._weights.code, z, 0 if z is None else z.shape[1], out, shared=shared)
        return out

    def _lora_down(self, x: torch.Tensor, adapter: Adapter | None) -> torch.Tensor | None:
        """x [T, 입력] -> LoRA의 A x [T, 나란한 행렬의 수 * lora_rows]."""
        if adapter is None:
            return None
        down, (tokens, columns) = adapter.down, x.shape
        rows = down.shape[0] * down.shape[1]
        z = x.new_empty(tokens, rows)
        self._kernels["read_lora"]((-(-rows // ROWS), -(-tokens // 8)), (THREADS,), x,
                                   MatrixArgument(down.data_ptr(), None, None, 0.0), rows, columns, tokens,
                                   self._step.adapter_on, z)
        return z


def _captured(tokens: int) -> int | None:
    """짧은 질문을 채우는 길이. 긴 질문이면 None."""
    return next((size for size in CAPTURED if size >= tokens), None)
