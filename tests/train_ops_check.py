"""학습의 커널과 torch 식을 연산 하나씩 비교한다. CPU의 흉내와 GPU의 테스트가 함께 쓴다."""

import torch

from utils.engine.train_memory import pad_rank
from utils.engine.train_ops import TorchOps
from utils.engine.unpacked import size_of


@torch.no_grad()
def op_errors(cuda, step, dtype: torch.dtype, device, rows: int = 2, block: int = 21) -> dict[str, float]:
    """연산의 이름 -> 커널과 식의 상대 오차. 식은 같은 16비트 입력으로 fp32로 계산한다.

    Args:
        cuda: 확인할 `CudaOps`.
        step: 층의 가중치를 빌릴 `TrainStep`.
    """
    torch.manual_seed(0)
    check = OpCheck(cuda, step, dtype, device, rows, block)
    check.norms()
    for projection in check.layer.projections():
        check.linear(projection)
    check.rotations()
    check.activations()
    check.losses()
    check.embeddings()
    return check.errors


class OpCheck:
    """무작위 입력으로 두 구현을 부르고, 결과마다의 상대 오차를 모은다.

    Attributes:
        errors: `연산의 이름 결과의 번호` -> 상대 오차. 같은 이름으로 여러 번 비교하면 가장 큰 것이다.
    """

    def __init__(self, cuda, step, dtype: torch.dtype, device, rows: int, block: int):
        self.cuda, self.formula = cuda, TorchOps(step.family)
        self.step, self.family, self.layer = step, step.family, step.layers[1]
        self.dtype, self.device = dtype, device
        self.tokens, self.block = rows * block, block
        self.keys = torch.tensor([[5, -7], [11, 13]], dtype=torch.int32, device=device)[:rows]
        positions = torch.cat([torch.arange(block - 6), torch.arange(6)])
        self.positions = positions.expand(rows, block).contiguous().to(device)
        self.errors: dict[str, float] = {}
        hidden = self.family.hidden
        self.x, self.base, self.y = (self.random(self.tokens, hidden) for _ in range(3))
        self.gradients = self.random(self.tokens, hidden + 16), self.random(self.tokens, hidden + 8)
        self.own_norms = [norm for norm in (self.layer.norm1, self.layer.norm2) if norm is not None] or [None]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def compare(self, name: str, call) -> None:
        """call(ops, copy)가 돌려주는 tensor들을 비교한다. copy는 그 쪽의 dtype으로 바꾼 사본을 만든다."""
        got = call(self.cuda, lambda tensor: tensor.clone())
        wanted = call(self.formula, lambda tensor: tensor.float().clone())
        for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
            error = float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-20))
            self.errors[f"{name} {index}"] = max(error, self.errors.get(f"{name} {index}", 0.0))

    def norms(self) -> None:
        hidden, norms, x, base = self.family.hidden, self.own_norms, self.x, self.base
        bias = torch.randn(hidden, device=self.device)

        def forward(ops, copy):
            outs = [copy(self.random(self.tokens, hidden + 16)) for _ in norms]
            residual = copy(x)
            ops.norm(copy(x), list(zip(norms, outs, strict=True)), residual, bias)
            return [*(out[:, :hidden] for out in outs), residual]

        def backward(ops, copy):
            pairs = list(zip(norms, map(copy, self.gradients), strict=False))
            into = copy(base)
            ops.norm_backward(copy(x), pairs, into, into)
            alone = copy(base)
            ops.norm_backward(copy(x), pairs[:1], alone)
            return into, alone

        def post(ops, copy):
            out = copy(x)
            ops.post_norm(copy(self.y), self.layer.post1, copy(x), out)
            return [out]

        self.compare("norm", forward)
        self.compare("norm_backward", backward)
        if self.layer.post1 is not None:
            self.compare("post_norm", post)

    def linear(self, projection) -> None:
        """선형층 하나의 LoRA와, 푼 가중치."""
        tokens, keys, wide_columns = self.tokens, self.keys, projection.columns + projection.tail
        wide, z = self.random(tokens, wide_columns), self.random(tokens, projection.tail)
        u, d = self.random(tokens, projection.columns), self.random(tokens, wide_columns)
        for adapter in projection.adapters:  # rank를 올린 칸의 dz는 0이다
            start = projection.columns + adapter.column
            d[:, start + adapter.rank:start + pad_rank(adapter.rank)] = 0

        def gradients() -> list[torch.Tensor]:
            return [adapter.lora_a.grad.clone() for adapter in projection.adapters]

        def zero() -> None:
            for adapter in projection.adapters:
                adapter.lora_a.grad.zero_()

        def lora(ops, copy):
            mine, kept, back = copy(wide), copy(z), copy(d)
            ops.lora_down(mine, projection, keys, kept)
            zero()
            ops.lora_backward(copy(u), back, projection, keys)
            return [mine, kept, back, *gradients()]

        def through_norm(ops, copy):
            back, stats = copy(d), torch.zeros(tokens, 2, device=self.device)
            ops.norm(copy(self.x), [(self.own_norms[0], copy(self.x))], stats=stats)
            zero()
            ops.lora_backward(copy(self.x), back, projection, keys, self.own_norms[0], stats)
            return [back, *gradients()]

        def weight(ops, copy):
            room = torch.full((size_of(projection),), torch.nan, dtype=self.dtype, device=self.device)
            return [ops.weight(projection, room).clone()]

        self.compare("lora", lora)
        if projection.columns == self.family.hidden:
            self.compare("lora_norm", through_norm)
        self.compare("weight", weight)

    def rotations(self) -> None:
        """rotary를 걸 때와, 각도 없이 q와 k의 norm만 할 때."""
        family, tokens = self.family, self.tokens
        qkv, table = self.random(tokens, family.qkv_width), self.step._rotary_table(family.rotary_kinds[0], self.block)
        qk = self.random(tokens * (family.heads + family.kv_heads) * family.head_dim)
        heads = family.heads, family.kv_heads, family.kv_heads
        parts = [self.random(tokens, each, family.head_dim) for each in heads]
        for angles in (table, None):
            def rotate(ops, copy, angles=angles):
                rotated = ops.rotate(copy(qkv), self.layer, self.positions, angles, copy(qk))
                return [part.clone() for part in rotated]

            def unrotate(ops, copy, angles=angles):
                into = copy(qkv)
                ops.unrotate(*map(copy, parts), into, self.layer, self.positions, angles)
                return [into]

            self.compare("rotate", rotate)
            self.compare("unrotate", unrotate)

    def activations(self) -> None:
        h, da = self.random(self.tokens, self.family.mlp_width), self.random(self.tokens, self.family.ff + 8)

        def activate(ops, copy):
            out, into = copy(da), copy(h)
            ops.activate(copy(h), out)
            ops.activate_backward(into, copy(da))
            return [out[:, :self.family.ff], into]

        self.compare("activate", activate)

    def losses(self) -> None:
        logits = self.random(self.tokens, 8 * (self.family.vocab // 8)) * 3
        factor = torch.tensor(0.03, device=self.device)
        vocab = logits.shape[1] - 3  # 행의 간격보다 좁은 어휘
        targets = torch.randint(0, vocab, (self.tokens,), device=self.device)
        targets[::5] = -100

        def loss(ops, copy):
            work = copy(logits)[:, :vocab]
            nll = ops.cross_entropy(work, targets, factor)
            return [nll, work, ops.cross_entropy(copy(logits)[:, :vocab], targets, None)]

        self.compare("cross_entropy", loss)

    def embeddings(self) -> None:
        ids = torch.randint(0, self.family.vocab, (self.tokens,), device=self.device)
        table = self.random(self.family.vocab, self.family.hidden)

        def embed(ops, copy):
            out = copy(self.x)
            ops.embed(copy(table), ids, out)
            return [out]

        self.compare("embed", embed)
