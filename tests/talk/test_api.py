"""OpenAI의 클라이언트가 그대로 쓰인다. API 키, 범위, 바쁨, 떠남도 OpenAI의 방식으로 알려진다."""

import concurrent.futures
import time

import httpx
import openai
import pytest
from conftest import load_answerer
from serving import PORT, serving
from starlette.applications import Starlette
from starlette.testclient import TestClient
from tiny import build_neox

from utils.decode.textstream import TextStream
from utils.sampling import Sampling
from utils.talk import api
from utils.talk.answerer import Answer
from utils.talk.api import _before_stop
from utils.talk.models import Choice, Models
from utils.talk.source import find_source
from utils.turns import Turn


@pytest.fixture(scope="module")
def client(talk_server):
    return openai.OpenAI(base_url=f"{talk_server.url}/v1", api_key="none", max_retries=0)


QUESTION = [{"role": "user", "content": "딥러닝이 뭐야?"}]


def ask(client, **extra):
    return client.chat.completions.create(**{"model": "run", "messages": QUESTION, "max_tokens": 8, **extra})


def test_models(client):
    assert [model.id for model in client.models.list()] == ["run", "base"]
    assert client.models.retrieve("base").id == "base"


def test_base_answers_without_the_adapter_and_an_unknown_name_is_404(client):
    said = {name: client.chat.completions.create(model=name, messages=QUESTION, max_tokens=8, temperature=0)
            for name in ("run", "base")}
    assert {name: done.model for name, done in said.items()} == {"run": "run", "base": "base"}
    assert said["run"].choices[0].message.content != said["base"].choices[0].message.content
    for call in (lambda: ask(client, model="없다"), lambda: client.models.retrieve("none"),
                 lambda: client.completions.create(model="lite", prompt="가")):
        with pytest.raises(openai.NotFoundError, match="쓸 수 있는 이름: run, base") as error:
            call()
        assert error.value.code == "model_not_found"


def test_chat_answers_and_counts(client):
    done = ask(client, temperature=0)
    choice = done.choices[0]
    assert choice.message.content and choice.finish_reason in ("stop", "length")
    assert 1 <= done.usage.completion_tokens <= 8
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


def test_stream_is_the_same_text(client):
    whole = ask(client, temperature=0).choices[0].message.content
    chunks = list(ask(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length") and chunks[-1].usage.completion_tokens >= 1


TALK = [{"role": "system", "content": "짧게 답해."}, {"role": "user", "content": "하늘은?"},
        {"role": "assistant", "content": "파랗다."}, {"role": "user", "content": "그럼 밤에는?"}]


def test_a_whole_talk_reaches_the_model_as_training_builds_it(tiny_neox):
    """openai의 클라이언트가 보낸 대화의 토큰은 `ask_talk`의 것이고, 답과 사용량과 시드도 직접 물은 것과 같다."""
    answerer = load_answerer(find_source(str(tiny_neox), None, print), None, None, False, "default", print)
    app = TestClient(Starlette(routes=api.routes(Models([Choice("tiny", answerer)]), None)))
    near = openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=app)
    ids = answerer.ask_talk([Turn(message["role"], message["content"]) for message in TALK])
    assert ids != answerer.ask("그럼 밤에는?") and "파랗다." in answerer.tokenizer.decode(ids)
    direct = Answer(ids, Sampling(temperature=1.0, max_new_tokens=20, seed=3))
    text = "".join(answerer.pieces(direct))
    settings = {"model": "tiny", "messages": TALK, "max_tokens": 20, "temperature": 1, "seed": 3}
    done = near.chat.completions.create(**settings)
    assert done.choices[0].message.content == text
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(ids), len(direct.ids))
    chunks = list(near.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage == done.usage and not chunks[-1].choices and chunks[0].usage is None
    stop = text[len(text) // 2 :][:2]
    cut = near.chat.completions.create(**settings, stop=stop)
    assert cut.choices[0].message.content == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop"
    stream, shown = TextStream(answerer.tokenizer), ""
    grown = [shown := shown + stream.push(token) for token in direct.ids]
    needed = next(count for count, each in enumerate(grown, 1) if stop in each.lstrip())
    assert cut.usage.completion_tokens == needed < len(direct.ids)


def test_same_seed_same_answer(client):
    first, second = (ask(client, temperature=1, seed=7).choices[0].message.content for _ in range(2))
    assert first == second


def test_completions_continue_text(client):
    done = client.completions.create(model="run", prompt="### 질문: 왜?\n\n### 답변:", max_tokens=5, temperature=0)
    asked = client.chat.completions.create(model="run", messages=[{"role": "user", "content": "왜?"}], max_tokens=5,
                                           temperature=0)
    assert done.choices[0].text.lstrip() == asked.choices[0].message.content
    told = client.completions.create(model="run", prompt="### 질문: 왜?\n\n### 답변:", max_tokens=5, temperature=0,
                                     logprobs=0).choices[0]
    assert done.choices[0].text == told.text  # 첫머리의 공백까지 그대로다
    chunks = client.completions.create(model="run", prompt="### 질문: 왜?\n\n### 답변:", max_tokens=5, temperature=0,
                                       stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == done.choices[0].text


def test_stop_text_is_not_shown(client):
    whole = ask(client, temperature=0).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    done = ask(client, temperature=0, stop=[stop])
    assert done.choices[0].message.content == whole[: whole.index(stop)] and done.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("extra", [{"temperature": 5}, {"top_p": 0}, {"max_tokens": 0}, {"max_tokens": 10**6},
                                   {"n": 2}, {"seed": -1}, {"seed": 1.5}, {"stop": ["a"] * 9},
                                   *({"extra_body": body} for body in (
                                       {"top_k": -1}, {"stop_token_ids": [5]}, {"repeat_penalty": 1.3}, {"echo": True},
                                       {"max_new_tokens": 5}, {"n_predict": 5}, {"prompt": "가"}, {"temprature": 0}))])
def test_values_out_of_bounds(client, extra):
    with pytest.raises(openai.BadRequestError):
        ask(client, **extra)


def test_what_changes_no_answer_is_taken(client):
    """아무것도 바라지 않는 값과, 답을 바꾸지 않는 항목은 있어도 된다. OpenAI의 클라이언트들이 늘 함께 보낸다."""
    plain = ask(client, temperature=0, max_tokens=3).choices[0].message.content
    extra = {"n": 1, "user": "나", "metadata": {"a": "b"}, "presence_penalty": 0.0, "frequency_penalty": 0, "tools": [],
             "logit_bias": {}, "response_format": {"type": "text"}, "store": False, "service_tier": "auto", "seed": 1,
             "parallel_tool_calls": True, "reasoning_effort": "low", "top_logprobs": None, "logprobs": False,
             "max_completion_tokens": 3, "tool_choice": "auto", "modalities": ["text"], "top_p": 1}
    nothing = dict.fromkeys(("stop", "functions", "prediction", "audio", "web_search_options", "stream_options"))
    assert ask(client, temperature=0, **extra, extra_body=nothing).choices[0].message.content == plain


@pytest.mark.parametrize("path, body", [("chat/completions", {"messages": [{"role": "user", "content": "가 " * 5000}]}),
                                        ("completions", {"prompt": "가 " * 5000})])
def test_only_the_context_bounds_a_question(path, body, tmp_path):
    """글자 수가 아니라 모델이 읽는 토큰의 수가 한계다. 본문의 크기는 문지기가 막는다."""
    base = build_neox(tmp_path / "long", context=16_384)
    answerer = load_answerer(find_source(str(base), None, print), None, None, False, "default", print)
    client = TestClient(Starlette(routes=api.routes(Models([Choice("long", answerer)]), None)))
    reply = client.post(f"/v1/{path}", json={**body, "max_tokens": 1})
    assert reply.status_code == 200 and reply.json()["usage"]["prompt_tokens"] > 5000


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_length_out_of_bounds_is_named_as_it_was_asked(client, name):
    with pytest.raises(openai.BadRequestError, match=f"{name}의 값은 1에서 2048까지의 정수다. 받은 값: 4096"):
        ask(client, **{name: 4096})


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": ""}], [{"role": "tool", "content": "x"}],
                                      [{"role": "user", "content": "가" * 9000}], ["x"],
                                      [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]])
def test_bad_messages(client, messages):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="run", messages=messages)


def test_broken_json_and_foreign_origin(talk_server):
    url = f"{talk_server.url}/v1/chat/completions"
    assert httpx.post(url, content=b"{").status_code == 400
    assert httpx.post(url, content=b"[]").status_code == 400
    assert httpx.post(url, json={"messages": QUESTION}, headers={"Origin": "https://evil.example"}).status_code == 403
    assert httpx.post(url, json={"messages": QUESTION}, headers={"Host": "evil.example"}).status_code == 403


def test_every_refusal_has_the_form_of_openai(client, talk_server):
    """없는 길, 틀린 method, 너무 큰 본문도 클라이언트의 오류가 되고, 한국어 한 줄을 담는다."""
    url = f"{talk_server.url}/v1"
    for reply in (httpx.post(f"{url}/embeddings", json={"input": "가"}), httpx.get(f"{url}/chat/completions"),
                  httpx.post(f"{url}/completions", content=b" " * (257 * 1024)),
                  httpx.post(f"{url}/completions", json={"prompt": "가"}, headers={"Origin": "https://evil.example"})):
        error = reply.json()["error"]
        assert reply.status_code in (404, 413, 403) and any("가" <= char <= "힣" for char in error["message"])
        assert set(error) == {"message", "type", "param", "code"}
    with pytest.raises(openai.NotFoundError, match="있는 경로: GET /v1/models"):
        client.embeddings.create(model="run", input="가")


def test_full_line_is_429_in_korean_and_leaving_frees_it(client, talk_server):
    with concurrent.futures.ThreadPoolExecutor(14) as pool:
        streams = list(pool.map(lambda _: _try(client), range(14)))
        refused = [error for error in streams if isinstance(error, openai.RateLimitError)]
        assert refused and "바쁘다" in str(refused[0])
        for stream in streams:
            if not isinstance(stream, Exception):
                stream.close()
    for _ in range(200):
        answer = _try(client, max_tokens=2, stream=False)
        if not isinstance(answer, Exception):
            break
        time.sleep(0.1)
    assert answer.choices[0].finish_reason == "length"


def _try(client, **settings):
    try:
        return ask(client, **{"max_tokens": 900, "stream": True, **settings})
    except openai.RateLimitError as error:
        return error


def test_password_is_the_api_key(talk_run):
    with serving("--peft_root", str(talk_run), "--api", "True", "--auth", "나:비밀 암호", port=PORT + 20) as served:
        key = "나:비밀 암호".encode().decode("latin-1")
        url = f"{served.url}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert httpx.get(url, headers={b"Authorization": f"Bearer {key}".encode("latin-1")}).status_code == 200
        assert httpx.get(f"{served.url}/config").status_code == 401
        join = httpx.post(f"{served.url}/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "x"})
        assert join.status_code == 401


@pytest.mark.parametrize("text, stops, done, expected", [
    ("가나다", [], False, ("가나다", False)), ("가나#", ["##"], False, ("가나", False)),
    ("가나#", ["##"], True, ("가나#", False)), ("가##나", ["##"], False, ("가", True)),
    ("가##나", ["나", "##"], False, ("가", True)), ("", ["#"], False, ("", False))])
def test_stop_text_is_held_back_until_sure(text, stops, done, expected):
    assert _before_stop(text, stops, done) == expected
