"""정답과 똑같은 답의 수는, 탐욕적으로 답을 만들어 정답과 비교한 수와 같다."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from utils.data.documents import Documents
from utils.train.exact import SHORT_ANSWER, ExactMatch, measure

N_NEW = 8


def tuned(base, targets: list[str]):
    """어댑터가 답을 바꾸는 PEFT 모델."""
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1.0)
    return model


@pytest.fixture(params=["neox", "llama"])
def model(request, tiny_neox):
    torch.manual_seed(0)
    if request.param == "neox":
        base = AutoModelForCausalLM.from_pretrained(tiny_neox, dtype=torch.float32, attn_implementation="sdpa")
        return tuned(base, ["query_key_value"])
    config = LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, initializer_range=0.2)
    return tuned(LlamaForCausalLM._from_config(config, attn_implementation="sdpa"), ["q_proj", "v_proj"])


def greedy(model, prompt: list[int]) -> list[int]:
    """transformers가 탐욕적으로 만든 답. 끝 토큰이 없는 것으로 보고 N_NEW 토큰을 만든다."""
    out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False, eos_token_id=None,
                         pad_token_id=0)
    return out[0, len(prompt):].tolist()


def documents_of(rows: list[tuple[list[int], list[int]]]) -> Documents:
    """(질문, 답) 토큰을 담은 문서들."""
    tokens = np.concatenate([np.asarray(prompt + answer, np.int32) for prompt, answer in rows])
    answer = np.concatenate([np.repeat([False, True], [len(prompt), len(answer)]) for prompt, answer in rows])
    offsets = np.cumsum([0] + [len(prompt) + len(answer) for prompt, answer in rows])
    return Documents(tokens, answer, offsets, np.zeros(len(rows), np.uint64))


def prompts(n: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 300, rng.integers(3, 12)).tolist() for _ in range(n)]


def test_counts_what_greedy_decoding_would_answer(model):
    rows, expected = [], {"base": 0, "tuned": 0}
    for number, prompt in enumerate(prompts(12)):
        with model.disable_adapter():
            base = greedy(model, prompt)
        own = greedy(model, prompt)
        answer = [own, base, [*own[:-1], (own[-1] + 1) % 300]][number % 3]  # 셋째 것은 마지막 토큰만 다르다
        rows.append((prompt, answer))
        expected["base"] += base == answer
        expected["tuned"] += own == answer
    assert 0 < expected["base"] < 12 and 0 < expected["tuned"] < 12
    assert measure(model, documents_of(rows), np.arange(12)).as_dict() == {"rows": 12, **expected}
    kept = [number for number in range(12) if number % 3 != 0]
    assert measure(model, documents_of(rows), np.array(kept)).as_dict()["rows"] == 8


def test_data_of_long_answers_is_not_counted(model):
    short = [(prompt, greedy(model, prompt)) for prompt in prompts(2)]
    long = [([5, 6, 7], [10] * (SHORT_ANSWER + 1))]
    assert measure(model, documents_of(short + long), np.arange(3)).as_dict()["rows"] == 2
    assert measure(model, documents_of(short[:1] + long * 2), np.arange(3)) is None
    assert measure(model, documents_of(short), np.arange(0)) is None


def test_line_says_counts_and_shares():
    assert ExactMatch(200, 1, 190).line() == (
        "검증 질문 200개 가운데 정답과 똑같은 답: 기반 모델 1개(0.5%), 학습한 모델 190개(95.0%)")
