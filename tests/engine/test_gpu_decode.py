"""GPU가 있으면 `pytest -m gpu tests/engine/test_gpu_decode.py`로 확인한다: 커널의 정확도, 같은 답, 뽑기의 분포."""

import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import families
from families import exact
from generate_check import draw
from standin import SHAPES, add_lora, build
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PhiConfig, PhiForCausalLM

from utils.decode.decoder import Decoder
from utils.engine.decode_engine import FastDecode, why_not
from utils.engine.decode_rows import DecodeRows
from utils.sampling import Sampling, penalize, probabilities

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA GPU가 없다")]
VOCAB = 30_003
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}


def half() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def plain(dtype, vocab=512, **sizes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512,
             "max_position_embeddings": 512, "rotary_pct": 0.5} | sizes
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab, bos_token_id=None, eos_token_id=None, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).cuda().eval()


def quantized(double, head=128, heads=2, layers=2, rotary=0.5):
    SHAPES["tiny"] = {"num_hidden_layers": layers, "hidden_size": head * heads, "num_attention_heads": heads,
                      "rotary_pct": rotary}
    return build("tiny", half(), double, half()).eval()


@torch.no_grad()
def errors(model, vocab, prompt=40, answer=30):
    """정답과의 상대 오차: (우리, transformers)."""
    model.eval()
    ids = torch.randint(0, vocab, (prompt + answer,), generator=torch.Generator().manual_seed(1)).tolist()
    ours = FastDecode(model, vocab).logits(ids[:prompt], ids[prompt:])
    batch = torch.tensor([ids[:-1]], device="cuda")
    theirs, truth = (side(batch).logits[0, prompt - 1 :, :vocab].float() for side in (model, exact(model)))
    assert not ours.isnan().any()
    return float((ours - truth).norm() / truth.norm()), float((theirs - truth).norm() / truth.norm())


@pytest.mark.parametrize("sizes", [{}, {"num_attention_heads": 8, "rotary_pct": 0.25}, {"num_attention_heads": 1},
                                   {"hidden_size": 640, "num_attention_heads": 8, "rotary_pct": 1.0},
                                   {"hidden_size": 384, "intermediate_size": 640, "num_attention_heads": 3}])
@pytest.mark.parametrize("lora", [0, 8])
def test_plain_weights(sizes, lora):
    model = plain(half(), **sizes)
    ours, theirs = errors(add_lora(model, up=0.05) if lora else model, 500)
    assert ours < max(1.2 * theirs, 0.01), (ours, theirs)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("head", "heads", "rank"), [(128, 2, 8), (64, 4, 20), (256, 1, 3), (128, 1, 0), (96, 4, 8)])
def test_nf4_weights(double, head, heads, rank):
    model = quantized(double, head, heads)
    ours, theirs = errors(add_lora(model, up=0.05, rank=rank) if rank else model, VOCAB)
    assert ours < max(1.2 * theirs, 0.01), (ours, theirs)


@pytest.mark.parametrize("prompt", [1, 31, 64, 127, 128, 129, 400, 1500])
def test_every_prompt_length(prompt):
    ours, theirs = errors(add_lora(quantized(True), up=0.05), VOCAB, prompt=prompt, answer=70)
    assert ours < max(1.2 * theirs, 0.01), (ours, theirs)


@pytest.mark.parametrize("kind", ["wide", "nf4", "int8"])
@pytest.mark.parametrize("name", ["gpt_neox", "qwen3", "gemma3_text"])
def test_questions_read_together_have_the_same_bits(name, kind):
    """질문들을 함께 읽은 잔차가 하나씩 읽은 것과 비트까지 같다. 길이를 채운 것과 조각으로 읽는 것이 모두 있다."""
    model = families.build(name, half(), **MIDDLE).cuda()
    model = model if kind == "wide" else families.quantize(model, kind)
    engine = FastDecode(families.add_lora(model, rank=8), 300)
    questions = [[(index * 7 + length) % 299 for index in range(length)] for length in (5, 64, 33, 128, 100, 700)]
    engine._step.cache.grow(701)
    alone = [engine._prefill(question).clone() for question in questions]
    rows = DecodeRows(engine._step)
    for cache in rows._caches[: len(questions)]:
        cache.grow(701)
    assert torch.equal(engine._prefill.many(questions, rows._table), torch.stack(alone))


MIDDLE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}


@pytest.mark.parametrize("kind", ["wide", "nf4", "single", "int8"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family(name, kind):
    """구조마다, 가중치의 꼴마다, 모든 선형층에 어댑터를 얹은 로짓. 창을 넘는 길이다."""
    model = families.build(name, half(), **MIDDLE).cuda()
    if kind != "wide":
        model = families.quantize(model, "int8" if kind == "int8" else "nf4", kind == "nf4")
    ours, theirs = errors(families.add_lora(model, rank=8), 300, prompt=90, answer=40)
    assert ours < max(1.2 * theirs, 0.01), (ours, theirs)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_greedy_of_every_family(name):
    """외운 모델의 답이 transformers의 답과 토큰 하나까지 같다. 질문 20개, 토큰 128개."""
    model, rows = trained(families.build(name).cuda(), 304)
    model = model.to(half())
    decoder = Decoder(model, range(304), (-1,))
    assert "전용 CUDA 커널" in decoder.path
    settings = Sampling(**GREEDY, max_new_tokens=128)
    questions = [row[:24] for row in rows.tolist()]
    ids = torch.tensor(questions, device="cuda")
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=128,
                              pad_token_id=0)[:, 24:].tolist()
    assert [list(decoder.stream(question, settings)) for question in questions] == expected
    assert [reply.ids for reply in decoder.answer_many(questions, settings)] == expected


def trained(model, vocab):
    """무작위 토큰 열 20개를 외운 모델. 로짓의 차이가 뚜렷해서 반올림이 답을 바꾸지 못한다."""
    rows = torch.randint(1, vocab, (20, 160), generator=torch.Generator().manual_seed(3)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(1000):
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    return model.eval(), rows


def test_greedy_equals_generate():
    model, rows = trained(plain(torch.float32, num_hidden_layers=2, max_position_embeddings=256), 512)
    model = model.to(half())
    decoder = Decoder(model, range(512), (-1,))
    assert "전용 CUDA 커널" in decoder.path
    ids = rows[:, :24]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=128,
                              pad_token_id=0)[:, 24:].tolist()
    settings = Sampling(**GREEDY, max_new_tokens=128)
    assert [list(decoder.stream(question, settings)) for question in ids.tolist()] == expected


def test_adapter_switch_stop_and_seed():
    base, ids = quantized(True), list(range(100, 150))
    settings = Sampling(**GREEDY, max_new_tokens=40)
    answer = list(Decoder(base, range(VOCAB), (-1,)).stream(ids, settings))
    decoder = Decoder(add_lora(base, up=0.3), range(VOCAB), (-1,))
    tuned = list(decoder.stream(ids, settings))
    decoder.use_adapter(False)
    assert list(decoder.stream(ids, settings)) == answer != tuned
    decoder.use_adapter(True)
    assert list(decoder.stream(ids, settings)) == tuned
    stop = threading.Event()
    stream = decoder.stream(ids, settings, stop)
    assert [next(stream), next(stream)] == tuned[:2]
    stop.set()
    assert not list(stream) and decoder.finish_reason == "cancelled"
    drawn = [list(decoder.stream(ids, Sampling(1.0, 1.0, top_k, 40, seed=seed)))
             for top_k, seed in ((0, 1), (0, 1), (0, 2), (40, 1), (40, 1))]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[3] == drawn[4]
    assert len(list(decoder.stream([5] * 2040, Sampling(**GREEDY)))) == 8


@pytest.fixture(scope="module", params=[500, 50_000])
def engine(request):
    """어휘가 작으면 로짓을 레지스터에, 크면 메모리에 둔다."""
    return FastDecode(plain(half(), vocab=request.param + 12), request.param)


def drawn(engine, logits, answer, settings, times):
    """뽑기 커널만 여러 번 부른 결과. 큰 어휘의 나머지 로짓은 뽑히지 않을 만큼 작다."""
    whole = torch.full_like(engine._step.logits, -1e4)
    whole[: len(logits)] = logits.cuda()
    return draw(engine._step, whole, answer, settings, times).cpu()


@pytest.mark.parametrize(("penalty", "ngram"), [(1.0, 0), (3.0, 0), (1.0, 1), (1.0, 2), (1.5, 3)])
def test_penalties(engine, penalty, ngram):
    settings = Sampling(**GREEDY, repetition_penalty=penalty, no_repeat_ngram_size=ngram)
    answer = [5, 6, 7, 5, 6, 9, 5, 6]
    logits = torch.randn(500, generator=torch.Generator().manual_seed(4))
    logits[[5, 7, 9]] = torch.tensor([20.0, 19.0, 18.0])
    assert drawn(engine, logits, answer, settings, 1).item() == int(penalize(logits, answer, settings).argmax())


@pytest.mark.parametrize("settings", [
    Sampling(0.9, 1.0, 0), Sampling(0.9, 0.8, 0), Sampling(1.2, 1.0, 20), Sampling(1.2, 0.9, 400),
    Sampling(0.8, 0.9, 40, repetition_penalty=1.3), Sampling(1.0, 0.5, 1), Sampling(1.0, 1.0, 256)])
def test_sampling_follows_the_distribution(engine, settings):
    """20,000번 뽑은 도수의 카이제곱 값이 자유도에 맞는다."""
    answer, logits = [5, 6, 7, 5, 6, 9], torch.randn(500, generator=torch.Generator().manual_seed(9)) * 2
    expected = probabilities(penalize(logits, answer, settings), settings) * 20_000
    counts = torch.bincount(drawn(engine, logits, answer, settings, 20_000), minlength=500).float()
    assert counts[expected == 0].sum() == 0
    big = expected >= 5
    statistic, freedom = float(((counts - expected) ** 2 / expected)[big].sum()), int(big.sum()) - 1
    assert statistic < freedom + 3.1 * (2 * max(freedom, 1)) ** 0.5 + 4


def test_other_models_take_the_captured_forward():
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                     num_attention_heads=4, max_position_embeddings=4096, bos_token_id=None,
                                     eos_token_id=None)).cuda().eval()
    decoder, ids = Decoder(model, range(300), (-1,)), torch.arange(1, 30, device="cuda")[None]
    assert "CUDA graph" in decoder.path and "phi" in decoder.path
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=50,
                              pad_token_id=0)[0, 29:].tolist()
    settings = Sampling(**GREEDY, max_new_tokens=50)
    assert list(decoder.stream(ids[0].tolist(), settings)) == expected
    long = [5] * 1500 + ids[0].tolist()  # cache가 자란다
    replies = decoder.answer_many([ids[0].tolist(), long, [7]], settings)
    assert [reply.ids for reply in replies] == [list(decoder.stream(question, settings))
                                                for question in (ids[0].tolist(), long, [7])]
    assert why_not(plain(torch.float32)) is not None


def test_long_talk_grows_the_cache():
    """쪽을 넘어 자란 cache의 로짓이 정답과 같다. 긴 질문은 조각으로 읽는다."""
    model = families.build("qwen3", half(), **MIDDLE | {"max_position_embeddings": 8192}).cuda()
    for prompt, answer in ((500, 60), (3000, 20)):
        ours, theirs = errors(model, 300, prompt=prompt, answer=answer)
        assert ours < max(1.2 * theirs, 0.015), (ours, theirs)
