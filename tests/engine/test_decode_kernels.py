"""GPU 없이 확인하는 대화의 커널: 같은 소스를 CPU에서 돌려 모든 구조의 로짓이 transformers의 것과 같다."""

import cuda_on_cpu
import pytest
import torch
from families import add_lora, build, exact, quantize

from utils.engine.cuda import CompileError, compile_to_cubin
from utils.engine.decode_engine import kernel_source, why_not
from utils.engine.decode_plan import Plan
from utils.engine.decode_rows import DecodeRows
from utils.engine.decode_space import INT8, NF4, WIDE
from utils.engine.decode_step import DecodeStep, kernel_names
from utils.engine.families import describe, rotary_frequencies
from utils.engine.kernel_cache import remembered
from utils.engine.kv_cache import PAGE, KvCache
from utils.engine.prefill import MANY, Prefill
from utils.engine.weights import Weights, why_not_weights

VOCAB = 300
MULTIPROCESSORS, SHARED = 8, 100_000


def prepare(model, folder) -> tuple[DecodeStep, Prefill]:
    family = describe(model)
    assert why_not_weights(model, family) is None
    weights = Weights(model, family)
    plan = Plan(family, VOCAB, weights.rank, weights.kind, weights.double_quant, weights.dtype == torch.bfloat16,
                MULTIPROCESSORS, 2 * SHARED if family.parallel else SHARED)  # NF4의 표의 두 간격을 모두 지난다
    step = DecodeStep(weights, plan, cuda_on_cpu.load_kernels(kernel_names(family), plan.defines, folder), VOCAB)
    return step, Prefill(step)


@torch.no_grad()
def follow(step: DecodeStep, prefill: Prefill, ids: list[int], prompt: int) -> torch.Tensor:
    """ids의 앞 `prompt`개를 질문으로 읽고 나머지를 한 토큰씩 먹이며 얻은 로짓."""
    step.cache.grow(len(ids))
    step.settings.copy_(torch.tensor([0.0, 1.0, 1.0]))
    step.state.copy_(torch.tensor([prompt - 1, 0, 0, 0, 0, 0], dtype=torch.int32))
    step.x.copy_(prefill(ids[:prompt]))
    step.choose(overlap=False)
    rows = [step.logits.clone()]
    for token in ids[prompt:]:
        step.x.copy_(step.weights.embedding[token].float() * step.weights.embedding_scale)
        step.run(overlap=False, soon=len(rows) % 2 == 1 and int(step.state[0]) < step.plan.attend_soon)
        rows.append(step.logits.clone())
    return torch.stack(rows)


@torch.no_grad()
def errors(model, folder, prompt: int = 20, answer: int = 6) -> tuple[float, float]:
    """정답과의 상대 오차: (커널, transformers)."""
    ids = torch.randint(1, VOCAB, (prompt + answer,), generator=torch.Generator().manual_seed(1)).tolist()
    truth = exact(model)(torch.tensor([ids])).logits[0, prompt - 1 :, :VOCAB]
    theirs = model(torch.tensor([ids])).logits[0, prompt - 1 :, :VOCAB].float()
    ours = follow(*prepare(model, folder), ids, prompt)
    return float((ours - truth).norm() / truth.norm()), float((theirs - truth).norm() / truth.norm())


needs_compiler = pytest.mark.skipif(not cuda_on_cpu.AVAILABLE, reason="x86-64 Linux의 g++가 없다")


@needs_compiler
@pytest.mark.parametrize(("name", "kind", "lora", "prompt"), [
    ("gpt_neox", "nf4", True, 20), ("gpt_neox-sequential", "int8", True, 5), ("llama", "nf4", True, 70),
    ("mistral", "wide", True, 40), ("qwen2", "single", True, 5), ("qwen3", "int8", False, 5),
    ("gemma3_text", "nf4", True, 40), ("exaone4", "wide", False, 40), ("exaone4-full", "nf4", True, 5),
    ("hyperclovax", "nf4", True, 5), ("granite", "wide", True, 5)])
def test_kernels_equal_transformers(name, kind, lora, prompt, tmp_path):
    model = build(name, torch.bfloat16)
    if kind != "wide":
        model = quantize(model, "int8" if kind == "int8" else "nf4", double_quant=kind == "nf4")
    ours, theirs = errors(add_lora(model) if lora else model, tmp_path, prompt)
    assert ours < max(1.2 * theirs, 0.01), (ours, theirs)


@needs_compiler
def test_widths_that_warps_cannot_share_evenly(tmp_path):
    """칸이 조각 셋, 일곱이라 워프들이 고르게 나눌 수 없는 행렬."""
    model = quantize(build("llama", torch.bfloat16, hidden_size=384, intermediate_size=896), "nf4", double_quant=True)
    ours, theirs = errors(add_lora(model), tmp_path, prompt=5, answer=3)
    assert ours < max(1.2 * theirs, 0.01), (ours, theirs)


def big(name: str, **sizes):
    """실제 크기의 구조. 가중치 없이 크기만 있으면 된다."""
    from dataclasses import replace

    return replace(describe(build(name)), **sizes)


POLYGLOT = {"hidden": 2048, "ff": 8192, "layers": 24, "heads": 16, "kv_heads": 16, "head_dim": 128, "rotary": 64,
            "context": 2048}
QWEN3 = {"hidden": 2048, "ff": 6144, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "rotary": 128,
         "context": 40960}
GEMMA3 = {"hidden": 640, "ff": 2048, "layers": 18, "heads": 4, "kv_heads": 1, "head_dim": 256, "rotary": 256,
          "context": 32768}
QWEN2 = QWEN3 | {"hidden": 896, "ff": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "head_dim": 64, "rotary": 64}


@pytest.mark.parametrize(("capability", "name", "sizes", "vocab", "rank", "weight", "double", "bf16"), [
    ((7, 5), "gpt_neox", POLYGLOT, 30_003, 8, NF4, False, False),
    ((8, 6), "qwen3", QWEN3, 151_669, 64, NF4, True, True),
    ((8, 6), "gemma3_text", GEMMA3, 262_144, 8, INT8, False, True),
    ((8, 9), "qwen2", QWEN2, 151_665, 0, WIDE, False, True),
    ((9, 0), "exaone4", QWEN3, 102_400, 8, NF4, True, True),
    ((12, 0), "granite", QWEN3, 49_152, 16, WIDE, False, True)])
def test_kernels_compile(capability, name, sizes, vocab, rank, weight, double, bf16):
    plan = Plan(big(name, **sizes), vocab, rank, weight, double, bf16, 20, 101_376 if capability[0] > 7 else 65_536)
    try:
        assert len(compile_to_cubin(kernel_source(), capability, plan.defines)) > 10_000
    except CompileError as error:
        if "NVRTC(" in str(error):
            pytest.skip("NVRTC가 없다")
        raise


def test_compiled_kernels_are_kept(tmp_path):
    """같은 것은 다시 컴파일하지 않고, 손상된 파일은 다시 컴파일하고, 쓸 수 없는 폴더에서도 컴파일한다."""
    made = iter([b"first", b"second", b"third"])
    assert [remembered(tmp_path / "kernels", ("a", 1), lambda: next(made)) for _ in range(2)] == [b"first"] * 2
    assert remembered(tmp_path / "kernels", ("a", 2), lambda: next(made)) == b"second"
    for file in (tmp_path / "kernels").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert remembered(tmp_path / "kernels", ("a", 1), lambda: next(made)) == b"third"
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert remembered(tmp_path / "file" / "kernels", ("a", 1), lambda: b"made") == b"made"


@pytest.mark.parametrize("multiprocessors", [16, 20, 46, 132])
@pytest.mark.parametrize(("name", "sizes"), [("gpt_neox", POLYGLOT), ("qwen3", QWEN3), ("gemma3_text", GEMMA3),
                                             ("gpt_neox", POLYGLOT | {"hidden": 5120, "ff": 20480, "heads": 40})])
def test_every_grid_fits_and_covers_its_rows(multiprocessors, name, sizes):
    """블록마다의 묶음이 공유 메모리와 스레드 수에 들어간다."""
    limit = 101_376
    family = big(name, **sizes)
    plan = Plan(family, 30_000, 8, NF4, True, True, multiprocessors, limit)
    tiles = {"project_mlp": family.ff // 16, "contract_out": family.hidden // 16, "contract_down": family.hidden // 16,
             "head": 30_000 // 16}
    for grid_name, count in tiles.items():
        grid = getattr(plan, grid_name)
        assert grid.shared <= limit and grid.blocks * grid.slots >= count


@pytest.mark.parametrize(("multiprocessors", "limit"), [(30, 65_536), (20, 101_376), (132, 232_448)])
def test_questions_are_read_within_the_shared_memory(multiprocessors, limit):
    family = big("gpt_neox", **POLYGLOT)
    plan = Plan(family, 30_000, 8, NF4, False, False, multiprocessors, limit)
    for rows in (family.qkv_width, family.ff, family.hidden):
        blocks, row_warps, shared = plan.reads.grid(rows)
        assert row_warps in (2, 4, 8) and blocks * row_warps * 16 >= rows
        assert shared <= plan.shared("read_linear") <= limit


@pytest.mark.parametrize(("name", "sizes"), [("gpt_neox", POLYGLOT), ("qwen3", QWEN3), ("gemma3_text", GEMMA3)])
def test_attention_follows_only_where_blocks_keep_to_heads(name, sizes):
    """큰 GPU에서는 q, k, v의 블록이 머리를 넘지 않아 attention을 이어서 센다. SM이 적으면 따로 센다."""
    family, gpus = big(name, **sizes), ((132, 232_448), (20, 101_376))
    large, small = (Plan(family, 30_000, 8, NF4, True, True, *gpu) for gpu in gpus)
    assert 0 < large.attend_soon <= PAGE and small.attend_soon == 0
    tiles = family.qkv_width // 16 // large.qkv_blocks
    assert tiles * large.qkv_blocks * 16 == family.qkv_width and family.head_dim * 3 % (tiles * 16) == 0


def test_reasons():
    """맡을 수 없는 모델은 그 이유를 말한다."""
    from transformers import PhiConfig, PhiForCausalLM

    phi = PhiForCausalLM(PhiConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                   num_attention_heads=2))
    assert "phi" in why_not(phi)
    assert why_not(build("qwen3")) == "GPU가 아님"
    assert "128" in why_not(build("llama", intermediate_size=200))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "rotary" in why_not(build("llama", rope_parameters=dynamic))
    assert "float32" in why_not_weights(build("llama"), describe(build("llama")))
    model = quantize(build("llama", torch.bfloat16), "nf4")
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(128, 256, bias=False, dtype=torch.bfloat16)
    assert "층마다" in why_not_weights(model, describe(model))


def test_weights_as_the_kernels_read_them():
    """LoRA의 A는 배율을 곱해 나란한 행렬의 차례로 쌓고, 없는 자리는 0이다. 행렬이 하나면 모델의 것을 그대로 읽는다."""
    model = add_lora(build("qwen2", torch.bfloat16), rank=4, targets=["q_proj", "v_proj", "down_proj"])
    layer = model.get_base_model().model.layers[0]
    weights = Weights(model, describe(model))
    qkv, down = weights.layers[0].qkv, weights.layers[0].down
    a = [layer.self_attn.q_proj.lora_A["default"].weight, None, layer.self_attn.v_proj.lora_A["default"].weight]
    assert weights.rank == 4 and qkv.adapter.down.shape == (3, 8, 128) and weights.layers[0].out.adapter is None
    assert torch.equal(qkv.adapter.down[0, :4], (a[0] * 2).bfloat16()) and not qkv.adapter.down[1].any()
    assert torch.equal(qkv.adapter.down[2, :4], (a[2] * 2).bfloat16()) and not qkv.adapter.down[:, 4:].any()
    own = layer.mlp.down_proj.lora_A["default"].weight, layer.mlp.down_proj.lora_B["default"].weight
    kept = down.adapter.down_fp32, down.adapter.up
    assert [one.data_ptr() for one in kept] == [one.data_ptr() for one in own] and down.adapter.scaling == 2
    assert torch.equal(qkv.bias[128:192], layer.self_attn.k_proj.bias.float())
    assert weights.head.data_ptr() == weights.embedding.data_ptr()  # 묶인 출력 행렬은 베끼지 않는다


def test_the_cache_grows_by_pages():
    """쪽은 쓰는 만큼만 늘고, 있던 쪽은 옮기지 않는다. Qwen3-1.7B의 2,048토큰이 200 MB를 넘지 않는다."""
    model = build("qwen3")
    family = describe(model)
    cache = KvCache(family, rotary_frequencies(model, family), torch.device("cpu"))
    cache.grow(1)
    first = int(cache.table[0])
    cache.grow(PAGE + 1)
    assert cache.capacity == 2 * PAGE and int(cache.table[0]) == first
    assert cache.fits(0) < cache.fits(1e9)
    free = next(free for free in range(0, 10**8, 1000) if cache.fits(free) == 7 * PAGE)  # 다섯 쪽을 더 담을 수 있다
    assert [cache.lines_that_fit([tokens] * 16, free) for tokens in (9, PAGE, PAGE + 1, 6 * PAGE)] == [5, 5, 2, 0]
    qwen = Plan(big("qwen3", **QWEN3), 151_669, 8, NF4, True, True, 132, 232_448)
    assert 4 * qwen.pages.size < 200e6 and qwen.lines.fits
    assert not Plan(big("qwen3", **QWEN3), 151_669, 8, NF4, True, False, 40, 65_536).lines.fits  # 7.5 세대


@needs_compiler
def test_long_questions_and_pages(tmp_path):
    """조각을 나누어 읽은 질문이 쪽을 넘었을 때의 로짓."""
    ours, theirs = errors(build("gemma3_text", torch.bfloat16), tmp_path, prompt=600, answer=3)
    assert ours < max(1.2 * theirs, 0.01), (ours, theirs)


@needs_compiler
def test_adapter_switch_and_sampling_on_the_cpu(tmp_path):
    """어댑터를 끈 로짓은 기반 모델의 것이고, 같은 시드는 같은 토큰을 뽑는다."""
    base = build("granite", torch.bfloat16)
    ids = list(range(5, 30))
    plain = follow(*prepare(base, tmp_path), ids, 20)
    (tmp_path / "tuned").mkdir()
    step, prefill = prepare(add_lora(base), tmp_path / "tuned")
    tuned = follow(step, prefill, ids, 20)
    step.adapter_on.fill_(0)
    assert torch.equal(follow(step, prefill, ids, 20), plain) and not torch.allclose(tuned, plain)
    step.settings.copy_(torch.tensor([0.9, 0.95, 1.0]))
    drawn = []
    for top_k, seed in ((0, 1), (0, 1), (40, 1), (40, 1)):
        step.state.copy_(torch.tensor([0, 0, top_k, 0, seed, 0], dtype=torch.int32))
        for _ in range(6):
            step.pick()
        drawn.append(step.answer[:6].tolist())
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]


@needs_compiler
@pytest.mark.parametrize(("name", "kind", "lengths", "sizes"), [
    ("gpt_neox", "nf4", (5, 29, 8), {"intermediate_size": 4096, "num_hidden_layers": 1}),
    ("qwen2", "int8", (5, 33), {}), ("gemma3_text", "nf4", (7, 60), {}), ("hyperclovax", "wide", (5, 6), {}),
    ("exaone4", "nf4", (30, 5), {"intermediate_size": 2048})])
def test_rows_together_equal_one_at_a_time(name, kind, lengths, sizes, tmp_path):
    """길이가 다른 질문들에 함께 답한 로짓이 하나씩 답한 것과 같고, 고른 토큰도 같다. 질문이 적으면 남는 줄은 헛돈다."""
    model = build(name, torch.bfloat16, **sizes)
    model = model if kind == "wide" else quantize(model, kind)
    step, prefill = prepare(add_lora(model), tmp_path)
    rows = DecodeRows(step)
    generator = torch.Generator().manual_seed(5)
    questions = [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    for adapter_on in (True, False) if name == "gpt_neox" else (True,):
        step.adapter_on.fill_(adapter_on)
        step.settings.copy_(torch.tensor([0.0, 1.0, 1.0]))
        rows.begin(prefill, questions, 8, [[0, 0, 0, 0]] * len(questions))
        read = prefill.many(questions, rows._table)
        step.cache.grow(1)
        together = [rows.logits.clone()]
        rows.run(overlap=False)
        together.append(rows.logits.clone())
        for line, question in enumerate(questions):
            assert torch.equal(read[line], prefill(question))  # 함께 읽어도 비트까지 같다
            alone = follow(step, prefill, question + rows.told[line, :1].tolist(), len(question))
            ours = torch.stack([logits[line] for logits in together])
            assert float((ours - alone).norm() / alone.norm()) < 1e-3
            assert rows.told[line, :2].tolist() == alone.argmax(-1).tolist()
        rows.release()


@needs_compiler
@pytest.mark.parametrize(("name", "kind"), [("gpt_neox", "nf4"), ("qwen2", "int8"), ("llama", "wide")])
def test_many_tokens_have_the_same_bits(name, kind, tmp_path):
    """토큰이 많아 블록이 크게 맡는 행렬 곱도 비트까지 같다. 질문의 토큰은 채우지 않고 이어 놓는다."""
    model = build(name, torch.bfloat16, num_hidden_layers=1)
    model = model if kind == "wide" else quantize(model, kind)
    step, prefill = prepare(add_lora(model), tmp_path)
    assert step.plan.reads.fits_many
    questions = [[(index * 7 + length) % 299 for index in range(length)] for length in (100, 31, 128, 5)]
    step.cache.grow(128)
    rows = DecodeRows(step)
    for cache in rows._caches[: len(questions)]:
        cache.grow(128)
    assert sum(map(len, questions)) >= MANY
    assert torch.equal(prefill.many(questions, rows._table), torch.stack([prefill(one) for one in questions]))
