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
    family, formula, tokens = step.family, TorchOps(step.family), rows * block
    layer, errors = step.layers[1], {}
    keys = torch.tensor([[5, -7], [11, 13]], dtype=torch.int32, device=device)[:rows]
    positions = torch.cat([torch.arange(block - 6), torch.arange(6)]).expand(rows, block).contiguous().to(device)

    def random(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    def compare(name: str, call) -> None:
        """call(ops, convert)가 돌려주는 tensor들을 비교한다. convert는 그 쪽의 dtype으로 바꾼 사본이다."""
        got = call(cuda, lambda tensor: tensor.clone())
        wanted = call(formula, lambda tensor: tensor.float().clone())
        for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
            error = float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-20))
            errors[f"{name} {index}"] = max(error, errors.get(f"{name} {index}", 0.0))

    def zero(projection) -> None:
        for adapter in projection.adapters:
            adapter.lora_a.grad.zero_()

    hidden, ff = family.hidden, family.ff
    x, base, y = random(tokens, hidden), random(tokens, hidden), random(tokens, hidden)
    d1, d2 = random(tokens, hidden + 16), random(tokens, hidden + 8)
    norms = [norm for norm in (layer.norm1, layer.norm2) if norm is not None] or [None]
    bias = torch.randn(hidden, device=device)

    def norm(ops, copy):
        outs = [copy(random(tokens, hidden + 16)) for _ in norms]
        residual = copy(x)
        ops.norm(copy(x), list(zip(norms, outs, strict=True)), residual, bias)
        return [*(out[:, :hidden] for out in outs), residual]

    def norm_backward(ops, copy):
        pairs = list(zip(norms, (copy(d1), copy(d2)), strict=False))
        into = copy(base)
        ops.norm_backward(copy(x), pairs, into, into)
        alone = copy(base)
        ops.norm_backward(copy(x), pairs[:1], alone)
        return into, alone

    def post(ops, copy):
        out = copy(x)
        ops.post_norm(copy(y), layer.post1, copy(x), out)
        return [out]

    compare("norm", norm)
    compare("norm_backward", norm_backward)
    if layer.post1 is not None:
        compare("post_norm", post)
    for projection in layer.projections():
        wide, z = random(tokens, projection.columns + projection.tail), random(tokens, projection.tail)
        u, d = random(tokens, projection.columns), random(tokens, projection.columns + projection.tail)
        for adapter in projection.adapters:  # rank를 올린 칸의 dz는 0이다
            start = projection.columns + adapter.column
            d[:, start + adapter.rank:start + pad_rank(adapter.rank)] = 0

        def lora(ops, copy, projection=projection, wide=wide, z=z, u=u, d=d):
            mine, kept, back = copy(wide), copy(z), copy(d)
            ops.lora_down(mine, projection, keys, kept)
            zero(projection)
            ops.lora_backward(copy(u), back, projection, keys)
            return [mine, kept, back, *(adapter.lora_a.grad.clone() for adapter in projection.adapters)]

        def weight(ops, copy, projection=projection):
            room = torch.full((size_of(projection),), torch.nan, dtype=dtype, device=device)
            return [ops.weight(projection, room).clone()]

        def through_norm(ops, copy, projection=projection, d=d):
            back, stats = copy(d), torch.zeros(tokens, 2, device=device)
            ops.norm(copy(x), [(norms[0], copy(x))], stats=stats)
            zero(projection)
            ops.lora_backward(copy(x), back, projection, keys, norms[0], stats)
            return [back, *(adapter.lora_a.grad.clone() for adapter in projection.adapters)]

        compare("lora", lora)
        if projection.columns == hidden:
            compare("lora_norm", through_norm)
        compare("weight", weight)
    qkv, table = random(tokens, family.qkv_width), step._rotary_table(family.rotary_kinds[0], block)
    qk = random(tokens * (family.heads + family.kv_heads) * family.head_dim)
    parts = [random(tokens, heads, family.head_dim) for heads in (family.heads, family.kv_heads, family.kv_heads)]
    for angles in (table, None):
        def rotate(ops, copy, angles=angles):
            return [part.clone() for part in ops.rotate(copy(qkv), layer, positions, angles, copy(qk))]

        def unrotate(ops, copy, angles=angles):
            into = copy(qkv)
            ops.unrotate(*(copy(part) for part in parts), into, layer, positions, angles)
            return [into]

        compare("rotate", rotate)
        compare("unrotate", unrotate)
    h, da = random(tokens, family.mlp_width), random(tokens, ff + 8)

    def activate(ops, copy):
        out, into = copy(da), copy(h)
        ops.activate(copy(h), out)
        ops.activate_backward(into, copy(da))
        return [out[:, :ff], into]

    compare("activate", activate)
    logits, factor = random(tokens, 8 * (family.vocab // 8)) * 3, torch.tensor(0.03, device=device)
    vocab = logits.shape[1] - 3  # 행의 간격보다 좁은 어휘
    targets = torch.randint(0, vocab, (tokens,), device=device)
    targets[::5] = -100

    def loss(ops, copy):
        work = copy(logits)[:, :vocab]
        nll = ops.cross_entropy(work, targets, factor)
        return [nll, work, ops.cross_entropy(copy(logits)[:, :vocab], targets, None)]

    compare("cross_entropy", loss)
    ids = torch.randint(0, family.vocab, (tokens,), device=device)
    rows_of = random(family.vocab, hidden)

    def embed(ops, copy):
        out = copy(x)
        ops.embed(copy(rows_of), ids, out)
        return [out]

    compare("embed", embed)
    return errors
