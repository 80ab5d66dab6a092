"""GPT-NeoX의 micro-step을 손으로 쓴 forward와 backward로 계산하는 일을 맡는다.

기반 가중치는 얼어 있고 LoRA는 query_key_value에만 있으므로, 자동미분 없이 필요한 것만 남기고 필요한 gradient만
구한다. 층마다 남기는 것은 입력 x, 회전한 q·k·v, attention의 출력, gelu 앞의 값이다. 재계산하는 층은 x만 남긴다.
4비트 가중치는 쓸 때마다 하나뿐인 자리(scratch)에 풀었다가 버린다. 행렬 곱은 cuBLAS, 나머지는 `train_ops`의 몫이다.
"""

from dataclasses import dataclass, field

import torch

from utils.data.blocks import shifted_targets
from utils.engine.attention import Documents, choose_attention
from utils.engine.cuda import CompileError
from utils.engine.train_layers import HostEmbedding, Layer
from utils.engine.train_ops import CudaOps, TorchOps, pad_rank
from utils.model.loss import HEAD_CHUNK, head_loss


@dataclass
class Saved:
    """한 층의 backward가 쓰려고 forward가 남기는 것. tokens는 micro batch의 토큰 수다."""

    qkv: torch.Tensor  # [tokens, heads, 3, head_dim], 회전한 뒤
    h: torch.Tensor  # [tokens, intermediate], gelu의 앞
    z: torch.Tensor  # [tokens, padded_rank]
    attended: torch.Tensor | None = None  # [tokens, heads, head_dim]
    attention: list = field(default_factory=list)

    def drop(self) -> None:
        """attention이 잡은 메모리를 놓는다."""
        self.attended, self.attention = None, []


class NeoxStep:
    """GPT-NeoX + LoRA의 micro-step.

    Args:
        model: PEFT로 감싼 GPTNeoXForCausalLM. 가중치는 그 안의 것을 그대로 쓴다.
        recompute_layers: backward에서 다시 계산할 층의 수. 앞의 층부터 센다.
        max_documents: 블록 하나에 든 문서의 최대 수.

    GPU에서는 모델의 입력 embedding을 `HostEmbedding`으로 바꾸어 VRAM에서 내린다.
    """

    def __init__(self, model, recompute_layers: int = 0, max_documents: int = 1):
        base = model.get_base_model()
        config, self.body = base.config, base.gpt_neox
        self.head = base.lm_head.weight.detach()
        self.dtype, self.device = self.head.dtype, self.head.device
        if self.device.type == "cuda" and not isinstance(self.body.embed_in, HostEmbedding):
            self.body.embed_in = HostEmbedding(self.body.embed_in.weight)
        self.layers = [Layer(index, layer, self.dtype) for index, layer in enumerate(self.body.layers)]
        self.hidden, self.heads, self.inner = (
            config.hidden_size, config.num_attention_heads, config.intermediate_size)
        self.recompute_layers = min(recompute_layers, len(self.layers) - 1)
        self.max_documents = max_documents
        norm = self.body.final_layer_norm
        self.norm = (norm.weight.detach().to(self.dtype), norm.bias.detach().to(self.dtype), float(norm.eps))
        self.padded_rank = pad_rank(self.layers[0].rank)
        self.ops = self._choose_ops(config)
        self.attention = choose_attention(self.heads, self.hidden // self.heads, self.dtype, self.device)
        self.release()

    @property
    def path(self) -> str:
        return (f"손으로 쓴 GPT-NeoX({self.ops.name}, attention: {self.attention.name}, "
                f"재계산 {self.recompute_layers}/{len(self.layers)}층)")

    def _choose_ops(self, config):
        positions = torch.arange(config.max_position_embeddings, device=self.device)[None]
        cos, sin = self.body.rotary_emb(torch.empty(0, dtype=self.dtype, device=self.device), positions)
        half = cos.shape[-1] // 2
        table = torch.cat([cos[0, :, :half], sin[0, :, :half]], -1).float().contiguous()
        if self.device.type == "cuda" and self.dtype is not torch.float32:
            try:
                return CudaOps(table, self.hidden, self.heads, self.layers[0].rank, self.dtype)
            except CompileError:
                pass
        return TorchOps(table)

    def recompute_more(self) -> bool:
        """재계산하는 층을 늘린다. 더 늘릴 수 없으면 False."""
        before, most = self.recompute_layers, len(self.layers) - 1
        self.recompute_layers = min(most, before + max(1, len(self.layers) // 4))
        self.release()
        return before < most

    def release(self) -> None:
        """잡아 둔 메모리를 놓는다."""
        self._tokens = 0
        self.x = self.saved = self.n1 = self.n2 = self.t = self.g = self.dqkv = self.scratch = None

    def _prepare(self, tokens: int) -> None:
        if tokens == self._tokens:
            return
        self.release()
        heads = (self.heads, 3, self.hidden // self.heads)
        kept = len(self.layers) - self.recompute_layers

        def empty(*shape):
            return torch.empty(*shape, dtype=self.dtype, device=self.device)

        # 가중치를 푸는 자리는 손실의 logits도 함께 쓴다
        scratch = max(self.inner * self.hidden, 3 * self.hidden * (self.hidden + self.padded_rank),
                      min(tokens, HEAD_CHUNK) * len(self.head))
        shared = Saved(empty(tokens, *heads), empty(tokens, self.inner), empty(tokens, self.padded_rank))
        self.x = empty(len(self.layers) + 1, tokens, self.hidden)
        qkv, h, z = (empty(max(kept - 1, 0), tokens, *size) for size in (heads, (self.inner,), (self.padded_rank,)))
        # 재계산하는 층과, backward가 곧바로 이어지는 마지막 층은 함께 쓰는 자리를 쓴다
        self.saved = [shared] * self.recompute_layers + [Saved(*parts) for parts in zip(qkv, h, z, strict=True)]
        self.saved += [shared] * (len(self.layers) - len(self.saved))
        self.n1, self.n2 = empty(tokens, self.hidden + self.padded_rank), empty(tokens, self.hidden)
        wide = empty(tokens * max(self.inner, 3 * self.hidden))  # gelu의 값과 dqkv는 함께 살아 있지 않는다
        self.g = wide[:tokens * self.inner].view(tokens, self.inner)
        self.dqkv = wide[:tokens * 3 * self.hidden].view(tokens, *heads)
        self.t, self.scratch = empty(tokens, self.hidden), empty(scratch)
        self._tokens = tokens

    @torch.no_grad()
    def train(self, batch: dict) -> torch.Tensor:
        """gradient를 LoRA의 `.grad`에 더하고 `factor * 손실`을 돌려준다."""
        documents, keys = self._begin(batch), batch["keys"]
        for layer in self.layers:
            self._forward_layer(layer, documents, keys)
        targets = shifted_targets(batch["labels"]).flatten()
        gradient = self.t.new_empty(self.t.shape)
        weight, bias, eps = self.norm
        hidden, mean, deviation = torch.native_layer_norm(self.x[-1], (self.hidden,), weight, bias, eps)
        nll = head_loss(hidden, self.head, targets, batch["factor"], gradient, self.scratch, self.ops.cross_entropy)
        gradient = torch.ops.aten.native_layer_norm_backward(
            gradient, self.x[-1], (self.hidden,), mean, deviation, weight, bias, (True, False, False))[0]
        del hidden
        for layer in reversed(self.layers):
            if layer.index < self.recompute_layers:
                self._compute_activations(layer, self.saved[layer.index], None, documents, keys)
            self._backward_layer(layer, gradient, documents, keys)
        return nll.sum() * batch["factor"]

    @torch.no_grad()
    def evaluate(self, batch: dict) -> torch.Tensor:
        """dropout 없이 구한 음의 로그 가능도의 합."""
        documents = self._begin(batch)
        for layer in self.layers:
            self._forward_layer(layer, documents, None)
            self.saved[layer.index].drop()
        weight, bias, eps = self.norm
        hidden = torch.nn.functional.layer_norm(self.x[-1], (self.hidden,), weight, bias, eps)
        targets = shifted_targets(batch["labels"]).flatten()
        return head_loss(hidden, self.head, targets, None, None, self.scratch, self.ops.cross_entropy).sum()

    def _begin(self, batch: dict) -> Documents:
        self._prepare(batch["input_ids"].numel())
        self.ops.embed(self.body.embed_in.weight.detach(), batch["input_ids"], self.x[0])
        return Documents.find(batch["position_ids"], self.max_documents * len(batch["position_ids"]))

    def _forward_layer(self, layer: Layer, documents: Documents, keys) -> None:
        """`x[index]`에서 `x[index + 1]`을 구한다."""
        out, saved, ops = self.x[layer.index + 1], self.saved[layer.index], self.ops
        self._compute_activations(layer, saved, out, documents, keys)
        out.addmm_(saved.attended.flatten(1), ops.weight(layer.dense, self.scratch).t())
        ops.gelu(saved.h, self.g)
        out.addmm_(self.g, ops.weight(layer.down, self.scratch).t())

    def _compute_activations(self, layer: Layer, saved: Saved, residual, documents: Documents, keys) -> None:
        """backward에 필요한 것들을 `saved`에 적는다. forward와 재계산이 함께 쓴다."""
        ops = self.ops
        ops.norms(layer, self.x[layer.index], keys, self.n1, self.n2, residual, saved.z)
        weight = ops.weight(layer.qkv, self.scratch, layer)
        torch.addmm(layer.qkv_bias, self.n1, weight.t(), out=saved.qkv.flatten(1))
        ops.rotate(saved.qkv, documents.positions)
        saved.attended, saved.attention = self.attention.forward(*saved.qkv.unbind(2), documents)
        if residual is not None or layer.index > 0:
            torch.addmm(layer.up_bias, self.n2, ops.weight(layer.up, self.scratch).t(), out=saved.h)

    def _backward_layer(self, layer: Layer, gradient, documents: Documents, keys) -> None:
        """출력의 `gradient`를 제자리에서 입력의 gradient로 바꾸고 LoRA의 gradient를 더한다.

        첫 층의 입력은 얼어 있는 embedding이므로 거기서는 LoRA까지만 되돌아간다.
        """
        saved, ops, first = self.saved[layer.index], self.ops, layer.index == 0
        if not first:
            torch.mm(gradient, ops.weight(layer.down, self.scratch), out=self.g)
            ops.gelu_backward(saved.h, self.g)
            torch.mm(self.g, ops.weight(layer.up, self.scratch), out=self.n2)
        torch.mm(gradient, ops.weight(layer.dense, self.scratch), out=self.t)
        parts = self.attention.backward(self.t.view_as(saved.attended), *saved.qkv.unbind(2), saved.attended,
                                        saved.attention, documents)
        saved.drop()
        ops.unrotate(*parts, documents.positions, self.dqkv)
        del parts
        dqkv = self.dqkv.flatten(1)
        weight = ops.weight(layer.qkv, self.scratch, layer)
        torch.mm(dqkv, weight, out=self.n1)
        up = torch.mm(dqkv.t(), saved.z)[:, :layer.rank]
        layer.lora_b.grad.add_(up, alpha=layer.scale)
        ops.norms_backward(layer, self.x[layer.index], keys, self.n1, self.n2, None if first else gradient, self.t)
        down = torch.mm(self.n1[:, self.hidden:].t(), self.t)[:layer.rank]
        layer.lora_a.grad.add_(down)
