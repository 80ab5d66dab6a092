"""Decoder의 약속: `generate`와 같은 답, 답에만 걸리는 페널티, 길이의 한계, 한 토큰 안의 멈춤."""

import threading

import pytest
import torch
from families import FAMILIES
from families import build as build_family
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from utils.decode.decoder import Decoder
from utils.decode.transformers_engine import CapturedStep, EagerStep, ForwardDecode
from utils.errors import UsageError
from utils.sampling import Sampling, penalize, pick, probabilities

END = 0
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {"<|endoftext|>": END} | {letter: 1 + index for index, letter in
                                      enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def neox(vocab=257, context=256, **changes):
    """로짓의 차이가 뚜렷하도록 가중치를 키운 작은 모델."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = GPTNeoXConfig(vocab_size=vocab, max_position_embeddings=context, rotary_pct=0.5, bos_token_id=None,
                           eos_token_id=None, **(sizes | changes))
    model = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def llama(vocab=257, context=256, **changes):
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=context, bos_token_id=None, eos_token_id=None, **changes)).eval()


def prompts(count, length=16):
    generator = torch.Generator().manual_seed(11)
    return torch.randint(1, 257, (count, length), generator=generator).tolist()


def generate(model, ids, **settings):
    output = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                            pad_token_id=END, **settings)
    return output[0, len(ids):].tolist()


@pytest.mark.parametrize("build", [neox, llama])
def test_greedy_equals_generate(build, tokenizer):
    model = build()
    decoder = Decoder(model, tokenizer, (10_000,))
    for ids in prompts(20):
        expected = generate(model, ids, do_sample=False, max_new_tokens=128, eos_token_id=None)
        assert list(decoder.stream(ids, Sampling(**GREEDY, max_new_tokens=128))) == expected
        assert decoder.finish_reason == "length" and decoder.stats.tokens == 128


@pytest.mark.parametrize("length", [16, 40, 60])
def test_a_rotary_that_turns_with_the_length_is_read_again(length, tokenizer, monkeypatch):
    """글이 40토큰을 넘으면 앞의 토큰까지 다른 주파수로 돌리는 모델도, 처음부터 다시 읽은 것과 같은 답을 한다."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40,
            "short_factor": [1.0] * 8, "long_factor": [2.0 + at for at in range(8)]}
    model = llama(rope_parameters=rope, initializer_range=0.2)
    monkeypatch.setattr("utils.decode.forward_step.PREFILL", 16)
    decoder, questions = Decoder(model, tokenizer, (10_000,)), prompts(3, length)
    for ids in questions:
        expected = generate(model, ids, do_sample=False, max_new_tokens=40, eos_token_id=None, use_cache=False)
        assert list(decoder.stream(ids, Sampling(**GREEDY, max_new_tokens=40))) == expected
        assert decoder.answer_many([ids] * 2, Sampling(**GREEDY, max_new_tokens=40))[1].ids == expected


def test_stops_at_the_end_token_without_yielding_it(tokenizer):
    model, ids = neox(), prompts(1)[0]
    full = list(Decoder(model, tokenizer, (10_000,)).stream(ids, Sampling(**GREEDY, max_new_tokens=60)))
    decoder = Decoder(model, tokenizer, (full[20],))
    assert list(decoder.stream(ids, Sampling(**GREEDY, max_new_tokens=60))) == full[: full.index(full[20])]
    assert decoder.finish_reason == "stop"


def test_stop_event_ends_within_one_token(tokenizer):
    decoder, stop = Decoder(neox(), tokenizer, (10_000,)), threading.Event()
    stream = decoder.stream(prompts(1)[0], Sampling(**GREEDY, max_new_tokens=100), stop)
    for _ in range(5):
        next(stream)
    stop.set()
    assert len(list(stream)) == 0 and decoder.finish_reason == "cancelled" and decoder.stats.tokens == 5


def test_closing_the_stream_cancels_and_the_next_answer_works(tokenizer):
    decoder, ids, settings = Decoder(neox(), tokenizer, (10_000,)), prompts(1)[0], Sampling(**GREEDY, max_new_tokens=9)
    stream = decoder.stream(ids, settings)
    first = next(stream)
    stream.close()
    assert decoder.finish_reason == "cancelled"
    answer = list(decoder.stream(ids, settings))
    assert answer[0] == first and decoder.finish_reason == "length"


def test_prompt_and_answer_never_pass_the_context(tokenizer):
    decoder = Decoder(neox(context=32), tokenizer, (10_000,))
    assert len(list(decoder.stream([5] * 30, Sampling(**GREEDY, max_new_tokens=100)))) == 2
    assert decoder.finish_reason == "length"
    for bad in ([5] * 32, [5] * 500, []):
        with pytest.raises(UsageError):
            decoder.stream(bad, Sampling(**GREEDY))


def test_ids_without_text_are_never_chosen(tokenizer):
    decoder = Decoder(neox(vocab=400), tokenizer, (10_000,))
    chosen = [token for ids in prompts(6) for token in
              decoder.stream(ids, Sampling(temperature=5.0, top_p=1.0, top_k=0, max_new_tokens=100, seed=1))]
    assert max(chosen) < len(tokenizer)


def test_adapter_off_answers_like_the_base(tokenizer):
    ids, settings = prompts(1)[0], Sampling(**GREEDY, max_new_tokens=40)
    base = list(Decoder(neox(), tokenizer, (10_000,)).stream(ids, settings))
    tuned = get_peft_model(neox(), LoraConfig(r=4, target_modules=["query_key_value"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    decoder = Decoder(tuned, tokenizer, (10_000,))
    with_adapter = list(decoder.stream(ids, settings))
    decoder.use_adapter(False)
    assert list(decoder.stream(ids, settings)) == base != with_adapter
    decoder.use_adapter(True)
    assert list(decoder.stream(ids, settings)) == with_adapter


def test_same_seed_same_answer(tokenizer):
    decoder, ids = Decoder(neox(), tokenizer, (10_000,)), prompts(1)[0]
    answers = [list(decoder.stream(ids, Sampling(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=30, seed=seed)))
               for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_penalties_touch_the_answer_only():
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5])
    settings = Sampling(**GREEDY, repetition_penalty=2.0)
    assert penalize(logits, [0, 1, 1], settings).tolist() == [1.0, -4.0, 1.0, 0.5]
    assert penalize(logits, [], settings).tolist() == logits.tolist()
    blocked = penalize(logits, [3, 0, 2, 3], Sampling(**GREEDY, no_repeat_ngram_size=2))
    assert blocked.tolist() == [-torch.inf, -2.0, 1.0, 0.5]


def test_penalties_equal_generate_on_an_empty_question(tokenizer):
    """질문이 페널티에 들어가지 않으므로, `generate`의 페널티와 같아지는 것은 질문이 답의 첫 토큰 하나일 때다."""
    model = neox()
    decoder = Decoder(model, tokenizer, (10_000,))
    settings = Sampling(**GREEDY, max_new_tokens=50, repetition_penalty=1.3, no_repeat_ngram_size=3)
    ours = list(decoder.stream([7], settings))
    from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor
    answer, rules = [], LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(3)])
    with torch.inference_mode():
        for _ in range(50):
            logits = model(torch.tensor([[7, *answer]])).logits[:, -1]
            logits = rules(torch.tensor([answer]), logits) if answer else logits
            answer.append(int(logits.argmax()))
    assert ours == answer


@pytest.mark.parametrize("settings", [
    Sampling(temperature=0.8, top_p=1.0, top_k=0), Sampling(temperature=1.3, top_p=0.8, top_k=0),
    Sampling(temperature=1.0, top_p=0.9, top_k=12)])
def test_probabilities_equal_the_warpers_of_generate(settings):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        logits = torch.randn(1, 200, generator=generator) * 3
        expected = TemperatureLogitsWarper(settings.temperature)(None, logits)
        if settings.top_k:
            expected = TopKLogitsWarper(settings.top_k)(None, expected)
        if settings.top_p < 1:
            expected = TopPLogitsWarper(settings.top_p)(None, expected)
        assert torch.allclose(probabilities(logits[0], settings), expected.softmax(-1)[0], atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_one_line(bad):
    """NaN이 든 가중치로 답하게 하면 torch의 traceback이 아니라 무엇이 잘못되었는지가 나온다."""
    logits = torch.zeros(8)
    logits[3] = bad
    with pytest.raises(UsageError, match="NaN.*가중치가 깨졌거나"):
        pick(logits, [], Sampling(), torch.Generator())


def test_sampling_follows_the_distribution():
    """20,000번 뽑은 도수의 카이제곱 값이 자유도에 맞는다(p > 0.001)."""
    generator, settings = torch.Generator().manual_seed(2), Sampling(temperature=0.9, top_p=0.95, top_k=20)
    logits = torch.randn(64, generator=generator) * 2
    expected = probabilities(logits, settings) * 20_000
    counts = torch.bincount(torch.tensor([pick(logits, [], settings, generator) for _ in range(20_000)]), minlength=64)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    statistic = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 3.1 * (2 * freedom) ** 0.5 + 4


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1},
                                 {"max_new_tokens": 0}, {"repetition_penalty": 0}, {"no_repeat_ngram_size": -1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(UsageError):
        Sampling(**bad)


def test_every_token_is_computed_once(tokenizer):
    """질문은 한 번만 읽고, 답은 토큰마다 한 자리만 계산한다. 마지막 토큰은 읽을 일이 없다."""
    model, ids = neox(), prompts(1)[0]
    read = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    decoder = Decoder(model, tokenizer, (10_000,))
    read.clear()  # 만들면서 cache를 시험한 것은 세지 않는다
    list(decoder.stream(ids, Sampling(**GREEDY, max_new_tokens=64)))
    assert sum(read) == len(ids) + 63
    assert len(read) <= 64


@pytest.mark.parametrize("name", FAMILIES)
def test_questions_together_equal_one_at_a_time(name):
    """길이가 다른 질문에 함께 답한 것이 하나씩 답한 것과 토큰 하나까지 같고, 줄마다 따로 멈춘다."""
    model = build_family(name)
    questions = [question[:length] for question, length in zip(prompts(5, 40), (5, 40, 17, 1, 9), strict=True)]
    settings = Sampling(**GREEDY, max_new_tokens=24)
    decoder = Decoder(model, range(257), (10_000,))
    alone = [list(decoder.stream(question, settings)) for question in questions]
    assert [reply.ids for reply in decoder.answer_many(questions, settings)] == alone
    end = alone[1][7]
    replies = Decoder(model, range(257), (end,)).answer_many(questions, settings)
    for reply, answer in zip(replies, alone, strict=True):
        stopped = end in answer
        assert reply.ids == (answer[: answer.index(end)] if stopped else answer)
        assert reply.finish_reason == ("stop" if stopped else "length")


def test_answering_many_stops_when_the_time_is_up(tokenizer):
    replies = Decoder(neox(), tokenizer, (10_000,)).answer_many(prompts(3), Sampling(**GREEDY), until=0.0)
    assert [reply.finish_reason for reply in replies] == ["cancelled"] * 3
    assert Decoder(neox(), tokenizer, (10_000,)).answer_many([], Sampling()) == []


@pytest.mark.parametrize("build", [neox, llama])
def test_a_sized_cache_answers_like_a_growing_one(build):
    """GPU에서 쓰는 크기가 정해진 cache를 CPU에서 캡처 없이 돌린 로짓. 아직 쓰지 않은 자리를 읽지 않는다."""
    model, device = build(context=2048), torch.device("cpu")
    engine = ForwardDecode(model, 2048, 257)
    questions = [[7], prompts(1, 513)[0], prompts(1, 20)[0]]  # 513: 마지막 조각이 토큰 하나다
    sized = CapturedStep(engine._forward, model.config, device, 16, 1024)
    growing = EagerStep(engine._forward, DynamicCache(config=model.config), device)
    with torch.inference_mode():
        assert torch.allclose(sized.read(questions), growing.read(questions), atol=1e-3)


def test_short_of_memory_says_the_number(tokenizer):
    """메모리가 모자라면 몇 토큰까지 되는지 말하고 짧게 답한다. 질문도 들어가지 않으면 거절한다."""
    decoder = Decoder(neox(), tokenizer, (10_000,))
    decoder._engine._free_bytes = lambda: 20.5 * decoder._engine._token_bytes  # 20토큰이 들어가는 메모리
    answer = list(decoder.stream(prompts(1)[0], Sampling(**GREEDY, max_new_tokens=50)))
    assert len(answer) == 4 and "4토큰" in decoder.notice and "20토큰" in decoder.notice
    replies = decoder.answer_many([prompts(1)[0], [7]], Sampling(**GREEDY, max_new_tokens=12))
    assert [len(reply.ids) for reply in replies] == [4, 12] and "4토큰" in decoder.notice
    with pytest.raises(UsageError, match="20토큰"):
        decoder.stream(prompts(1, 30)[0], Sampling(**GREEDY))
