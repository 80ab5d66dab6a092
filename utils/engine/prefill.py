"""질문을 읽는다: 질문을 조각으로 나누어 행렬 곱으로 지나며 KV cache를 채운다."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from utils.engine.decode_plan import INT8, NF4, SPLIT_THREADS, THREADS, WIDE
from utils.engine.decode_step import DecodeStep
from utils.engine.norms import Norm
from utils.engine.weights import Adapter, Layer, Linear, Matrix

CAPTURED = 32, 64, 128  # 한 조각으로 끝나는 짧은 질문의 길이. 질문은 이 가운데 하나로 채운다
PIECE = 512             # 긴 질문을 나누어 읽는 길이
BUFFER = 16 * 1024 ** 2  # 양자화된 가중치를 풀어 두는 가장 큰 자리(16비트 수의 개수). 1.3b의 행렬 하나가 다 들어간다


class Prefill:
    """질문의 토큰을 읽어 cache를 채우고 마지막 토큰의 잔차 fp32 [hidden]을 돌려준다.

    짧은 질문은 길이마다 CUDA graph로 캡처해 둔다. 커널을 하나씩 부르는 시간이 계산보다 길기 때문이다. 긴 질문은
    조각마다 앞 조각들의 K, V를 cache에서 풀어 함께 본다. 메모리는 층 하나의 K, V만큼만 든다.

    Attributes:
        adapter_on: 어댑터를 더할지.
    """

    def __init__(self, step: DecodeStep):
        self.adapter_on = True
        self._step, self._weights, self._kernels = step, step.weights, step.kernels
        self._device = self._weights.embedding.device
        largest = max(rows * columns for rows, columns in self._weights.shapes())
        self._buffer = None if self._weights.kind == WIDE else torch.empty(
            min(BUFFER, largest), dtype=self._weights.dtype, device=self._device)
        self._past = torch.zeros(1, dtype=torch.int32, device=self._device)
        self._pool = self._stream = None
        if self._device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # cuBLAS는 stream마다 32 MB를 잡는다. 그래서 모두 이 하나에서 계산한다
        self._graphs: dict[tuple[int, bool], tuple] = {}

    @torch.inference_mode()
    def __call__(self, input_ids: list[int]) -> torch.Tensor:
        ids = torch.tensor(input_ids)
        if self._pool is not None and len(ids) <= CAPTURED[-1]:
            graph, captured_ids, x = self._graph(next(size for size in CAPTURED if size >= len(ids)))
            captured_ids[: len(ids)].copy_(ids)
            self._past.zero_()
            graph.replay()
            return x[len(ids) - 1]
        with self._aside():
            for past in range(0, len(ids), PIECE):
                self._past.fill_(past)
                x = self._piece(ids[past : past + PIECE].to(self._device), past)
        return x[-1]

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
        """(graph, 토큰을 넣는 자리 [size], 잔차가 나오는 자리 [size, hidden])."""
        key = size, self.adapter_on
        if key not in self._graphs:
            ids = torch.zeros(size, dtype=torch.long, device=self._device)
            graph = torch.cuda.CUDAGraph()
            with self._aside():
                self._piece(ids, 0)
            self._stream.synchronize()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                x = self._piece(ids, 0)
            self._graphs[key] = graph, ids, x
        return self._graphs[key]

    def _piece(self, ids: torch.Tensor, past: int) -> torch.Tensor:
        """토큰 ids [T]가 past번째부터 오는 조각. 잔차 fp32 [T, hidden]을 준다."""
        x = F.embedding(ids, self._weights.embedding).float() * self._weights.embedding_scale
        for index, layer in enumerate(self._weights.layers):
            self._layer(x, index, layer, past)
        return x

    def _layer(self, x: torch.Tensor, index: int, layer: Layer, past: int) -> None:
        """x [T, hidden]에 층 하나를 더한다."""
        parallel = self._weights.family.parallel
        second = self._mlp(self._normalize(x, layer.norm2), layer) if parallel else None
        self._add(x, self._attend(self._normalize(x, layer.norm1), index, layer, past), layer.post1)
        self._add(x, second if parallel else self._mlp(self._normalize(x, layer.norm2), layer), layer.post2)

    def _attend(self, x: torch.Tensor, index: int, layer: Layer, past: int) -> torch.Tensor:
        """x [T, hidden] -> attention의 출력 [T, hidden]. 이 조각의 K, V를 cache에 적는다."""
        family, tokens, cache = self._weights.family, len(x), self._step.cache
        total, block = past + tokens, (-(-family.head_dim // 32) * 32,)
        argument = self._step.attention_argument(index)
        qkv = self._product(x, layer.qkv)
        query = x.new_empty(1, family.heads, tokens, family.head_dim)
        keys, values = x.new_empty(2, 1, family.kv_heads, total, family.head_dim)
        if past:
            self._kernels["read_cache"]((past, family.kv_heads), block, cache.table, index, total, keys, values)
        self._kernels["split_heads"]((tokens, family.heads + family.kv_heads), (SPLIT_THREADS,), qkv, argument,
                                     cache.table, self._past, tokens, total, query, keys, values)
        attention = self._attention(query, keys, values, family.windows[index])
        return self._product(attention[0].transpose(0, 1).reshape(tokens, -1), layer.out)

    def _attention(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int) -> torch.Tensor:
        """query [1, heads, T, d], keys와 values [1, kv_heads, total, d]. T는 total의 끝에 맞춘다."""
        family, tokens, total = self._weights.family, query.shape[2], keys.shape[2]
        if window and total > window:  # 조각의 첫 토큰이 볼 수 있는 데부터만 본다
            begin = max(0, total - tokens - window + 1)
            keys, values = keys[:, :, begin:], values[:, :, begin:]
            rows = torch.arange(total - tokens, total, device=query.device)[:, None]
            columns = torch.arange(begin, total, device=query.device)
            mask, causal = (columns <= rows) & (columns > rows - window), False
        else:
            mask, causal = (None, True) if tokens == total else (causal_lower_right(tokens, total), False)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal,
                                              scale=family.attention_scale, enable_gqa=family.heads != family.kv_heads)

    def _mlp(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        """x [T, hidden] -> MLP의 출력 [T, hidden]."""
        family, both = self._weights.family, self._product(x, layer.mlp)
        gate, up = both.split(family.ff, dim=1) if family.gated else (both, None)
        if family.activation == "silu":
            gate = F.silu(gate)
        else:
            gate = F.gelu(gate, approximate="tanh" if family.activation == "gelu_tanh" else "none")
        return self._product(gate if up is None else gate.mul_(up), layer.down)

    def _normalize(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """x fp32 [T, hidden] -> 16비트 [T, hidden]."""
        if norm is None:
            return x.to(self._weights.dtype)
        out = torch.empty_like(x, dtype=self._weights.dtype)
        self._kernels["normalize"]((len(x),), (THREADS,), x, norm.weight, norm.bias, out, None)
        return out

    def _add(self, x: torch.Tensor, output: torch.Tensor, post: Norm | None) -> None:
        """선형층의 출력 16비트 [T, hidden]을 잔차 x에 더한다. 출력의 norm이 있으면 그것을 건다."""
        if post is None:
            x.add_(output, alpha=self._weights.family.residual_scale)
        else:
            self._kernels["normalize"]((len(x),), (THREADS,), output.float(), post.weight, post.bias, None, x)

    def _product(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """x [T, 입력] -> [T, 나란한 행렬들의 출력]. 어댑터가 켜져 있으면 더한다."""
        out = x.new_empty(len(x), linear.rows)
        begin = 0
        for part in linear.parts:
            end = begin + part.shape[0]
            bias = None if linear.bias_half is None else linear.bias_half[begin:end]
            self._multiply(x, part, bias, out[:, begin:end])
            begin = end
        if linear.adapter is not None and self.adapter_on:
            self._adapt(x, linear.adapter, out)
        return out

    def _adapt(self, x: torch.Tensor, adapter: Adapter, out: torch.Tensor) -> None:
        """out [T, 출력]에 B A x를 더한다."""
        down, begin = x @ adapter.down.flatten(0, 1).t(), 0
        for index, up in enumerate(adapter.ups):
            rank = up.shape[1]
            out[:, begin : begin + len(up)].addmm_(down[:, index * rank : (index + 1) * rank], up.t())
            begin += len(up)

    def _multiply(self, x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """out [T, 출력] = x [T, 입력] W^T + bias. 양자화된 행렬은 행을 나누어 풀면서 곱한다."""
        if self._weights.kind == WIDE:
            _affine(x, matrix.weight, bias, out)
            return
        rows, columns = matrix.shape
        at_once = max(1, BUFFER // columns)
        for begin in range(0, rows, at_once):
            end = min(begin + at_once, rows)
            part = self._buffer[: (end - begin) * columns].view(end - begin, columns)
            self._widen(matrix, part, begin)
            _affine(x, part, None if bias is None else bias[begin:end], out[:, begin:end])

    def _widen(self, matrix: Matrix, part: torch.Tensor, begin: int) -> None:
        """행렬의 begin번째 행부터를 16비트 part [행, 입력]에 푼다."""
        count = part.numel() // 8
        grid, block = (-(-count // 256),), (256,)
        if self._weights.kind == NF4:
            self._kernels["dequantize"](grid, block, matrix.weight, matrix.scale, matrix.group, matrix.offset,
                                        self._weights.code, part, begin, part.shape[1], count)
        elif self._weights.kind == INT8:
            self._kernels["widen_int8"](grid, block, matrix.weight, matrix.row_scale, part, begin, part.shape[1], count)


def _affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out [T, 출력] = x [T, 입력] weight^T + bias. bias를 더하는 것은 행렬 곱의 끝에 붙는다."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
