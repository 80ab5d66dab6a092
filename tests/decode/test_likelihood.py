"""글의 로그 가능도: 하나씩 따로 계산한 transformers의 확률과 같고, 묶는 방법이 값을 바꾸지 않는다."""

import weakref

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from utils.decode import likelihood

pytestmark = pytest.mark.quick
VOCAB = 320


# 글이 12토큰을 넘으면 앞의 토큰까지 다른 주파수로 돌리는 rotary
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12,
            "short_factor": [1.0] * 8, "long_factor": [2.0 + at for at in range(8)]}


@pytest.fixture(scope="module", params=["llama", "mamba", "longrope"])
def model(request):
    torch.manual_seed(0)
    if request.param == "mamba":  # 순환하는 층: 왼쪽을 채우면 값이 바뀌는 구조
        return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4,
                                            initializer_range=0.3)).eval()
    rope = {"rope_parameters": LONGROPE} if request.param == "longrope" else {}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=2, initializer_range=0.3, **rope)).eval()


@pytest.fixture(scope="module")
def pairs() -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, VOCAB, rng.integers(1, 30)).tolist(), rng.integers(0, VOCAB, rng.integers(1, 9)).tolist())
            for _ in range(25)]


def alone(model, context: list[int], tokens: list[int]) -> torch.Tensor:
    """한 줄만 넣은 forward의 로그 확률 [n, vocab]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + tokens[:-1]])).logits[0].double()
    return logits.log_softmax(-1)[len(context) - 1 :]


@pytest.mark.parametrize("row_tokens, logit_bytes", [(1, 1), (100, 1 << 20), (1 << 20, 1 << 30)])
def test_equals_one_forward_for_each_item(model, pairs, row_tokens, logit_bytes, monkeypatch):
    monkeypatch.setattr(likelihood, "ROW_TOKENS", row_tokens)
    monkeypatch.setattr(likelihood, "LOGIT_BYTES", logit_bytes)
    values = likelihood.measure(model, pairs, top=3)
    assert len({round(value.total, 3) for value in values}) > 20
    for (context, tokens), value in zip(pairs, values, strict=True):
        expected = alone(model, context, tokens)
        chosen = expected.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert value.logprobs == pytest.approx(chosen.numpy(), abs=1e-4)
        assert value.total == pytest.approx(float(chosen.sum()), abs=1e-3)
        best = expected.topk(3, -1)
        assert value.top_ids.tolist() == best.indices.tolist()
        assert value.top_logprobs == pytest.approx(best.values.numpy(), abs=1e-4)


def test_a_batch_that_does_not_fit_is_halved_after_its_memory_is_freed(model, pairs):
    """실패한 forward의 중간값을 쥔 채 다시 재면 반으로 나누어도 들어가지 않는다."""
    whole, failed, held = likelihood.measure(model, pairs), [], []

    def run_out(head, inputs):
        held.extend(value() for value in failed if value() is not None)
        if len(inputs[0]) > 2:
            failed.append(weakref.ref(inputs[0]))
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.get_output_embeddings().register_forward_pre_hook(run_out)
    try:
        halved = likelihood.measure(model, pairs)
    finally:
        hook.remove()
    assert failed and not held
    assert [one.total for one in halved] == pytest.approx([one.total for one in whole], abs=1e-3)


def test_tells_how_many_were_measured(model, pairs, monkeypatch):
    """오래 걸리는 시험이 얼마나 되었는지 말할 수 있게, forward마다 잰 글의 수를 알린다."""
    monkeypatch.setattr(likelihood, "ROW_TOKENS", 64)
    told = []
    likelihood.measure(model, pairs, told=told.append)
    assert len(told) > 1 and sum(told) == len(pairs)


def test_greedy_says_whether_decoding_would_write_it(model, pairs):
    written = []
    for context, _ in pairs[:6]:
        tokens = list(context)
        for _ in range(5):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        written.append((context, tokens[len(context):]))
    spoilt = [(context, [*tokens[:-1], (tokens[-1] + 1) % VOCAB]) for context, tokens in written]
    assert [value.greedy for value in likelihood.measure(model, written + spoilt)] == [True] * 6 + [False] * 6


def test_follows_the_adapter_of_a_peft_model(pairs):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=2))
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    on = likelihood.measure(tuned, pairs)
    with tuned.disable_adapter():
        off = likelihood.measure(tuned, pairs)
        plain = [float(alone(tuned, *pair).gather(-1, torch.tensor(pair[1])[:, None]).sum()) for pair in pairs]
    assert [value.total for value in off] == pytest.approx(plain, abs=1e-3)
    assert max(abs(a.total - b.total) for a, b in zip(on, off, strict=True)) > 1e-2


def test_nothing_to_measure(model):
    assert likelihood.measure(model, []) == []
