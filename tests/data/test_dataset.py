"""토큰은 학습과 추론에서 같고, 나누기는 내용을 따르고, 한 블록의 문서는 서로를 보지 않는다."""

import json

import numpy as np
import pytest
import torch
from conftest import pieces_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import add_head

from utils.data import dataset
from utils.data.blocks import IGNORE, PackedDataset, pack, split_by_content
from utils.data.encoder import Encoder, content_digest
from utils.errors import UsageError
from utils.model.tokenizer import load_tokenizer
from utils.prompter import Prompter
from utils.turns import Turn, as_talk

pytestmark = pytest.mark.quick

CUTOFF = 64
END = 2
QUESTION, ANSWER = "물은 왜 어나요?", "온도가 낮아지면 분자가 자리를 잡기 때문입니다."
FORMS = {
    "text": {"text": f"### 질문: {QUESTION}\n\n### 답변: {ANSWER}<|endoftext|>"},
    "output": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "response": {"instruction": QUESTION, "response": ANSWER + "<|endoftext|>"},
    "completion": {"prompt": QUESTION, "completion": ANSWER},
    "messages": {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_neox):
    return load_tokenizer(tiny_neox)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, END)


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path, encoder, cutoff_len: int = 512, **options) -> dataset.Documents:
    return dataset.load_documents(path, Prompter(), encoder, cutoff_len, END, str(path.parent / "cache"), **options)


def fake_documents(texts: list[str]) -> dataset.Documents:
    digests = np.array([content_digest([("", text)]) for text in texts], np.uint64)
    return dataset.Documents(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(len(texts) + 1, np.int64), digests)


# 토큰


def test_the_text_begins_with_what_the_tokenizer_puts_there(tmp_path, tiny_neox, encoder):
    """BOS를 붙이는 토크나이저면 배우는 글도, 묻는 글도, 이어 쓸 글도 그것으로 시작한다. 두 번 붙이지는 않는다."""
    tokenizer = add_head(load_tokenizer(tiny_neox))
    headed = Encoder(tokenizer, END)
    assert (headed.head, encoder.head) == ([1], [])
    talk = [*as_talk(QUESTION), Turn("assistant", ANSWER)]
    twice = Prompter().talk([*talk, *talk])[0]
    (tokens, marks), (plain, _) = headed.encode_batch([twice])[0], encoder.encode_batch([twice])[0]
    assert tokens == [1, *plain] and marks[0] == 0 and len(marks) == len(tokens) == headed.length(twice)
    asked = headed.encode_asked(Prompter().talk([*talk, *as_talk(QUESTION)])[0])
    assert asked == tokens[: len(asked)]
    first = headed.encode_asked(Prompter().talk(as_talk(QUESTION))[0])
    assert first == tokens[: marks.index(1)]
    assert headed.encode_prompt(QUESTION) == tokenizer(QUESTION)["input_ids"]
    written = tokenizer.decode([1]) + QUESTION
    assert headed.encode_prompt(written, special=True) == headed.encode_prompt(QUESTION)
    documents = load(write(tmp_path / "a.jsonl", [FORMS["output"]] * 2), headed, cutoff_len=8)
    assert documents.document(0)[0][0] == 1 and len(documents.document(0)[0]) == 8


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tokens_and_learns_only_the_answer(tmp_path, tokenizer, encoder, form):
    documents = load(write(tmp_path / "a.jsonl", [FORMS[form], {**FORMS[form]}]), encoder)
    tokens, answer = documents.document(0)
    start = int(np.argmax(answer))
    assert tokenizer.decode(tokens[:start]) == f"### 질문: {QUESTION}\n\n### 답변:"
    assert tokenizer.decode(tokens[start:-1]) == f" {ANSWER}"
    assert tokens[-1] == END and list(tokens).count(END) == 1
    assert answer[start:].all() and not answer[:start].any()
    for train_on_inputs in (True, False):
        block = PackedDataset(documents, np.arange(1), 512, END, train_on_inputs, 0)[0]
        learnt = block["labels"].numpy() != IGNORE
        expected = np.zeros(512, bool)
        expected[1 if train_on_inputs else start : len(tokens)] = True
        assert (learnt == expected).all()
        assert (block["labels"].numpy()[learnt] == block["input_ids"].numpy()[learnt]).all()


def test_what_the_check_read_is_read_once_and_a_skipped_row_is_still_refused(tmp_path, encoder, monkeypatch):
    broken = write(tmp_path / "b.jsonl", [FORMS["output"], {**FORMS["output"], "output": ""}])
    clean = write(tmp_path / "a.jsonl", [FORMS["output"]])
    assert len(load(broken, encoder, skip_bad=True)) == len(load(clean, encoder, skip_bad=True)) == 1
    with pytest.raises(UsageError, match="2번째 행"):
        load(broken, encoder)
    monkeypatch.setattr(dataset, "_fill_cache", None)
    assert len(load(clean, encoder)) == len(load(broken, encoder, skip_bad=True)) == 1


@given(question=st.text(min_size=1, max_size=40), context=st.text(max_size=20), answer=st.text(max_size=40))
@settings(max_examples=300, deadline=None, database=None)
def test_generation_prompt_is_a_prefix_of_the_training_tokens(encoder, question, context, answer):
    prompter = Prompter()
    pieces = pieces_of(prompter, question, context, answer)
    tokens, _ = encoder.encode_batch([[pieces]])[0]
    asked = encoder.encode_asked(prompter.talk(as_talk(question, context))[0])
    assert tokens[: len(asked)] == asked and tokens[-1] == END and tokens.count(END) == 1


def test_each_answer_of_a_talk_ends_with_the_end_token(tmp_path, tokenizer, encoder):
    turns = [{"role": role, "content": text} for role, text in
             (("user", "가?"), ("assistant", "나"), ("user", "다?"), ("assistant", "라"))]
    tokens, answer = load(write(tmp_path / "a.jsonl", [{"messages": turns}]), encoder).document(0)
    assert [int(at) for at in np.flatnonzero(tokens == END)] == [int(at) for at in np.flatnonzero(
        np.diff(np.append(answer, False).astype(int)) == -1)]
    assert tokenizer.decode(tokens[answer]) == " 나<|endoftext|> 라<|endoftext|>"


def test_long_row_is_cut_at_a_token_and_keeps_its_end_token(tmp_path, encoder):
    path = write(tmp_path / "a.jsonl", [{"instruction": "가?", "output": f"{word} " * 500} for word in "나다"])
    documents = load(path, encoder, CUTOFF)
    whole = load(path, encoder, 100_000)
    assert documents.n_cut == 2 and whole.n_cut == 0
    for index in range(2):
        tokens, answer = documents.document(index)
        assert len(tokens) == CUTOFF == documents.lengths()[index] and tokens[-1] == END and answer[-1]
        assert (tokens[:-1] == whole.document(index)[0][: CUTOFF - 1]).all()


def test_end_token_written_inside_a_text_is_only_text(tmp_path, encoder):
    tokens, _ = load(write(tmp_path / "a.jsonl", [{"text": "가<|endoftext|>나"}]), encoder).document(0)
    assert list(tokens).count(END) == 1


# 캐시


def test_second_load_reads_the_cache(tmp_path, encoder):
    path, read = write(tmp_path / "a.jsonl", [FORMS["text"]] * 3), []
    first = load(path, encoder, on_row=read.append)
    assert read == [3]
    again = load(path, encoder, CUTOFF, on_row=read.append)
    assert read == [3] and (again.tokens == first.tokens).all() and (again.answer == first.answer).all()
    assert again.found == first.found and again.sha256 == first.sha256
    path.rename(tmp_path / "b.jsonl")
    load(tmp_path / "b.jsonl", encoder, on_row=read.append)
    assert read == [3]


def test_changed_data_or_template_is_not_read_from_the_cache(tmp_path, tokenizer, encoder):
    path = write(tmp_path / "a.jsonl", [FORMS["output"]])
    first = load(path, encoder)
    other = dataset.load_documents(path, Prompter("instruction-output"), encoder, 512, END, str(tmp_path / "cache"))
    assert len(other.tokens) != len(first.tokens)
    write(path, [FORMS["output"], FORMS["output"]])
    assert len(load(path, encoder)) == 2
    assert encoder.fingerprint() != Encoder(tokenizer, END + 1).fingerprint()


@pytest.mark.parametrize("name", ["tokens", "answer", "lengths", "digests", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_cache_is_made_again(tmp_path, encoder, name, damage):
    path, read = write(tmp_path / "a.jsonl", [FORMS["text"]] * 3), []
    tokens = np.array(load(path, encoder).tokens)
    (folder,) = (tmp_path / "cache" / dataset.CACHE_FOLDER).iterdir()
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "cut":
        (folder / name).write_bytes(content[:-1])
    assert (load(path, encoder, on_row=read.append).tokens == tokens).all() and read == [3]


def test_bad_row_leaves_no_cache(tmp_path, encoder):
    rows = [{"text": f"글 {number}"} for number in range(5000)]
    path = write(tmp_path / "a.jsonl", [*rows, {"text": ""}])
    with pytest.raises(UsageError, match="5001번째 행"):
        load(path, encoder)
    assert not list((tmp_path / "cache" / dataset.CACHE_FOLDER).iterdir())
    assert len(load(path, encoder, skip_bad=True)) == 5000


def test_cache_that_cannot_be_written_is_one_line(tmp_path, encoder):
    path = write(tmp_path / "a.jsonl", [FORMS["text"]])
    (tmp_path / "cache").write_text("폴더가 아니다", encoding="utf-8")
    with pytest.raises(UsageError, match="--cache_dir"):
        load(path, encoder)


def test_old_caches_are_dropped(tmp_path, encoder):
    from utils.data.documents import KEEP

    for number in range(KEEP + 3):
        load(write(tmp_path / f"{number}.jsonl", [{"text": f"글 {number}"}]), encoder)
    assert len(list((tmp_path / "cache" / dataset.CACHE_FOLDER).iterdir())) == KEEP


# 나누기


texts_strategy = st.lists(st.text(alphabet="가나다라마바사", max_size=3), min_size=2, max_size=80)


@given(old=texts_strategy, new=texts_strategy, percent=st.floats(8, 60), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None, database=None)
def test_same_row_is_on_one_side_and_new_rows_move_no_old_row(old, new, percent, seed):
    def held(texts: list[str]) -> set[str]:
        train, held_out = split_by_content(fake_documents(texts), percent, seed)
        assert sorted([*train, *held_out]) == list(range(len(texts)))
        assert len(train) and (len(held_out) or len(set(texts)) == 1)
        sides = [{texts[index] for index in side} for side in (train, held_out)]
        assert not sides[0] & sides[1]
        return sides[1]

    filler = [f"채움 {number}" for number in range(500)]  # 검증에 든 행이 적어 더 채우는 일이 없게 한다
    before = held(old + filler)
    assert held(old + filler + new) & set(old + filler) == before
    held(old)


@given(n=st.integers(2, 200), percent=st.floats(1, 60), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None, database=None)
def test_a_small_set_has_as_many_validation_rows_as_asked(n, percent, seed):
    """60행의 5%가 우연히 한 행이 되지 않는다."""
    train, held_out = split_by_content(fake_documents([f"{number}번째 글" for number in range(n)]), percent, seed)
    assert len(held_out) >= max(1, min(5, n - 1, round(percent / 100 * n))) and len(train) >= 1


@given(percent=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, database=None)
def test_share_of_validation_is_as_asked(percent, seed):
    _, held_out = split_by_content(MANY, percent, seed)
    share, spread = percent / 100, (percent / 100 * (1 - percent / 100) / len(MANY)) ** 0.5
    assert abs(len(held_out) / len(MANY) - share) < 5 * spread


MANY = fake_documents([f"{number}번째 글" for number in range(10_000)])


def test_no_validation_when_not_asked_or_when_all_rows_are_the_same():
    assert len(split_by_content(MANY, 0, 42)[1]) == 0
    train, held_out = split_by_content(fake_documents(["가"] * 30), 20, 42)
    assert len(train) == 30 and len(held_out) == 0


# 블록


@given(lengths=st.lists(st.integers(1, CUTOFF), min_size=1, max_size=200), seed=st.integers(0, 99))
@settings(max_examples=300, deadline=None, database=None)
def test_every_document_is_in_one_block_and_no_block_overflows(lengths, seed):
    lengths = np.array(lengths)
    blocks = pack(lengths, CUTOFF, seed)
    assert sorted(np.concatenate(blocks)) == list(range(len(lengths)))
    filled = [int(lengths[block].sum()) for block in blocks]
    assert max(filled) <= CUTOFF
    assert sum(room <= CUTOFF // 2 for room in filled) <= 1  # 반이 넘게 빈 블록 둘은 하나로 담긴다
    assert all((a == b).all() for a, b in zip(blocks, pack(lengths, CUTOFF, seed), strict=True))


def test_positions_restart_and_padding_teaches_nothing(tiny_data, encoder, tmp_path):
    documents = dataset.load_documents(tiny_data, Prompter(), encoder, CUTOFF, END, str(tmp_path))
    blocks = PackedDataset(documents, np.arange(len(documents)), CUTOFF, END, True, 0)
    for members, block in zip(blocks.blocks, blocks, strict=False):
        lengths = documents.lengths()[members]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        sizes = [*lengths, CUTOFF - starts[-1]]
        assert block["position_ids"].tolist() == [at for size in sizes for at in range(size)]
        assert (block["labels"][starts[starts < CUTOFF]] == IGNORE).all()
        assert (block["labels"][starts[-1]:] == IGNORE).all()
        assert int((block["labels"] != IGNORE).sum()) == int(lengths.sum()) - len(members)
        assert set(block) == {"input_ids", "labels", "position_ids"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_compute_as_if_alone(tmp_path, tiny_neox, encoder, attention):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_neox, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2  # 무작위 가중치의 주의가 고르지 않게 하여 새는 것을 드러낸다
    rows = [{"instruction": f"{n}의 배수는?", "output": f"{', '.join(str(n * k) for k in range(1, 1 + n % 7))} 등"}
            for n in range(12)]
    documents = load(write(tmp_path / "a.jsonl", rows), encoder, 192)
    blocks = PackedDataset(documents, np.arange(len(documents)), 192, END, True, 0)
    assert max(map(len, blocks.blocks)) >= 3
    worst = leaked = 0.0
    for members, block in zip(blocks.blocks, blocks, strict=False):
        ids, positions = block["input_ids"][None], block["position_ids"][None]
        with torch.no_grad():
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
            blind = model(input_ids=ids, use_cache=False).logits[0]
            at = 0
            for member in members:
                tokens = torch.from_numpy(np.array(documents.document(member)[0], np.int64))
                alone = model(input_ids=tokens[None], use_cache=False).logits[0]
                span = slice(at, at + len(tokens))
                worst = max(worst, float((packed[span] - alone).abs().max()))
                leaked = max(leaked, float((blind[span] - alone).abs().max()))
                at += len(tokens)
    assert worst <= 2e-6, worst
    assert leaked > 1e-2  # 자리를 다시 세지 않으면 정말로 달라지는 모델이다
