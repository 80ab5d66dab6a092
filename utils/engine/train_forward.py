"""학습의 micro-step이 앞으로 가는 길: 버퍼를 잡고, 층마다 값을 구하고, backward가 쓸 것만 남긴다."""

from dataclasses import dataclass, field

import torch
from torch import nn

from utils.data.blocks import shifted_targets
from utils.engine.attention import Attention, Documents, choose_attention
from utils.engine.cuda import CompileError
from utils.engine.families import describe
from utils.engine.family import Family
from utils.engine.norms import read_norm
from utils.engine.single_attention import choose_single, is_single
from utils.engine.train_kernels import CudaOps
from utils.engine.train_layers import Layer, Projection, largest_tails, move_embedding, read_layers
from utils.engine.train_memory import kept_widths, lent_width, pad_row, saved_widths, scratch_elements, work_widths
from utils.engine.train_ops import TorchOps
from utils.engine.unpacked import Unpacker
from utils.model.loss import head_loss
from utils.model.objective import measured


@dataclass
class Saved:
    """한 층의 backward가 쓰려고 forward가 남기는 것. tokens는 micro batch의 토큰 수다. 없는 것은 None이다."""

    qkv: torch.Tensor                  # [tokens, qkv_width]. backward에서는 그 gradient로 덮인다
    h: torch.Tensor                    # [tokens, mlp_width], 활성 함수의 앞. backward에서는 그 gradient로 덮인다
    mid: torch.Tensor | None = None    # [tokens, hidden], attention까지 더한 잔차
    post1: torch.Tensor | None = None  # [tokens, hidden], norm을 걸기 전의 attention 출력
    post2: torch.Tensor | None = None  # [tokens, hidden], norm을 걸기 전의 MLP 출력
    attended: torch.Tensor | None = None  # [tokens, heads, head_dim]
    attention: list = field(default_factory=list)

    def drop(self) -> None:
        """attention이 잡은 메모리를 놓는다."""
        self.attended, self.attention = None, []


class Forward:
    """버퍼를 쥐고 forward를 계산한다. backward는 `train_step.TrainStep`이 더한다.

    Args:
        model: PEFT로 감싼 causal LM. `describe(model, training=True)`가 `Family`를 주는 것이어야 한다.
        recompute_layers: backward에서 다시 계산할 층의 수. 앞의 층부터 센다.
        max_documents: 블록 하나에 든 문서의 최대 수.
        exact: GPU에서 두 번 배워도 비트까지 같게 한다. 긴 문서에서는 느려진다.

    GPU에서는 출력 행렬과 묶이지 않은 입력 embedding을 `HostEmbedding`으로 바꾸어 VRAM에서 내린다.
    """

    def __init__(self, model: nn.Module, recompute_layers: int = 0, max_documents: int = 1, exact: bool = False):
        family = describe(model, training=True)
        if isinstance(family, str):
            raise ValueError(family)
        self.family: Family = family
        self.base = model.get_base_model()
        self.head = self.base.get_output_embeddings().weight.detach()  # [vocab, hidden]
        self.dtype, self.device = self.head.dtype, self.head.device
        if self.device.type == "cuda" and self.head.data_ptr() != self._table().data_ptr():
            move_embedding(self.base)
        # 모듈이 쥔 배율이 16비트로 반올림되어 있으면 fp32로 계산할 때도 그 값이다
        scale = getattr(self.base.get_input_embeddings(), "embed_scale", None)
        self.embedding_scale = family.scale_of_embedding(self.dtype) if scale is None else float(scale.to(self.dtype))
        self.layers = read_layers(self.base, family, self.dtype)
        self.tails = largest_tails(self.layers)
        self.final_norm = read_norm(self.base.get_submodule(family.final_norm), family)
        self.recompute_layers = min(recompute_layers, len(self.layers) - 1)
        self.max_documents = max_documents
        self.ops = self._choose_ops()
        shape = family.heads, family.kv_heads, family.head_dim, family.attention_scale
        self.attention = choose_attention(*shape, any(family.windows), self.dtype, self.device, exact)
        self.single = None if exact else choose_single(*shape, self.dtype, self.device)
        self.release()

    @property
    def path(self) -> str:
        single = f"(문서 하나면 {self.single.name})" if self.single else ""
        return (f"손으로 쓴 {self.family.kind}({self.ops.name}, attention: {self.attention.name}{single}, "
                f"재계산 {self.recompute_layers}/{len(self.layers)}층)")

    def _choose_ops(self) -> TorchOps:
        if self.device.type == "cuda" and self.dtype is not torch.float32:
            try:
                return CudaOps(self.family, self.dtype)
            except CompileError:
                pass
        return TorchOps(self.family)

    def _table(self) -> torch.Tensor:
        """입력 embedding의 표 [vocab, hidden]."""
        return self.base.get_input_embeddings().weight.detach()

    def recompute_more(self) -> bool:
        """재계산하는 층을 늘린다. 더 늘릴 수 없으면 False."""
        before, most = self.recompute_layers, len(self.layers) - 1
        self.recompute_layers = min(most, before + max(1, len(self.layers) // 4))
        self.release()
        return before < most

    def release(self) -> None:
        """잡아 둔 메모리를 놓는다."""
        self._shape = None
        self.x = self.z = self.stats = self.saved = self.buffers = self.unpacker = self.tables = None

    def _prepare(self, rows: int, block: int) -> None:
        """rows x block 토큰의 메모리를 잡는다. 크기는 `train_memory`가 정한다."""
        if (rows, block) == self._shape:
            return
        self.release()
        tokens, family = rows * block, self.family

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=self.dtype, device=self.device)

        kept = kept_widths(family, self.tails)
        # 층마다 따로 잡아, 가중치를 올리며 할당기에 생긴 작은 틈을 채우게 한다
        self.x = [empty(tokens, kept["x"]) for _ in range(len(self.layers) + 1)]
        # 층마다 norm 둘의 (평균, 1/표준편차)
        self.stats = torch.zeros(len(self.layers), 2, tokens, 2, dtype=torch.float32, device=self.device)
        self.z = [{name: empty(tokens, part.tail) for name, part in self._named(layer)} for layer in self.layers]
        widths = saved_widths(family, self.tails)
        alone = max(len(self.layers) - self.recompute_layers - 1, 0)
        stacks = {name: empty(alone + 1, tokens, width) for name, width in widths.items()}
        # 재계산하는 층과, backward가 곧바로 이어지는 마지막 층은 한 벌을 함께 쓴다
        shared, *own = [Saved(**{name: stack[at] for name, stack in stacks.items()}) for at in range(alone + 1)]
        self.saved = [*[shared] * self.recompute_layers, *own]
        self.saved += [shared] * (len(self.layers) - len(self.saved))
        sizes = [tokens * width for width in work_widths(family, self.tails).values()]
        sizes.append(scratch_elements(family, self.tails, tokens, self.recompute_layers))
        # 한꺼번에 잡아, 저마다 할당기의 덩어리 끝을 비워 두지 않게 한다
        room = empty(sum(sizes))
        *parts, scratch = room.split(sizes)
        self.buffers = dict(zip(work_widths(family, self.tails), parts, strict=True))
        self.unpacker = Unpacker(lambda projection, out: self.ops.weight(projection, out), scratch,
                                 room[-len(scratch) - tokens * lent_width(family, self.tails):])
        self.tables = [self._rotary_table(kind, block) for kind in family.rotary_kinds]
        self._shape = (rows, block)

    def _rotary_table(self, kind: str | None, block: int) -> torch.Tensor:
        """자리마다의 cos과 sin [block, rotary] fp32. 모델의 rotary 모듈이 그 dtype으로 반올림한 값을 그대로 쓴다."""
        rotary = (self.base.gpt_neox if self.family.interleaved else self.base.model).rotary_emb
        positions = torch.arange(block, device=self.device)[None]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = rotary(like, positions) if kind is None else rotary(like, positions, kind)
        half = cos.shape[-1] // 2
        return torch.cat([cos[0, :, :half], sin[0, :, :half]], -1).float().contiguous()

    @staticmethod
    def _named(layer: Layer) -> list[tuple[str, Projection]]:
        return [("qkv", layer.qkv), ("out", layer.out), ("mlp", layer.mlp), ("down", layer.down)]

    def _wide(self, name: str, width: int) -> torch.Tensor:
        """버퍼를 [tokens, width]로 본다. 층마다 LoRA의 칸 수가 다를 수 있어 앞쪽만 쓴다."""
        tokens, stride = len(self.x[0]), pad_row(width)
        return self.buffers[name][:tokens * stride].view(tokens, stride)[:, :width]

    def options(self, batch: dict) -> dict:
        """`batch`(CPU)에 맞는 `train`과 `evaluate`의 인자."""
        return {"single": self.single is not None and is_single(batch)}

    def _attention_of(self, layer: Layer, documents: Documents) -> Attention:
        """이 층의 attention. 문서가 하나이고 창이 아무것도 가리지 않으면 경계를 보지 않는 빠른 것을 쓴다."""
        cut = 0 < layer.window < documents.longest
        return self.single if documents.single and not cut else self.attention

    def _qk(self) -> torch.Tensor:
        """norm을 걸고 돌린 q와 k의 자리 [tokens * qk_width]. norm이 없으면 비어 있다."""
        return self.buffers["t"][:len(self.x[0]) * self.family.qk_width if self.family.qk_norm else 0]

    @torch.no_grad()
    def evaluate(self, batch: dict, single: bool = False) -> torch.Tensor:
        """dropout 없이 구한 음의 로그 가능도의 합. 선호 쌍이면 쌍마다의 값(`objective.measured`)이다."""
        documents = self._begin(batch, "evaluate", single)
        for layer in self.layers:
            self._forward_layer(layer, documents, None)
            self.saved[layer.index].drop()
        hidden = self._wide("n1", self.family.hidden)
        self.ops.norm(self.x[-1], [(self.final_norm, hidden)])
        targets = shifted_targets(batch["labels"]).flatten()
        return measured(head_loss(hidden, self.head, targets, None, None, self.unpacker.lend(),
                                  self.ops.cross_entropy), batch)

    def _begin(self, batch: dict, name: str, single: bool) -> Documents:
        rows, block = batch["input_ids"].shape
        self._prepare(rows, block)
        self.unpacker.begin(name)
        self.ops.embed(self._table(), batch["input_ids"], self.x[0])
        if self.embedding_scale != 1.0:
            self.x[0].mul_(self.embedding_scale)
        return Documents.find(batch["position_ids"], self.max_documents * rows, single)

    def _forward_layer(self, layer: Layer, documents: Documents, keys) -> None:
        """`x[index]`에서 `x[index + 1]`을 구한다."""
        out = self.x[layer.index + 1]
        self._attend(layer, documents, keys, out, again=False)
        self._feed_forward(layer, keys, out, again=False)

    def _recompute_layer(self, layer: Layer, documents: Documents, keys) -> None:
        """forward가 남기지 않은 `saved`를 x와 z에서 다시 채운다."""
        self._attend(layer, documents, keys, None, again=True)
        self._feed_forward(layer, keys, None, again=True)

    def _attend(self, layer: Layer, documents: Documents, keys, out, again: bool) -> None:
        """attention까지. 차례로 읽는 구조는 잔차를 `saved.mid`에, 함께 읽는 구조는 `out`에 적는다."""
        family, ops, saved, z = self.family, self.ops, self.saved[layer.index], self.z[layer.index]
        x, residual = self.x[layer.index], out if family.parallel else saved.mid
        n1 = self._wide("n1", family.hidden + layer.qkv.tail)
        norms = [(layer.norm1, n1)]
        if family.parallel:
            norms.append((layer.norm2, self._wide("n2", family.hidden + layer.mlp.tail)))
        ops.norm(x, norms, None if family.post_norm else residual, layer.out_bias, self.stats[layer.index, 0])
        self._multiply(layer.qkv, n1, z["qkv"], keys, again, saved.qkv)
        table = self.tables[layer.turn] if layer.turn >= 0 else None
        q, k, v = ops.rotate(saved.qkv, layer, documents.positions, table, self._qk())
        attention = self._attention_of(layer, documents)
        saved.attended, saved.attention = attention.forward(q, k, v, documents, layer.window)
        if residual is None:
            return  # 함께 읽는 구조의 backward는 attention을 더한 값이 필요 없다
        attended = saved.attended.flatten(1)
        if layer.out.adapters:
            wide = self._wide("g", family.q_width + layer.out.tail)
            wide[:, :family.q_width] = attended
            attended = wide
        if family.post_norm:
            self._multiply(layer.out, attended, z["out"], keys, again, saved.post1)
            ops.post_norm(saved.post1, layer.post1, x, residual)
        else:
            self._accumulate(layer.out, attended, z["out"], keys, again, residual)

    def _feed_forward(self, layer: Layer, keys, out, again: bool) -> None:
        """MLP. 재계산에서 `out`은 None이다."""
        family, ops, saved, z = self.family, self.ops, self.saved[layer.index], self.z[layer.index]
        if family.parallel:
            n2 = self._wide("n2", family.hidden + layer.mlp.tail)
            if again and self._skips_mlp(layer):
                return
        else:
            n2 = self._wide("n1", family.hidden + layer.mlp.tail)
            ops.norm(saved.mid, [(layer.norm2, n2)], None if family.post_norm else out, layer.down_bias,
                     self.stats[layer.index, 1])
        self._multiply(layer.mlp, n2, z["mlp"], keys, again, saved.h)
        if again and not family.post_norm:
            return
        g = self._wide("g", family.ff + layer.down.tail)
        ops.activate(saved.h, g)
        if not family.post_norm:
            self._accumulate(layer.down, g, z["down"], keys, again, out)
            return
        self._multiply(layer.down, g, z["down"], keys, again, saved.post2)
        if not again:
            ops.post_norm(saved.post2, layer.post2, saved.mid, out)

    def _skips_mlp(self, layer: Layer) -> bool:
        """첫 층의 입력은 얼어 있는 embedding이라, 함께 읽는 구조의 MLP에 LoRA가 없으면 되돌아갈 곳이 없다."""
        return self.family.parallel and layer.index == 0 and not (layer.mlp.adapters or layer.down.adapters)

    def _multiply(self, projection: Projection, wide, z, keys, again: bool, out) -> None:
        """out = 선형층(LoRA까지)의 출력 [tokens, rows]. wide는 앞의 columns칸이 채워진 입력이다."""
        self._fill_tail(projection, wide, z, keys, again)
        weight = self.unpacker.take(projection)
        if projection.bias is None:
            torch.mm(wide, weight.t(), out=out)
        else:
            torch.addmm(projection.bias, wide, weight.t(), out=out)
        self.unpacker.give_back()

    def _accumulate(self, projection: Projection, wide, z, keys, again: bool, residual) -> None:
        """잔차 [tokens, hidden]에 배율을 곱한 출력을 더한다. bias는 이미 더해져 있다."""
        self._fill_tail(projection, wide, z, keys, again)
        residual.addmm_(wide, self.unpacker.take(projection).t(), alpha=self.family.residual_scale)
        self.unpacker.give_back()

    def _fill_tail(self, projection: Projection, wide, z, keys, again: bool) -> None:
        """입력의 끝에 z를 적는다. 재계산할 때는 forward가 남긴 것을 쓴다."""
        if again and projection.tail:
            wide[:, projection.columns:] = z
            return
        self.ops.lora_down(wide, projection, keys, z)
