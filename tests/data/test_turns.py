"""대화의 행은 공개된 이름과 차례만 그 뜻대로 읽는다. 모르는 것은 짐작하지 않고 행 번호로 거절하거나 센다."""

import json

import numpy as np
import pytest
from conftest import load_answerer
from starlette.applications import Starlette
from starlette.testclient import TestClient

from utils.data import blocks, check, dataset, repair
from utils.data.columns import choose_form
from utils.data.encoder import Encoder
from utils.data.forms import read_row
from utils.data.rendered import rendered_lines
from utils.errors import UsageError
from utils.model import tokenizer
from utils.prompter import Prompter
from utils.talk import api
from utils.turns import Pieces, Unlearned

pytestmark = pytest.mark.quick

END = 2


def say(role: str, content: object = "나", **more) -> dict:
    return {"role": role, "content": content, **more}


GOOD = [say("user", "가?"), say("assistant", "나")]
BAD = {
    "tool": [say("user", "날씨?"), say("tool", "맑음"), say("assistant", "맑다")],
    "function": [say("user", "날씨?"), say("function", "맑음"), say("assistant", "맑다")],
    "ipython": [say("user", "날씨?"), say("ipython", "맑음"), say("assistant", "맑다")],
    "developer": [say("developer", "짧게"), *GOOD],
    "unknown": [say("speaker1", "가?"), say("assistant", "나")],
    "case": [say("User", "가?"), say("assistant", "나")],
    "tool call": [say("user", "날씨?"), say("assistant", "찾아본다", tool_calls=[{"id": "1"}])],
    "tool call without text": [say("user", "날씨?"), say("assistant", None, tool_calls=[{"id": "1"}])],
    "function call": [say("user", "날씨?"), say("assistant", "찾아본다", function_call={"name": "f"})],
    "assistant first": [say("assistant", "어서 와"), *GOOD],
    "system then assistant": [say("system", "짧게"), say("assistant", "나")],
    "two assistants": [*GOOD, say("assistant", "다")],
    "two users": [say("user", "가?"), *GOOD],
    "late system": [*GOOD, say("system", "짧게"), *GOOD],
    "two systems": [say("system", "짧게"), say("system", "길게"), *GOOD],
    "question last": [*GOOD, say("user", "다?")],
    "only user": [say("user", "가?")],
    "weight 2": [say("user", "가?"), say("assistant", "나", weight=2)],
    "weight half": [say("user", "가?"), say("assistant", "나", weight=0.5)],
    "weight text": [say("user", "가?"), say("assistant", "나", weight="0")],
    "weight bool": [say("user", "가?"), say("assistant", "나", weight=False)],
    "weight of user": [say("user", "가?", weight=0), say("assistant", "나")],
    "no weight left": [say("user", "가?"), say("assistant", "나", weight=0)],
    "parts": [say("user", [{"type": "image_url", "image_url": {"url": "x"}}]), say("assistant", "나")],
    "number": [say("user", 3), say("assistant", "나")],
    "no role": [{"content": "가?"}, say("assistant", "나")],
    "text": "가? 나",
}
EMPTY = {
    "empty user": [say("user", " "), say("assistant", "나")],
    "empty assistant": [say("user", "가?"), say("assistant", "")],
    "end only": [say("user", "가?"), say("assistant", "<|endoftext|>")],
    "empty system": [say("system", ""), *GOOD],
    "null": [say("user", None), say("assistant", "나")],
    "only system": [say("system", "짧게")],
}


def pieces(messages) -> Pieces:
    return Prompter().talk(read_row({"messages": messages}, choose_form(["messages"]), 7, "a.jsonl"))[0]


@pytest.mark.parametrize("messages", [*BAD.values(), *EMPTY.values()], ids=[*BAD, *EMPTY])
def test_what_is_not_known_is_refused_by_the_row(messages):
    with pytest.raises(UsageError) as error:
        pieces(messages)
    assert "a.jsonl의 7번째 행의 messages" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("user", ["user", "human"])
@pytest.mark.parametrize("assistant", ["assistant", "model", "gpt", "bot", "chatgpt"])
def test_published_names_mean_what_they_say(user, assistant):
    expected = [("### 질문: 짧게\n\n가?\n\n### 답변:", " 나"), ("### 질문: 다?\n\n### 답변:", " 라")]
    assert pieces([say("system", "짧게"), say(user, "가?"), say(assistant, "나"), say(user, "다?"),
                   say(assistant, "라")]) == expected


@pytest.mark.parametrize("weight", [1, 1.0, None])
def test_weight_one_is_learned(weight):
    assert pieces([say("user", "가?", weight=None), say("assistant", "나", weight=weight)]) == pieces(GOOD)
    assert not isinstance(pieces(GOOD)[0], Unlearned)


@pytest.fixture(scope="module")
def encoder(tiny_neox):
    return Encoder(tokenizer.load_tokenizer(tiny_neox), END)


def load(folder, encoder, lines: list, **settings):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"messages": line}, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path, dataset.load_documents(path, Prompter(), encoder, 512, END, str(folder / "cache"), **settings)


@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (0.0, None), (1, 1)])
@pytest.mark.parametrize("train_on_inputs", [True, False])
def test_an_answer_of_weight_zero_is_read_but_never_learned(tmp_path, encoder, weights, train_on_inputs):
    """질문까지 배울 때에도 weight 0인 답은 배우지 않는다. 토큰은 weight가 없을 때와 같다."""
    talk = [say("user", "가?"), say("assistant", "나다", weight=weights[0]), say("user", "다?"),
            say("assistant", "라마", weight=weights[1])]
    _, documents = load(tmp_path, encoder, [talk])
    first, second = pieces(talk)
    parts = [(encoder.encode_batch([[piece]])[0][0], len(encoder.encode_prompt(piece[0])), weight != 0)
             for piece, weight in ((first, weights[0]), (second, weights[1]))]
    expected_tokens = [token for ids, _, _ in parts for token in ids]
    learned = [flag for ids, start, kept in parts for flag in
               [train_on_inputs] * start + [kept] * (len(ids) - start)]
    block = blocks.PackedDataset(documents, np.arange(1), 512, END, train_on_inputs, 0)[0]
    size = len(expected_tokens)
    assert block["input_ids"][:size].tolist() == expected_tokens
    learned[0] = False
    assert (block["labels"][:size] != blocks.IGNORE).tolist() == learned
    assert (block["labels"][size:] == blocks.IGNORE).all()


def test_a_long_answer_that_is_not_learned_is_left_out(tmp_path, encoder):
    talk = [say("user", "가?"), say("assistant", "나"), say("user", "다?"), say("assistant", "라" * 100, weight=0)]
    path, documents = load(tmp_path, encoder, [talk])
    short = dataset.load_documents(path, Prompter(), encoder, 64, END, str(tmp_path / "cache"))
    assert short.document(0)[0].tolist() == encoder.encode_batch([pieces(talk[:2])])[0][0]
    assert short.found["cut_talk"] == {"count": 1, "rows": [1], "note": "주고받음 1번"}
    assert documents.muted(0).any() and len(documents.document(0)[0]) > 64


@pytest.mark.parametrize("kind, bad", [("roles", BAD), ("empty", EMPTY)])
def test_the_check_counts_what_training_refuses(tmp_path, encoder, kind, bad):
    good = [[say("user", f"{n}?"), say("assistant", f"{n}번")] for n in range(3)]
    path, documents = load(tmp_path, encoder, [*good, *bad.values()], skip_bad=True)
    assert len(documents) == len(good) and list(documents.found) == [kind]
    assert documents.found[kind]["count"] == len(bad) and documents.found[kind]["rows"] == [4, 5, 6, 7, 8]
    assert check.short_lines(documents.found)
    with pytest.raises(UsageError, match="4번째 행"):
        dataset.load_documents(path, Prompter(), encoder, 512, END, str(tmp_path / "cache"))
    done = repair.repair(path, tmp_path / "fixed.jsonl", Prompter())
    assert (done.written, done.dropped) == (len(good), len(bad))


def test_the_check_says_which_rows_hold_an_answer_that_is_not_learned(tmp_path, encoder, tiny_neox):
    muted = [say("user", "가?"), say("assistant", "나", weight=0), say("user", "다?"), say("assistant", "라")]
    _, documents = load(tmp_path, encoder, [GOOD, muted])
    assert documents.found["unlearned"] == {"count": 1, "rows": [2]}
    lines = "\n".join(rendered_lines(documents, tokenizer.load_tokenizer(tiny_neox), train_on_inputs=True))
    assert "나<|endoftext|>⟦" in lines and "라<|endoftext|>⟧" in lines


@pytest.fixture(scope="module")
def client(tiny_neox):
    from utils.talk.models import Choice, Models
    from utils.talk.source import find_source

    source = find_source(str(tiny_neox), None, print)
    answerer = load_answerer(source, None, None, False, "default", print)
    return TestClient(Starlette(routes=api.routes(Models([Choice("lite", answerer)]), None)))


def ask(client, messages):
    return client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 3, "temperature": 0})


@pytest.mark.parametrize("name", [name for name in [*BAD, *EMPTY] if "weight" not in name and name not in (
    "developer", "question last", "only user")])
def test_the_api_refuses_the_same_talks(client, name):
    reply = ask(client, {**BAD, **EMPTY}[name])
    assert reply.status_code == 400 and reply.json()["error"]["message"].startswith("messages"), reply.text


def test_the_api_reads_the_published_forms(client):
    plain = ask(client, [say("system", "짧게"), say("user", "가?"), say("assistant", "나"), say("user", "다?")])
    named = ask(client, [say("developer", "짧게"), say("human", [{"type": "text", "text": "가?"}]), say("model", "나"),
                         say("user", "다?")])
    assert plain.status_code == named.status_code == 200
    assert plain.json()["usage"] == named.json()["usage"]
    assert ask(client, GOOD).status_code == 400  # 답할 질문이 없다
