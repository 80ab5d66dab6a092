"""글자의 흐름: 완성된 음절은 바로, 반쪽은 절대 보이지 않게, 이어 붙이면 원문 그대로."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from utils.decode.textstream import Opening, TextStream, byte_alphabet

pytestmark = pytest.mark.quick

PIECES = ["양파는 식물의 줄기입니다. ", "뷁쉛퉳 ", "漢字와 國語 ",
          "👩‍👩‍👧‍👦🇰🇷🥨", "ㅋㅋㅋ…", "def f(x):\n    return x ** 2\n", "\t{}\\n",
          "가\u0301나", "𠮷野家 ", "Ω≈ç√ ", "\r\n", "  ", "<b>굵게</b> ", "한글abc한글 "]


@pytest.fixture(scope="module")
def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|endoftext|>"])
    backend.train_from_iterator(["양파는 식물의 줄기 부분입니다. return x 漢字"] * 4, trainer)
    backend.add_tokens([AddedToken("<|acc|>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def complete_prefix(data: bytes) -> str:
    """data에서 완성된 글자까지."""
    for cut in range(4):
        try:
            return data[: len(data) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
    raise AssertionError(data)


def test_alphabet_is_that_of_tokenizers():
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_10000_random_cuts(byte_level):
    """임의의 글을 임의의 자리에서 토큰으로 끊어도 매 순간 완성된 글자만, 빠짐없이 나온다."""
    generator = random.Random(7)
    letters, vocab = byte_alphabet(), byte_level.get_vocab()
    numbers = {bytes(letters[letter] for letter in token): number for token, number in vocab.items()
               if set(token) <= letters.keys()}
    longest = max(map(len, numbers))
    for _ in range(10_000):
        text = "".join(generator.choices(PIECES, k=generator.randint(1, 5)))
        data, stream, seen, shown = text.encode("utf-8"), TextStream(byte_level), 0, ""
        while seen < len(data):
            for size in range(generator.randint(1, longest), 0, -1):
                token = data[seen:seen + size]
                if token in numbers:
                    break
            seen += len(token)
            piece = stream.push(numbers[token])
            assert "\ufffd" not in piece
            shown += piece
            assert shown == complete_prefix(data[:seen])
        assert shown + stream.flush() == text


def test_half_a_syllable_is_dropped(byte_level):
    stream = TextStream(byte_level)
    vocab, letters = byte_level.get_vocab(), {byte: letter for letter, byte in byte_alphabet().items()}
    half = [vocab[letters[byte]] for byte in "힣".encode()[:2]]
    assert [stream.push(number) for number in half] == ["", ""]
    assert stream.push(vocab["a"]) == "a"
    assert stream.push(half[0]) == "" and stream.flush() == ""


def test_special_and_unknown_ids_have_no_text(byte_level):
    stream = TextStream(byte_level)
    assert stream.push(byte_level.eos_token_id) == ""
    assert stream.push(30_079) == ""
    assert stream.push(byte_level.convert_tokens_to_ids("<|acc|>")) == "<|acc|>"


def test_other_tokenizers_stream_too():
    text = "양파는 뷁 줄기 漢字 👩 입니다"
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], limit_alphabet=9)
    backend.train_from_iterator(["양파는 줄기 입니다"] * 4, trainer)
    backend.add_tokens([AddedToken(name, special=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    stream = TextStream(tokenizer)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    shown = "".join(stream.push(number) for number in ids) + stream.flush()
    assert shown == tokenizer.decode(ids, skip_special_tokens=True) and "\ufffd" not in shown
    spaced = [cut for cut in range(1, len(ids)) if tokenizer.convert_ids_to_tokens(ids[cut]).startswith("▁")]
    for cut in spaced:  # 이어 쓰는 글의 첫 공백
        stream = TextStream(tokenizer, after=ids[:cut])
        rest = "".join(map(stream.push, ids[cut:])) + stream.flush()
        assert rest.startswith(" ") and shown.endswith(rest)
    assert len(spaced) > 3


@pytest.mark.parametrize("text, shown", [
    ("  안녕", "안녕"), ("<think>\n\n</think>\n\n안녕", "안녕"),
    (" <think></think> 안녕 <think></think>", "안녕 <think></think>"),
    ("<think>\n길을 본다\n</think>\n안녕", "<think>\n길을 본다\n</think>\n안녕"), ("<b>", "<b>"), ("<", "<"), ("", ""),
    ("<think>\n", "<think>\n"), ("</think>", "</think>"), ("<think> </think>", ""),
])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_an_answer_opens_without_spaces_and_empty_thoughts(text, shown, size):
    opening = Opening()
    pieces = [opening.push(text[at : at + size]) for at in range(0, len(text), size)]
    assert "".join(pieces) + opening.flush() == shown
