"""GPT-NeoX가 질문을 읽는 일을 맡는다: 질문 전체를 행렬 곱으로 지나며 KV cache를 채운다."""

import torch
import torch.nn.functional as F

from utils.engine.weights import Layer, Matrix, Weights

PIECES = 64, 128        # 질문을 나누어 읽는 길이. 조각은 이 가운데 하나로 채운다
BUFFER = 4 * 1024 ** 2  # NF4를 풀어 두는 자리(16비트 수의 개수)


class Prefill:
    """질문의 토큰을 읽어 cache를 채우고 마지막 토큰의 residual [hidden] fp32를 돌려준다.

    조각의 길이마다 CUDA graph로 캡처해 둔다. 커널을 하나씩 부르는 시간이 계산보다 길기 때문이다. 조각이 시작하는 위치는
    GPU에 있는 수라서 graph 하나로 어느 조각이든 읽는다. 채운 자리의 K, V는 뒤의 토큰이 덮어쓰기 전에는 읽히지 않는다.

    Attributes:
        adapter_on: 어댑터를 더할지.
    """

    def __init__(self, weights: Weights, kernels: dict, sizes: dict[str, int], cache):
        self.adapter_on = True
        self._weights, self._kernels, self._sizes, self._cache = weights, kernels, sizes, cache
        device = weights.embedding.device
        self._buffer = torch.empty(BUFFER, dtype=weights.dtype, device=device) if weights.nf4 else None
        self._past = torch.zeros(1, dtype=torch.int32, device=device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, bool], tuple] = {}
        for size in PIECES:
            self._graph(size)

    def __call__(self, input_ids: list[int]) -> torch.Tensor:
        for past in range(0, len(input_ids), PIECES[-1]):
            part = input_ids[past : past + PIECES[-1]]
            graph, ids, x = self._graph(next(size for size in PIECES if size >= len(part)))
            ids[: len(part)].copy_(torch.tensor(part))
            self._past.fill_(past)
            graph.replay()
        return x[len(part) - 1]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _graph(self, size: int) -> tuple:
        """(graph, 토큰을 넣는 자리 [size], residual이 나오는 자리 [size, hidden])."""
        key = size, self.adapter_on
        if key not in self._graphs:
            ids = torch.zeros(size, dtype=torch.long, device=self._weights.embedding.device)
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._piece(ids)
            stream.synchronize()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                x = self._piece(ids)
            self._graphs[key] = graph, ids, x
        return self._graphs[key]

    def _piece(self, ids: torch.Tensor) -> torch.Tensor:
        columns = torch.arange(self._sizes["CONTEXT"], device=ids.device)
        mask = columns <= self._past + torch.arange(len(ids), device=ids.device)[:, None]
        x = F.embedding(ids, self._weights.embedding).float()
        for layer, cache in zip(self._weights.layers, self._cache.layers, strict=True):
            self._layer(x, layer, cache, mask)
        return x

    def _layer(self, x: torch.Tensor, layer: Layer, cache: tuple, mask: torch.Tensor) -> None:
        """x [T, hidden]에 층 하나를 더한다."""
        tokens, heads, head_dim = len(x), self._sizes["HEADS"], self._sizes["HEAD_DIM"]
        context, block = self._sizes["CONTEXT"], (-(-head_dim // 32) * 32,)
        first, second = (torch.empty_like(x, dtype=self._weights.dtype) for _ in range(2))
        self._kernels["both_norms"]((tokens,), (512,), x, self._weights.eps, *layer.norm1, *layer.norm2, first, second)
        qkv = self._product(first, layer.qkv)
        if layer.adapter and self.adapter_on:
            qkv.addmm_(first @ layer.adapter.down.t(), layer.adapter.up_16bit.t())
        query = qkv.new_empty(1, heads, tokens, head_dim)
        keys, values = qkv.new_empty(2, 1, heads, context, head_dim)
        self._kernels["read_cache"]((context, heads), block, *cache, self._past, keys, values)
        self._kernels["split_heads"]((tokens, heads), block, qkv, self._weights.turns, self._past, tokens, query, keys,
                                     values, *cache)
        attention = F.scaled_dot_product_attention(query, keys, values, mask)
        x += self._product(attention[0].transpose(0, 1).reshape(tokens, -1), layer.dense)
        x += self._product(F.gelu(self._product(second, layer.up)), layer.down)

    def _product(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """x [T, 입력] -> [T, 출력]. NF4 행렬은 행을 나누어 풀면서 곱한다."""
        bias = matrix.bias.to(x.dtype)
        if matrix.scale is None:
            return F.linear(x, matrix.weight, bias)
        rows, columns = matrix.shape
        out = x.new_empty(len(x), rows)
        at_once = max(1, BUFFER // columns)
        for begin in range(0, rows, at_once):
            end = min(begin + at_once, rows)
            count = (end - begin) * columns // 8
            part = self._buffer[: (end - begin) * columns].view(end - begin, columns)
            self._kernels["dequantize"]((-(-count // 256),), (256,), *matrix.pointers(), self._weights.code, part,
                                        begin, columns, count)
            torch.addmm(bias[begin:end], x, part.t(), out=out[:, begin:end])
        return out
