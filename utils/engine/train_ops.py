"""GPT-NeoX 학습 층의 원소별 계산을 맡는다. `CudaOps`는 커널로, `TorchOps`는 같은 뜻의 torch 식으로 한다."""

from pathlib import Path

import torch
from torch.nn.functional import gelu, layer_norm

from utils.engine.cuda import load_kernels
from utils.model.loss import cross_entropy_

SOURCE = Path(__file__).parent / "kernels" / "train.cu"
NF4_BLOCK = 64
DROP_LEVELS = 1 << 16  # dropout의 난수는 16비트다


def pad_rank(rank: int) -> int:
    """16바이트 단위로 읽도록 8의 배수로 올린 rank."""
    return -(-rank // 8) * 8


def drop_threshold(probability: float) -> tuple[int, float]:
    """(버리는 난수의 경계, 남는 값에 곱하는 수)."""
    threshold = round(probability * DROP_LEVELS)
    return threshold, DROP_LEVELS / (DROP_LEVELS - threshold)


def drop_scale(keys: torch.Tensor, tokens: int, hidden: int, layer: int, probability: float) -> torch.Tensor:
    """dropout이 곱하는 수 [tokens, hidden]. 블록의 씨앗 `keys` [rows, 2], 층, 자리로만 정해진다."""
    threshold, scale = drop_threshold(probability)
    word = (1 << 32) - 1

    def mix(h):
        h = h ^ (h >> 16)
        h = (h * 0x85EBCA6B) & word
        h = h ^ (h >> 13)
        h = (h * 0xC2B2AE35) & word
        return h ^ (h >> 16)

    seeds = keys.long() & word
    low = mix(seeds[:, :1] ^ ((layer * 0x9E3779B9 + 1) & word))
    pair = torch.arange(tokens // len(keys) * hidden // 2, device=keys.device)[None]
    words = mix(mix((pair + low) & word) ^ seeds[:, 1:])
    bits = torch.stack([words & 0xFFFF, words >> 16], -1).view(tokens, hidden)
    return (bits >= threshold) * scale


class TorchOps:
    """어느 장치에서나 도는 식."""

    name = "torch 식"
    cross_entropy = staticmethod(cross_entropy_)

    def __init__(self, table: torch.Tensor):
        self.table = table  # [context, rotary] fp32: cos, sin

    def norms(self, layer, x, keys, n1, n2, residual, z) -> None:
        """두 norm과 z = dropout(norm1) A^T를 구한다. `residual`이 있으면 x + 두 선형층의 bias를 적는다."""
        hidden = x.shape[1]
        n1[:, :hidden] = layer_norm(x, (hidden,), layer.w1, layer.b1, layer.eps)
        n2.copy_(layer_norm(x, (hidden,), layer.w2, layer.b2, layer.eps))
        z.zero_()
        z[:, :layer.rank] = (self._drop(layer, n1[:, :hidden].float(), keys) @ layer.a.t()).to(z.dtype)
        n1[:, hidden:] = z
        if residual is not None:
            torch.add(x, layer.bias, out=residual)

    def norms_backward(self, layer, x, keys, n1, n2, dx, dropped) -> None:
        """`n1`, `n2`에 담긴 gradient를 x까지 되돌려 `dx`에 더하고, dropout(norm1)을 `dropped`에 적는다."""
        hidden = x.shape[1]
        normal = layer_norm(x, (hidden,), layer.w1, layer.b1, layer.eps)
        dropped.copy_(self._drop(layer, normal.float(), keys))
        if dx is None:
            return
        du = self._drop(layer, n1[:, hidden:hidden + layer.rank].float() @ layer.a, keys)
        value = x.float()
        value = value - value.mean(-1, keepdim=True)
        scale = (value.square().mean(-1, keepdim=True) + layer.eps).rsqrt()
        value = value * scale
        gradient = (n1[:, :hidden].float() + du) * layer.w1.float() + n2.float() * layer.w2.float()
        centered = gradient - gradient.mean(-1, keepdim=True) - value * (gradient * value).mean(-1, keepdim=True)
        dx.copy_(dx.float() + centered * scale)

    def _drop(self, layer, values, keys):
        if keys is None or layer.dropout == 0:
            return values
        return values * drop_scale(keys, *values.shape, layer.index, layer.dropout)

    def weight(self, linear, out, layer=None):
        """선형층의 가중치 [출력, 입력]을 `out`에 풀어 돌려준다. `layer`를 주면 끝에 scale * B를 이어 붙인다."""
        rows, columns = linear.out_features, linear.in_features
        state = getattr(linear.weight, "quant_state", None)
        if state is None:
            weight = linear.weight
        else:
            from bitsandbytes.functional import dequantize_4bit
            weight = dequantize_4bit(linear.weight.data, state)
        if layer is None:
            return weight.to(out.dtype)
        wide = columns + pad_rank(layer.rank)
        out = out[:rows * wide].view(rows, wide)
        out[:, :columns] = weight
        out[:, columns:] = 0
        out[:, columns:columns + layer.rank] = layer.b * layer.scale
        return out

    def rotate(self, qkv, positions) -> None:
        """[tokens, heads, 3, head_dim]의 q와 k를 자리에 맞게 제자리에서 돌린다."""
        self._turn(qkv[:, :, :2], positions, 1.0)

    def unrotate(self, dq, dk, dv, positions, out) -> None:
        """attention의 gradient를 되돌려 `out` [tokens, heads, 3, head_dim]에 모은다."""
        torch.stack([dq, dk, dv], 2, out=out)
        self._turn(out[:, :, :2], positions, -1.0)

    def _turn(self, part, positions, sign) -> None:
        half = self.table.shape[1] // 2
        cos, sin = self.table[positions.flatten()][:, None, None].split(half, -1)
        first, second = part[..., :half].float(), part[..., half:2 * half].float()
        turned = torch.cat([first * cos - second * sin * sign, second * cos + first * sin * sign], -1)
        part[..., :2 * half] = turned.to(part.dtype)

    def gelu(self, h, out) -> None:
        out.copy_(gelu(h))

    def gelu_backward(self, h, gradient) -> None:
        gradient.copy_(torch.ops.aten.gelu_backward(gradient, h))

    def embed(self, table, ids, out) -> None:
        out.copy_(table[ids.flatten().to(table.device)])


class CudaOps(TorchOps):
    """`kernels/train.cu`의 커널.

    Raises:
        CompileError: 커널을 컴파일하지 못했다.
    """

    name = "커널"

    def __init__(self, table, hidden: int, heads: int, rank: int, dtype: torch.dtype):
        super().__init__(table)
        self.hidden, self.heads, self.head_dim = hidden, heads, hidden // heads
        self.padded, self.rotary = pad_rank(rank), table.shape[1]
        self.threads = -(-hidden // 256) * 32
        names = ["norms_forward", "norms_backward", "dequantize", "rotate", "unrotate", "gelu_forward",
                 "gelu_backward", "cross_entropy", "gather"]
        self.kernels = load_kernels(SOURCE.read_text(encoding="utf-8"), names, {
            "HIDDEN": hidden, "HEADS": heads, "HEAD_DIM": self.head_dim, "ROTARY": self.rotary, "RANK": rank,
            "PADDED_RANK": self.padded, "BF16": int(dtype is torch.bfloat16)})
        self._offsets = {}

    def _run(self, name: str, count: int, *args) -> None:
        self.kernels[name]((-(-count // 256),), (256,), *args)

    def _drop_arguments(self, layer, tokens, keys) -> tuple:
        if keys is None:
            return tokens, layer.index, 0, 1.0, layer.eps
        return tokens // len(keys), layer.index, *drop_threshold(layer.dropout), layer.eps

    def norms(self, layer, x, keys, n1, n2, residual, z) -> None:
        self.kernels["norms_forward"]((len(x),), (self.threads,), x, layer.w1, layer.b1, layer.w2, layer.b2, layer.bias,
                                      layer.a, keys, n1, n2, residual, z, *self._drop_arguments(layer, len(x), keys))

    def norms_backward(self, layer, x, keys, n1, n2, dx, dropped) -> None:
        self.kernels["norms_backward"]((len(x),), (self.threads,), x, layer.w1, layer.b1, layer.w2, layer.a, keys, n1,
                                       n2, dx, dropped, *self._drop_arguments(layer, len(x), keys))

    def weight(self, linear, out, layer=None):
        state = getattr(linear.weight, "quant_state", None)
        if state is None:
            return super().weight(linear, out, layer)
        rows, columns = linear.out_features, linear.in_features
        stride = columns + (self.padded if layer else 0)
        extra = rows * self.padded // 8 if layer else 0
        count = rows * columns // 8
        nested = state.nested
        self._run("dequantize", -(-(count + extra) // 4), linear.weight.data, state.absmax if nested else None,
                  state.state2.absmax if nested else state.absmax, state.state2.code if nested else None,
                  state.offset if nested else None, state.code, layer.b if layer else None, out, count, columns, stride,
                  extra, float(layer.scale) if layer else 1.0)
        return out[:rows * stride].view(rows, stride)

    def rotate(self, qkv, positions) -> None:
        count = qkv.shape[0] * self.heads * 2 * self.rotary // 16
        self._run("rotate", count, qkv, positions, self.table, count)

    def unrotate(self, dq, dk, dv, positions, out) -> None:
        dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
        count = out.numel() // 8
        self._run("unrotate", count, dq, dk, dv, out, positions, self.table, count)

    def gelu(self, h, out) -> None:
        self._run("gelu_forward", h.numel() // 8, h, out, h.numel() // 8)

    def gelu_backward(self, h, gradient) -> None:
        self._run("gelu_backward", h.numel() // 8, h, gradient, h.numel() // 8)

    def cross_entropy(self, logits, targets, factor):
        if logits.shape[1] % 8:
            return super().cross_entropy(logits, targets, factor)
        nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        self.kernels["cross_entropy"]((len(logits),), (512,), logits, targets, nll, factor, logits.shape[1])
        return nll

    def embed(self, table, ids, out) -> None:
        self._run("gather", out.numel() // 8, table, ids, out, out.numel() // 8)
