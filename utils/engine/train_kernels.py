"""학습 커널(`kernels/train*.cu`)을 부르는 `CudaOps`. 하는 일은 `TorchOps`와 같다."""

import ctypes
from pathlib import Path

import torch

from utils.engine.cuda import load_kernels
from utils.engine.family import ACTIVATION_CODES, Family
from utils.engine.train_layers import Adapter, Projection
from utils.engine.train_memory import RANK_UNIT, TILE_ROWS
from utils.engine.train_ops import TorchOps, drop_threshold

SOURCES = ("device.cuh", "common.cuh", "train.cu", "train_lora.cu")
KERNELS = ("norm_forward", "post_norm", "norm_backward", "lora_down", "lora_backward", "reduce_partials", "dequantize",
           "rotate", "unrotate", "activate", "activate_backward", "cross_entropy", "gather")
# 블록의 모양. 커널에는 -D로 들어가고 여기서는 grid의 크기를 정한다
LORA_ROWS, LORA_THREADS = 8, 512  # lora_down: 블록 하나가 텐서 코어의 너비인 행 8개
TILE_THREADS, TILE_COLUMNS = 2 * TILE_ROWS, 64  # lora_backward: 워프 하나가 행 16개 x 열 64개
SUM_THREADS, SUM_COLUMNS = 256, 128  # reduce_partials: 블록 하나가 fp32 128개(lane마다 넷)
LOSS_THREADS = 512
FLAT_THREADS = 256  # 원소별 커널
HEADS_PER_BLOCK = 4  # rotate: 워프 하나가 머리 하나


class LoraArgument(ctypes.Structure):
    """LoRA 하나. train_lora.cu의 `Lora`와 같은 차례다."""

    _fields_ = [("a", ctypes.c_void_p), *((name, ctypes.c_int) for name in (
        "own", "rank", "padded", "site", "threshold")), ("keep_scale", ctypes.c_float)]


class LoraArguments(ctypes.Structure):
    """같은 입력을 읽는 LoRA들. 많아야 q, k, v 셋이다."""

    _fields_ = [("part", LoraArgument * 3)]

    @classmethod
    def of(cls, projection: Projection, keys) -> "LoraArguments":
        loras = cls()
        for place, adapter in enumerate(projection.adapters):
            loras.part[place] = LoraArgument(adapter.lora_a.data_ptr(), adapter.column, adapter.rank, adapter.padded,
                                             adapter.site, *_dropout(adapter, keys))
        return loras


def kernel_source() -> str:
    folder = Path(__file__).parent / "kernels"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in SOURCES)


def kernel_defines(family: Family, dtype: torch.dtype) -> dict[str, int | str]:
    """커널이 컴파일할 때 받는 모든 상수."""
    return {
        "HIDDEN": family.hidden, "FF": family.ff, "HEADS": family.heads, "KV_HEADS": family.kv_heads,
        "HEAD_DIM": family.head_dim, "ROTARY": family.rotary, "INTERLEAVED": int(family.interleaved),
        "RMS": int(family.rms), "EPS": f"{family.eps:.9e}f", "QK_NORM": int(family.qk_norm),
        "GATED": int(family.gated), "ACTIVATION": ACTIVATION_CODES[family.activation],
        "LOGIT_SCALE": f"{family.logit_scale:.9e}f", "LOGIT_CAP": f"{family.logit_cap:.9e}f",
        "GELU_TANH": ACTIVATION_CODES["gelu_tanh"], "SILU": ACTIVATION_CODES["silu"],
        "BF16": int(dtype is torch.bfloat16), "SPAN": RANK_UNIT, "LORA_ROWS": LORA_ROWS, "LORA_THREADS": LORA_THREADS,
        "TILE_ROWS": TILE_ROWS, "TILE_THREADS": TILE_THREADS, "TILE_COLUMNS": TILE_COLUMNS,
        "SUM_THREADS": SUM_THREADS, "FLAT_THREADS": FLAT_THREADS, "HEADS_PER_BLOCK": HEADS_PER_BLOCK,
        "LOSS_THREADS": LOSS_THREADS,
    }


class CudaOps(TorchOps):
    """GPU의 커널.

    Raises:
        CompileError: 커널을 컴파일하지 못했다.
    """

    name = "커널"

    def __init__(self, family: Family, dtype: torch.dtype, kernels: dict | None = None):
        """kernels: 이미 올린 커널들. None이면 지금의 GPU에 맞게 컴파일한다."""
        super().__init__(family)
        self.kernels = kernels or load_kernels(kernel_source(), list(KERNELS), kernel_defines(family, dtype))
        self.row_threads = -(-family.hidden // 256) * 32  # norm: 행 하나의 16바이트마다 thread 하나, 32의 배수

    def _rows(self, name: str, rows: int, *args) -> None:
        self.kernels[name]((rows,), (self.row_threads,), *args)

    def _flat(self, name: str, count: int, *args) -> None:
        self.kernels[name]((-(-count // FLAT_THREADS),), (FLAT_THREADS,), *args)

    def norm(self, x, outs, residual=None, bias=None, stats=None) -> None:
        (first, out), (second, other) = outs[0], outs[1] if len(outs) == 2 else (None, None)
        self._rows("norm_forward", len(x), x, first and first.weight, first and first.bias, out, out.stride(0),
                   second and second.weight, second and second.bias, other,
                   0 if other is None else other.stride(0), residual, bias, stats)

    def post_norm(self, y, norm, x, out) -> None:
        self._rows("post_norm", len(y), y, norm.weight, norm.bias, x, out)

    def norm_backward(self, x, gradients, out, base=None) -> None:
        (first, gradient), (second, other) = gradients[0], gradients[1] if len(gradients) == 2 else (None, None)
        self._rows("norm_backward", len(x), x, first and first.weight, gradient, gradient.stride(0),
                   second and second.weight, other, 0 if other is None else other.stride(0), base, out)

    def lora_down(self, wide, projection, keys, z) -> None:
        tokens, count = len(wide), len(projection.adapters)
        if count:
            self.kernels["lora_down"](
                (-(-tokens // LORA_ROWS), count), (LORA_THREADS,), wide, LoraArguments.of(projection, keys), z, keys,
                tokens, wide.stride(0), projection.columns, z.shape[1], _block_len(keys, tokens))

    def lora_up(self, adapter, dy, z, scale) -> None:
        if not dy.is_cuda:  # CPU에는 이 행렬 곱이 없다
            super().lora_up(adapter, dy, z, scale)
            return
        dy, z = dy[:, adapter.row:adapter.row + adapter.rows], z[:, adapter.column:adapter.column + adapter.rank]
        gradient = adapter.lora_b.grad
        # 16비트를 곱해 fp32 gradient에 바로 더한다. 곱을 16비트로 줄였다가 더하지 않아 빠르고 정확하다
        torch.addmm(gradient, dy.t(), z, out_dtype=torch.float32, alpha=adapter.scale * scale, out=gradient)

    def lora_backward(self, u, wide, projection, keys, norm=None, stats=None) -> None:
        tokens, columns = len(u), projection.columns
        tiles = -(-tokens // TILE_ROWS)
        for adapter in projection.adapters:
            count = adapter.rank * columns
            partial = torch.empty(tiles * count, dtype=torch.float32, device=u.device)
            self.kernels["lora_backward"](
                (-(-columns // TILE_COLUMNS), tiles), (TILE_THREADS,), u, wide, adapter.lora_a.detach(), partial,
                keys, norm and norm.weight, norm and norm.bias, stats, tokens, u.stride(0), wide.stride(0), columns,
                adapter.column, adapter.rank, _block_len(keys, tokens), adapter.site, *_dropout(adapter, keys))
            self.kernels["reduce_partials"]((-(-count // SUM_COLUMNS),), (SUM_THREADS,), partial, adapter.lora_a.grad,
                                            tiles, count)

    def weight(self, projection: Projection, out) -> torch.Tensor:
        if any(getattr(linear.weight, "quant_state", None) is None for linear in projection.linears):
            return super().weight(projection, out)
        columns, tail = projection.columns, projection.tail
        out = self.unpacked_view(projection, out)
        by_row = {adapter.row: adapter for adapter in projection.adapters}
        row = 0
        for linear in projection.linears:
            rows, state, adapter = linear.out_features, linear.weight.quant_state, by_row.get(row)
            count, extra, nested = rows * columns // 8, rows * tail // 8, state.nested
            self._flat("dequantize", -(-(count + extra) // 4), linear.weight.data, state.absmax if nested else None,
                       state.state2.absmax if nested else state.absmax, state.state2.code if nested else None,
                       state.offset if nested else None, state.code, adapter and adapter.lora_b.detach(), out[row:],
                       count, columns, out.stride(0), extra, tail, adapter.column if adapter else 0,
                       adapter.rank if adapter else 0, adapter.scale if adapter else 1.0)
            row += rows
        return out

    def rotate(self, qkv, layer, positions, table, qk) -> tuple:
        family, tokens = self.family, len(qkv)
        count = tokens * (family.heads + family.kv_heads)
        if table is not None or family.qk_norm:
            self.kernels["rotate"]((-(-count // HEADS_PER_BLOCK),), (32 * HEADS_PER_BLOCK,), qkv, qk, positions, table,
                                   layer.q_norm and layer.q_norm.weight, layer.k_norm and layer.k_norm.weight, count)
        q, k, v = self.heads(qkv)
        if family.qk_norm:
            q, k = qk.view(tokens, -1, family.head_dim).split((family.heads, family.kv_heads), 1)
        return q, k, v

    def unrotate(self, dq, dk, dv, qkv, layer, positions, table) -> None:
        count = len(qkv) * (self.family.heads + 2 * self.family.kv_heads)
        self.kernels["unrotate"]((-(-count // HEADS_PER_BLOCK),), (32 * HEADS_PER_BLOCK,), dq.contiguous(),
                                 dk.contiguous(), dv.contiguous(), qkv, positions, table,
                                 layer.q_norm and layer.q_norm.weight, layer.k_norm and layer.k_norm.weight, count)

    def activate(self, h, out) -> None:
        count = len(h) * self.family.ff // 8
        self._flat("activate", count, h, out, out.stride(0), count)

    def activate_backward(self, h, gradient) -> None:
        count = len(h) * self.family.ff // 8
        self._flat("activate_backward", count, h, gradient, gradient.stride(0), count)

    def cross_entropy(self, logits, targets, factor):
        nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        self.kernels["cross_entropy"]((len(logits),), (LOSS_THREADS,), logits, targets, nll, factor, logits.shape[1],
                                      logits.stride(0))
        return nll

    def embed(self, table, ids, out) -> None:
        count = out.numel() // 8
        self.kernels["gather"]((-(-count // FLAT_THREADS),), (FLAT_THREADS,), table, ids, out, count)


def _block_len(keys, tokens: int) -> int:
    return tokens if keys is None else tokens // len(keys)


def _dropout(adapter: Adapter, keys) -> tuple[int, float]:
    """커널의 dropout 인자: threshold, keep_scale. keys가 None이면 버리지 않는다."""
    return (0, 1.0) if keys is None else drop_threshold(adapter.dropout)
