"""학습 층에서 행렬 곱과 attention 사이에 있는 계산. `TorchOps`는 어느 장치에서나 도는 식이다.

같은 일을 하는 GPU 커널은 `train_kernels.py`에 있다. 커널이 이 식과 같은지는 `pytest -m gpu`가, 이 식이 transformers와
같은지는 CI가 확인한다.
"""

import torch
from torch.nn import functional as F

from utils.engine.family import Family
from utils.engine.norms import Norm
from utils.engine.train_layers import Adapter, Projection
from utils.engine.train_memory import pad_row
from utils.model.loss import cross_entropy_

DROP_LEVELS = 1 << 16  # dropout의 난수는 16비트다
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


def drop_threshold(probability: float) -> tuple[int, float]:
    """(버리는 난수의 경계, 남는 값에 곱하는 수)."""
    threshold = round(probability * DROP_LEVELS)
    return threshold, DROP_LEVELS / (DROP_LEVELS - threshold)


def drop_scale(keys: torch.Tensor, tokens: int, width: int, site: int, probability: float) -> torch.Tensor:
    """dropout이 곱하는 수 [tokens, width]. 블록의 시드 `keys` [rows, 2], 선형층의 번호, 자리로만 정해진다.

    난수를 저장하지 않고 자리에서 다시 만들므로 backward와 재계산이 forward와 같은 값을 버린다. murmur3의 마무리 섞기와
    곱하기를 거친 32비트 수 하나가 이웃한 두 값의 16비트 난수가 된다.
    """
    threshold, scale = drop_threshold(probability)
    word = (1 << 32) - 1

    def mix(h):
        h = h ^ (h >> 16)
        h = (h * 0x85EBCA6B) & word
        h = h ^ (h >> 13)
        h = (h * 0xC2B2AE35) & word
        return h ^ (h >> 16)

    seeds = keys.long() & word
    low = mix(seeds[:, :1] ^ ((site * 0x9E3779B9 + 1) & word))
    pair = torch.arange(tokens // len(keys) * width // 2, device=keys.device)[None]
    words = ((mix((pair + low) & word) ^ seeds[:, 1:]) * 0x9E3779B1) & word
    words = words ^ (words >> 16)
    bits = torch.stack([words & 0xFFFF, words >> 16], -1).view(tokens, width)
    return (bits >= threshold) * scale


class TorchOps:
    """어느 장치에서나 도는 식. 계산은 fp32로 하고 결과를 버퍼의 dtype으로 적는다."""

    name = "torch 식"

    def __init__(self, family: Family):
        self.family = family

    def norm(self, x, outs: list[tuple[Norm | None, torch.Tensor]], residual=None, bias=None, stats=None) -> None:
        """x [tokens, hidden]의 norm을 `outs`마다 적는다. Norm이 None이면 x 그대로다.

        `residual`이 있으면 거기에 x + bias를 적는다. 선형층의 출력을 그 위에 더하기 위한 것이다. `stats` fp32
        [tokens, 2]에는 커널이 행의 평균과 1/표준편차를 적어 `lora_backward`에서 다시 쓴다.
        """
        for norm, out in outs:
            out[:, :x.shape[1]] = x if norm is None else self._norm(x, norm)
        if residual is not None:
            residual.copy_(x if bias is None else x.float() + bias)

    def post_norm(self, y, norm: Norm, x, out) -> None:
        """out = x + norm(y). 모두 [tokens, hidden]."""
        out.copy_(x.float() + self._norm(y, norm))

    def norm_backward(self, x, gradients: list[tuple[Norm | None, torch.Tensor]], out, base=None) -> None:
        """norm들의 출력의 gradient를 x까지 되돌려 `base`에 더한 것을 `out` [tokens, hidden]에 적는다.

        n = (x - 평균) * r, r = 1 / sqrt(분산 + eps), y = n * w + b라 하면 g = dy * w일 때
        dx = r * (g - 평균(g) - n * 평균(g * n))이다. RMSNorm은 평균을 빼지 않으므로 평균(g) 항이 없다.
        """
        total = torch.zeros_like(x, dtype=torch.float32) if base is None else base.float()
        for norm, gradient in gradients:
            gradient = gradient[:, :x.shape[1]].float()
            if norm is not None:
                normal, scale = self._standardize(x)
                gradient = gradient * norm.weight
                along = normal * (gradient * normal).mean(-1, keepdim=True)
                mean = 0.0 if self.family.rms else gradient.mean(-1, keepdim=True)
                gradient = scale * (gradient - mean - along)
            total = total + gradient
        out.copy_(total)

    def _standardize(self, x):
        value = x.float()
        if not self.family.rms:
            value = value - value.mean(-1, keepdim=True)
        scale = (value.square().mean(-1, keepdim=True) + self.family.eps).rsqrt()
        return value * scale, scale

    def _norm(self, x, norm: Norm):
        value = self._standardize(x)[0] * norm.weight
        return value if norm.bias is None else value + norm.bias

    def lora_down(self, wide, projection: Projection, keys, z) -> None:
        """LoRA마다 z = dropout(u) A^T를 입력 끝의 자기 칸과 `z`의 자기 칸에 적는다.

        Args:
            wide: [tokens, columns + tail]. 앞의 columns가 선형층의 입력 u다.
            z: [tokens, tail]. backward까지 남는다.
        """
        u = wide[:, :projection.columns].float()
        for adapter in projection.adapters:
            z[:, adapter.column + adapter.rank:adapter.column + adapter.padded] = 0
            z[:, adapter.column:adapter.column + adapter.rank] = \
                self._drop(adapter, u, keys) @ adapter.lora_a.detach().t()
        if projection.adapters:
            wide[:, projection.columns:] = z

    def lora_up(self, adapter: Adapter, dy, z, scale: float) -> None:
        """B의 gradient [rows, rank]에 `scale * dy^T z`의 자기 몫을 더한다.

        Args:
            dy: 쌓은 선형층의 출력의 gradient [tokens, rows].
            z: [tokens, tail].
        """
        dy, z = dy[:, adapter.row:adapter.row + adapter.rows], z[:, adapter.column:adapter.column + adapter.rank]
        adapter.lora_b.grad.add_(torch.mm(dy.t(), z), alpha=adapter.scale * scale)

    def lora_backward(self, u, wide, projection: Projection, keys, norm: Norm | None = None, stats=None) -> None:
        """LoRA마다 A의 gradient를 더하고, LoRA를 지나온 gradient를 입력의 gradient에 더한다.

        y = W u + scale B z, z = A d, d = dropout(u)라 하면 dz = scale B^T dy이고(행렬 곱이 이미 구해 `wide`의 끝에
        두었다), dA = dz d^T, du += dropout(A^T dz)다. 같은 자리를 버리므로 dropout의 backward는 dropout이다.

        Args:
            u: 선형층의 입력 [tokens, columns]. `norm`이 있으면 그 norm을 걸기 전의 값이다.
            wide: [tokens, columns + tail]. 앞은 입력의 gradient, 끝은 dz다.
        """
        columns = projection.columns
        u = u.float() if norm is None else self._norm(u, norm).to(wide.dtype).float()
        for adapter in projection.adapters:
            start = columns + adapter.column
            dz = wide[:, start:start + adapter.rank].float()
            adapter.lora_a.grad.add_(dz.t() @ self._drop(adapter, u, keys))
            back = self._drop(adapter, dz @ adapter.lora_a.detach(), keys)
            wide[:, :columns] = wide[:, :columns].float() + back

    def _drop(self, adapter: Adapter, values, keys):
        if keys is None or adapter.dropout == 0:
            return values
        return values * drop_scale(keys, *values.shape, adapter.site, adapter.dropout)

    def weight(self, projection: Projection, out) -> torch.Tensor:
        """쌓은 가중치 [rows, columns + tail]을 `out`에 적어 돌려준다. 끝의 칸에는 `scale * B`가 있다."""
        columns, row = projection.columns, 0
        out = self.unpacked_view(projection, out)
        for linear in projection.linears:
            out[row:row + linear.out_features, :columns] = self._matrix(linear)
            row += linear.out_features
        out[:, columns:] = 0
        for part in projection.adapters:
            start = columns + part.column
            out[part.row:part.row + part.rows, start:start + part.rank] = part.lora_b.detach() * part.scale
        return out

    @staticmethod
    def unpacked_view(projection: Projection, out: torch.Tensor) -> torch.Tensor:
        """1차원의 자리에서 쌓은 가중치가 놓일 곳 [rows, columns + tail]. 행 사이의 간격은 `pad_row`가 정한다."""
        width = projection.columns + projection.tail
        return out[:projection.rows * pad_row(width)].view(projection.rows, -1)[:, :width]

    def _matrix(self, linear) -> torch.Tensor:
        state = getattr(linear.weight, "quant_state", None)
        if state is None:
            return linear.weight
        from bitsandbytes.functional import dequantize_4bit
        return dequantize_4bit(linear.weight.data, state)

    def heads(self, qkv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[tokens, qkv_width]를 머리로 나누어 본다: q [tokens, heads, head_dim], k와 v [tokens, kv_heads, head_dim]."""
        family = self.family
        if family.interleaved:
            return qkv.view(len(qkv), family.heads, 3, family.head_dim).unbind(2)
        return qkv.view(len(qkv), -1, family.head_dim).split((family.heads, family.kv_heads, family.kv_heads), 1)

    def rotate(self, qkv, layer, positions, table, qk) -> tuple:
        """머리마다의 norm을 걸고 자리에 맞게 돌린 q, k와 v. norm이 없으면 qkv 안에서 제자리에서 돌린다.

        Args:
            qkv: [tokens, qkv_width].
            table: [block, rotary] fp32, 앞의 반은 cos, 뒤의 반은 sin. None이면 돌리지 않는다.
            qk: norm이 있을 때 q와 k를 적는 [tokens, (heads + kv_heads) * head_dim].
        """
        q, k, v = self.heads(qkv)
        if layer.q_norm is not None:
            wide = qk.view(len(qkv), -1, self.family.head_dim)
            q_out, k_out = wide.split((self.family.heads, self.family.kv_heads), 1)
            q_out.copy_(self._norm(q, layer.q_norm))
            k_out.copy_(self._norm(k, layer.k_norm))
            q, k = q_out, k_out
        if table is not None:
            self._turn(q, positions, table, 1.0)
            self._turn(k, positions, table, 1.0)
        return q, k, v

    def unrotate(self, dq, dk, dv, qkv, layer, positions, table) -> None:
        """attention의 gradient를 되돌려 qkv [tokens, qkv_width]에 덮어쓴다.

        회전의 backward는 반대쪽 회전이다. 머리마다의 norm이 있으면 qkv에 든 norm 앞의 값으로 그것까지 되돌린다.
        """
        q, k, v = self.heads(qkv)
        for part, gradient, norm in ((q, dq, layer.q_norm), (k, dk, layer.k_norm)):
            gradient = gradient.clone()
            if table is not None:
                self._turn(gradient, positions, table, -1.0)
            if norm is None:
                part.copy_(gradient)
            else:
                flat = part.reshape(-1, self.family.head_dim)
                back = torch.empty_like(flat)
                self.norm_backward(flat, [(norm, gradient.reshape(flat.shape))], back)
                part.copy_(back.view(part.shape))
        v.copy_(dv)

    def _turn(self, part, positions, table, sign: float) -> None:
        half = table.shape[1] // 2
        cos, sin = table[positions.flatten()][:, None].split(half, -1)
        first, second = part[..., :half].float(), part[..., half:2 * half].float()
        turned = torch.cat([first * cos - second * sin * sign, second * cos + first * sin * sign], -1)
        part[..., :2 * half] = turned.to(part.dtype)

    def activate(self, h, out) -> None:
        """활성 함수의 뒤 [tokens, ff]를 `out`의 앞쪽 칸에 적는다. h는 [tokens, ff] 또는 [tokens, 2 ff](gate와 up)다."""
        act = ACTIVATIONS[self.family.activation]
        if self.family.gated:
            gate, up = h.float().chunk(2, -1)
            out[:, :self.family.ff] = act(gate) * up
        else:
            out[:, :self.family.ff] = act(h.float())

    def activate_backward(self, h, gradient) -> None:
        """활성 함수의 뒤의 gradient(`gradient`의 앞 ff칸)를 앞의 gradient로 바꾸어 h에 덮어쓴다.

        문이 있으면 a = act(gate) * up이므로 dup = da * act(gate), dgate = da * up * act'(gate)다.
        """
        act, da = ACTIVATIONS[self.family.activation], gradient[:, :self.family.ff].float()
        with torch.enable_grad():
            leaf = h.float().requires_grad_()
            gate, *up = leaf.chunk(2, -1) if self.family.gated else (leaf,)
            value = act(gate) * up[0] if up else act(gate)
            (back,) = torch.autograd.grad(value, leaf, da)
        h.copy_(back)

    def cross_entropy(self, logits, targets, factor):
        """`microstep.cross_entropy_`와 같다. 구조가 logits에 곱하는 수와 tanh로 누르는 것까지 한다."""
        scale, cap = self.family.logit_scale, self.family.logit_cap
        if scale == 1.0 and not cap:
            return cross_entropy_(logits, targets, factor)
        value = logits.float() * scale
        if cap:
            value = cap * torch.tanh(value / cap)
        slope = scale * (1 - (value / cap).square()) if cap else scale
        nll = cross_entropy_(value, targets, factor)  # value가 gradient로 바뀐다
        if factor is not None:
            logits.copy_(value * slope)
        return nll

    def embed(self, table, ids, out) -> None:
        """표 [vocab, hidden]의 행을 모은다. 표는 CPU 메모리에 있어도 된다."""
        out.copy_(table[ids.flatten().to(table.device)])
