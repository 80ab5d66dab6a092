"""질문을 읽는다: 행렬 곱으로 층을 지나며 KV cache를 채운다. 긴 질문은 조각으로 나누고 짧은 질문 여럿은 함께 읽는다."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from utils.engine.decode_plan import INT8, NF4, THREADS, WIDE
from utils.engine.decode_step import DecodeStep
from utils.engine.weights import Adapter, Layer, Linear, Matrix, Norm

CAPTURED = 32, 64, 128  # 한 조각으로 끝나는 짧은 질문의 길이. 질문은 이 가운데 하나로 채운다
PIECE = 512             # 긴 질문을 나누어 읽는 길이
TOGETHER = 2048         # 질문 여럿을 함께 읽을 때 한 번에 읽는 토큰의 수
BUFFER = 4 * 1024 ** 2  # 양자화된 가중치를 풀어 두는 자리(16비트 수의 개수)


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
        self._buffer = None if self._weights.kind == WIDE else torch.empty(BUFFER, dtype=self._weights.dtype,
                                                                           device=self._device)
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
        return self._read(input_ids, self._step.cache.table)

    def _read(self, input_ids: list[int], table: torch.Tensor) -> torch.Tensor:
        """질문 하나를 조각마다 읽은 마지막 토큰의 잔차."""
        ids = torch.tensor([input_ids])
        with self._aside():
            for past in range(0, len(input_ids), PIECE):
                self._past.fill_(past)
                x = self._piece(ids[:, past : past + PIECE].to(self._device), past, table)
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

    @torch.inference_mode()
    def read_lines(self, questions: list[list[int]], tables: torch.Tensor) -> torch.Tensor:
        """질문 여럿을 읽는다. 짧은 것은 길이가 비슷한 것끼리 가장 긴 길이로 채워 함께 지난다.

        Args:
            tables: 질문마다의 쪽의 주소 int64 [질문, 쪽의 최대 수]. 쪽은 이미 있어야 한다.

        Returns:
            질문마다의 마지막 토큰의 잔차 fp32 [질문, hidden].
        """
        x = torch.empty(len(questions), self._weights.family.hidden, device=self._device)
        order = sorted(range(len(questions)), key=lambda index: len(questions[index]))
        small, self._buffer = self._buffer, self._whole_buffer()
        try:
            while order:  # 긴 것부터. PIECE를 넘는 것은 하나씩 조각으로 읽는다
                longest = len(questions[order[-1]])
                count = max(1, TOGETHER // longest) if longest <= PIECE else 1
                group, order = order[-count:], order[:-count]
                chosen, table = [questions[index] for index in group], tables[group]  # 골라낸 줄은 이어진 사본이다
                x[group] = self._read_group(chosen, table) if count > 1 else self._read(chosen[0], table)
        finally:
            self._buffer = small
        return x

    def _read_group(self, questions: list[list[int]], table: torch.Tensor) -> torch.Tensor:
        """짧은 질문들을 가장 긴 길이로 채워 함께 읽은, 마지막 토큰의 잔차 [질문, hidden].

        채운 토큰은 뒤에 있어서 앞의 토큰이 보지 않고, 그 자리의 K, V는 답의 토큰이 덮는다.
        """
        longest = max(map(len, questions))
        lengths = torch.tensor([len(question) for question in questions])
        padded = torch.tensor([question + [0] * (longest - len(question)) for question in questions])
        last = (torch.arange(len(questions)) * longest + lengths - 1).to(self._device)
        with self._aside():
            self._past.zero_()
            return self._piece(padded.to(self._device), 0, table)[last]

    def _whole_buffer(self) -> torch.Tensor | None:
        """가장 큰 행렬이 통째로 들어가는 자리. 여럿을 읽을 때는 나누어 푸는 것보다 커널을 덜 부르는 쪽이 빠르다."""
        if self._buffer is None:
            return None
        return torch.empty(self._largest_matrix(), dtype=self._buffer.dtype, device=self._device)

    def _largest_matrix(self) -> int:
        layer = self._weights.layers[0]
        return max(rows * columns for linear in (layer.qkv, layer.out, layer.mlp, layer.down)
                   for rows, columns in (part.shape for part in linear.parts))

    def bytes_together(self) -> int:
        """여럿을 함께 읽는 동안 드는 메모리(바이트): 푼 행렬과, 층 하나의 활성값."""
        family = self._weights.family
        widths = 8 * family.hidden + 4 * family.qkv_width + 2 * family.q_width + 6 * family.mlp_width
        return 2 * self._largest_matrix() + TOGETHER * widths

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
            ids, table = torch.zeros(1, size, dtype=torch.long, device=self._device), self._step.cache.table
            graph = torch.cuda.CUDAGraph()
            with self._aside():
                self._piece(ids, 0, table)
            self._stream.synchronize()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                x = self._piece(ids, 0, table)
            self._graphs[key] = graph, ids[0], x
        return self._graphs[key]

    def _piece(self, ids: torch.Tensor, past: int, table: torch.Tensor) -> torch.Tensor:
        """질문들의 토큰 ids [질문, T]가 past번째부터 오는 조각. 잔차 fp32 [질문 * T, hidden]을 준다.

        Args:
            table: 질문마다의 쪽의 주소. 질문이 여럿이면 past는 0이다.
        """
        x = F.embedding(ids.flatten(), self._weights.embedding).float() * self._weights.embedding_scale
        for index, layer in enumerate(self._weights.layers):
            self._layer(x, index, layer, past, len(ids), table)
        return x

    def _layer(self, x: torch.Tensor, index: int, layer: Layer, past: int, lines: int, table: torch.Tensor) -> None:
        """x [질문 * T, hidden]에 층 하나를 더한다."""
        parallel = self._weights.family.parallel
        second = self._mlp(self._normalize(x, layer.norm2), layer) if parallel else None
        self._add(x, self._attend(self._normalize(x, layer.norm1), index, layer, past, lines, table), layer.post1)
        self._add(x, second if parallel else self._mlp(self._normalize(x, layer.norm2), layer), layer.post2)

    def _attend(self, x: torch.Tensor, index: int, layer: Layer, past: int, lines: int,
                table: torch.Tensor) -> torch.Tensor:
        """x [질문 * T, hidden] -> attention의 출력 [질문 * T, hidden]. 이 조각의 K, V를 cache에 적는다."""
        family, tokens = self._weights.family, len(x) // lines
        total, block = past + tokens, (-(-family.head_dim // 32) * 32,)
        argument = self._step.attention_argument(index)
        qkv = self._product(x, layer.qkv)
        query = x.new_empty(lines, family.heads, tokens, family.head_dim)
        keys, values = x.new_empty(2, lines, family.kv_heads, total, family.head_dim)
        if past:
            self._kernels["read_cache"]((past, family.kv_heads), block, table, index, total, keys, values)
        self._kernels["split_heads"]((tokens, family.heads + family.kv_heads, lines), (128,), qkv, argument, table,
                                     self._past, tokens, total, query, keys, values)
        attention = self._attention(query, keys, values, family.windows[index])
        return self._product(attention.transpose(1, 2).reshape(len(x), -1), layer.out)

    def _attention(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int) -> torch.Tensor:
        """query [질문, heads, T, d], keys와 values [질문, kv_heads, total, d]. T는 total의 끝에 맞춘다."""
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
        return self._product(gate if up is None else gate * up, layer.down)

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
            self._multiply(x, part, out[:, begin : begin + part.shape[0]])
            begin += part.shape[0]
        if linear.bias is not None:
            out += linear.bias  # fp32로 더해 16비트로 적는다
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

    def _multiply(self, x: torch.Tensor, matrix: Matrix, out: torch.Tensor) -> None:
        """out [T, 출력] = x [T, 입력] W^T. 양자화된 행렬은 행을 나누어 풀면서 곱한다."""
        if self._weights.kind == WIDE:
            torch.mm(x, matrix.weight.t(), out=out)
            return
        rows, columns = matrix.shape
        at_once = max(1, len(self._buffer) // columns)
        for begin in range(0, rows, at_once):
            end = min(begin + at_once, rows)
            part = self._buffer[: (end - begin) * columns].view(end - begin, columns)
            self._widen(matrix, part, begin)
            torch.mm(x, part.t(), out=out[:, begin:end])

    def _widen(self, matrix: Matrix, part: torch.Tensor, begin: int) -> None:
        """행렬의 begin번째 행부터를 16비트 part [행, 입력]에 푼다."""
        count = part.numel() // 8
        grid, block = (-(-count // 256),), (256,)
        if self._weights.kind == NF4:
            self._kernels["dequantize"](grid, block, matrix.weight, matrix.scale, matrix.group, matrix.offset,
                                        self._weights.code, part, begin, part.shape[1], count)
        elif self._weights.kind == INT8:
            self._kernels["widen_int8"](grid, block, matrix.weight, matrix.row_scale, part, begin, part.shape[1], count)
