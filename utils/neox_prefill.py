"""GPT-NeoX가 질문을 읽는 일을 맡는다: 질문 전체를 행렬 곱으로 지나며 KV cache를 채운다."""

import torch
import torch.nn.functional as F

from utils.neox_weights import Layer, Matrix, Weights

PIECE = 512             # 질문을 이만큼씩 나누어 읽어 메모리를 묶어 둔다
BUFFER = 8 * 1024 ** 2  # NF4를 풀어 두는 자리(16비트 수의 개수)


class Prefill:
    """질문의 토큰을 읽어 cache를 채우고 마지막 토큰의 residual [hidden] fp32를 돌려준다.

    Attributes:
        adapter_on: 어댑터를 더할지.
    """

    def __init__(self, weights: Weights, kernels: dict, sizes: dict[str, int], cache):
        self.adapter_on = True
        self._weights, self._kernels, self._sizes, self._cache = weights, kernels, sizes, cache
        device = weights.embedding.device
        self._buffer = torch.empty(BUFFER, dtype=weights.dtype, device=device) if weights.nf4 else None

    def __call__(self, input_ids: list[int]) -> torch.Tensor:
        ids = torch.tensor(input_ids, device=self._weights.embedding.device)
        for past in range(0, len(input_ids), PIECE):
            x = F.embedding(ids[past : past + PIECE], self._weights.embedding).float()
            for layer, cache in zip(self._weights.layers, self._cache.layers, strict=True):
                self._layer(x, layer, cache, past)
        return x[-1]

    def _layer(self, x: torch.Tensor, layer: Layer, cache: tuple, past: int) -> None:
        """x [T, hidden]에 층 하나를 더한다."""
        tokens, heads, head_dim = len(x), self._sizes["HEADS"], self._sizes["HEAD_DIM"]
        total, grid_block = past + tokens, (-(-head_dim // 32) * 32,)
        first, second = (torch.empty_like(x, dtype=self._weights.dtype) for _ in range(2))
        self._kernels["both_norms"]((tokens,), (512,), x, self._weights.eps, *layer.norm1, *layer.norm2, first, second)
        qkv = self._product(first, layer.qkv)
        if layer.adapter and self.adapter_on:
            qkv.addmm_(first @ layer.adapter.down.t(), layer.adapter.up_16bit.t())
        query = qkv.new_empty(1, heads, tokens, head_dim)
        keys, values = qkv.new_empty(2, 1, heads, total, head_dim)
        if past:
            self._kernels["read_cache"]((past, heads), grid_block, *cache, keys, values, total)
        self._kernels["split_heads"]((tokens, heads), grid_block, qkv, self._weights.turns, past, tokens, query, keys,
                                     values, *cache)
        mask = torch.ones(tokens, total, dtype=torch.bool, device=x.device).tril(past) if past else None
        attention = F.scaled_dot_product_attention(query, keys, values, mask, is_causal=not past)
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
            count = (end - begin) * columns // 32
            part = self._buffer[: (end - begin) * columns].view(end - begin, columns)
            self._kernels["dequantize"]((-(-count // 256),), (256,), *matrix.pointers(), self._weights.code, part,
                                        begin, columns, count)
            torch.addmm(bias[begin:end], x, part.t(), out=out[:, begin:end])
        return out
