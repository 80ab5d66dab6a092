"""어느 구조든 하나로 계산하는 학습의 micro-step: 손으로 쓴 forward와 backward.

기반 가중치는 얼어 있고 LoRA만 배우므로, 자동미분 없이 필요한 것만 남기고 필요한 gradient만 구한다. 구조의 차이는 모두
`Family`에 데이터로 있다. 4비트 가중치는 쓸 때마다 하나뿐인 자리(scratch)에 풀었다가 버린다. 행렬 곱은 cuBLAS가,
attention은 `attention`이, 나머지는 `ops`가 한다. 식의 유도와 메모리의 배치는 이 폴더의 README.md에 있다.
"""

import torch

from utils.data.blocks import shifted_targets
from utils.engine.attention import Documents
from utils.engine.train_forward import Forward
from utils.engine.train_layers import Layer, Projection
from utils.model.loss import head_loss
from utils.model.objective import learn


class TrainStep(Forward):
    """micro-step 하나: `Forward`에 손으로 쓴 backward를 더한다. 만드는 법은 `Forward`와 같다."""

    @torch.no_grad()
    def train(self, batch: dict, single: bool = False) -> torch.Tensor:
        """gradient를 LoRA의 `.grad`에 더하고 `factor * 손실`(`objective.objective`)을 돌려준다.

        Args:
            batch: input_ids, labels, position_ids(int64 [rows, block]), keys(int32 [rows, 2], dropout의 시드),
                factor(fp32 스칼라). 선호 쌍이면 reference와 beta도 있다.
            single: 블록마다 첫 문서만 배운다(`options`).
        """
        documents, keys = self._begin(batch, "train", single), batch["keys"]
        for layer in self.layers:
            self._forward_layer(layer, documents, keys)
        targets = shifted_targets(batch["labels"]).flatten()
        hidden, gradient = self._wide("n1", self.family.hidden), self._wide("g", self.family.hidden)
        self.ops.norm(self.x[-1], [(self.final_norm, hidden)])
        room = self.unpacker.lend()
        loss = learn(batch, gradient, lambda factor: head_loss(hidden, self.head, targets, factor, gradient, room,
                                                               self.ops.cross_entropy))
        # 마지막 층의 출력은 이제 쓰이지 않는다. 그 자리에서 층을 하나씩 지나며 입력의 gradient로 바뀐다
        self.ops.norm_backward(self.x[-1], [(self.final_norm, gradient)], self.x[-1])
        gradient = self.x[-1]
        for layer in reversed(self.layers):
            if layer.index < self.recompute_layers:
                self._recompute_layer(layer, documents, keys)
            self._backward_layer(layer, gradient, documents, keys)
        return loss

    def _backward_layer(self, layer: Layer, gradient, documents: Documents, keys) -> None:
        """출력의 `gradient` [tokens, hidden]를 제자리에서 입력의 gradient로 바꾸고 LoRA의 gradient를 더한다."""
        family, ops, saved = self.family, self.ops, self.saved[layer.index]
        x = self.x[layer.index]
        norms = []
        if not self._skips_mlp(layer):
            n2 = self._backward_mlp(layer, gradient, keys)
            if family.parallel:
                norms.append((layer.norm2, n2))
            else:
                ops.norm_backward(saved.mid, [(layer.norm2, n2)], gradient, gradient)
        n1 = self._backward_attention(layer, gradient, documents, keys)
        if layer.index > 0:
            ops.norm_backward(x, [(layer.norm1, n1), *norms], gradient, gradient)

    def _backward_mlp(self, layer: Layer, gradient, keys) -> torch.Tensor:
        """MLP의 입력(norm의 뒤)의 gradient [tokens, hidden + tail]."""
        family, ops, saved, z = self.family, self.ops, self.saved[layer.index], self.z[layer.index]
        dy, scale = self._through_post(layer.post2, saved.post2, gradient)
        dg = self._wide("g", family.ff + layer.down.tail)
        self._backward_product(layer.down, dy, scale, z["down"], dg)
        if layer.down.adapters:
            activated = self._wide("t", family.ff)
            ops.activate(saved.h, activated)
            ops.lora_backward(activated, dg, layer.down, keys)
        ops.activate_backward(saved.h, dg)
        n2 = self._wide("n2" if family.parallel else "n1", family.hidden + layer.mlp.tail)
        self._backward_product(layer.mlp, saved.h, 1.0, z["mlp"], n2)
        source, which = (self.x[layer.index], 0) if family.parallel else (saved.mid, 1)
        ops.lora_backward(source, n2, layer.mlp, keys, layer.norm2, self.stats[layer.index, which])
        return n2

    def _backward_attention(self, layer: Layer, gradient, documents: Documents, keys) -> torch.Tensor | None:
        """attention의 입력(norm의 뒤)의 gradient [tokens, hidden + tail]. 더 되돌아갈 곳이 없으면 None."""
        family, ops, saved, z = self.family, self.ops, self.saved[layer.index], self.z[layer.index]
        dy, scale = self._through_post(layer.post1, saved.post1, gradient)
        wide = self._wide("g", family.q_width + layer.out.tail)
        self._backward_product(layer.out, dy, scale, z["out"], wide)
        ops.lora_backward(saved.attended.flatten(1), wide, layer.out, keys)
        if layer.index == 0 and not layer.qkv.adapters:
            saved.drop()
            return None
        q, k, v = ops.heads(saved.qkv)
        table = self.tables[layer.turn] if layer.turn >= 0 else None
        if family.qk_norm:  # 버퍼에는 다른 층의 q와 k가 남아 있을 수 있다
            q, k, v = ops.rotate(saved.qkv, layer, documents.positions, table, self._qk())
        attended = wide[:, :family.q_width].unflatten(1, (family.heads, family.head_dim))  # 의 gradient
        parts = self._attention_of(layer, documents).backward(attended, q, k, v, saved.attended, saved.attention,
                                                              documents, layer.window)
        saved.drop()
        ops.unrotate(*parts, saved.qkv, layer, documents.positions, table)
        del parts
        n1 = self._wide("n1", family.hidden + layer.qkv.tail)
        self._backward_product(layer.qkv, saved.qkv, 1.0, z["qkv"], n1)
        ops.lora_backward(self.x[layer.index], n1, layer.qkv, keys, layer.norm1, self.stats[layer.index, 0])
        return n1

    def _through_post(self, norm, y, gradient) -> tuple[torch.Tensor, float]:
        """잔차의 gradient에서 선형층의 출력의 gradient와 거기에 곱할 수를 구한다."""
        if norm is None:
            return gradient, self.family.residual_scale
        dy = self.buffers["n1"][:y.numel()].view(y.shape)
        self.ops.norm_backward(y, [(norm, gradient)], dy)  # norm에 잔차의 배율이 들어 있다
        return dy, 1.0

    def _backward_product(self, projection: Projection, dy, scale: float, z, wide) -> None:
        """B의 gradient를 더하고, 입력의 gradient와 z의 gradient를 `wide` [tokens, columns + tail]에 적는다.

        y = [u | z] [W | sB]^T 이므로 [du | dz] = dy [W | sB], d(sB) = dy^T z다. 여러 선형층을 쌓았으면 dy와 z에서
        저마다의 칸만 곱한다.
        """
        weight = self.unpacker.take(projection)
        if scale == 1.0:
            torch.mm(dy, weight, out=wide)
        else:
            torch.addmm(wide, dy, weight, beta=0.0, alpha=scale, out=wide)
        self.unpacker.give_back()
        for adapter in projection.adapters:
            self.ops.lora_up(adapter, dy, z, scale)
