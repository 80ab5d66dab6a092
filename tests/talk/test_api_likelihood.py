"""`/v1/completions`의 echo와 logprobs: transformers가 잰 가능도와 같고, lm-evaluation-harness가 그대로 쓸 수 있다."""

import json
import math

import pytest
import torch
from starlette.applications import Starlette
from starlette.testclient import TestClient
from tiny import add_head
from transformers import AutoModelForCausalLM

from utils.decode.decoder import Decoder
from utils.model import adapter
from utils.model.tokenizer import load_tokenizer
from utils.prompter import Prompter
from utils.talk import api
from utils.talk.answerer import Answerer
from utils.talk.models import Choice, Models

CONTEXT, CHOICES = "### 질문: 물은 몇 도에서 끓나요?\n\n### 답변:", (" 100도에서 끓습니다.", " 꿰뚫다", " 7입니다")


@pytest.fixture(scope="module")
def base(talk_run):
    return adapter.read_adapter_config(talk_run)["base_model_name_or_path"]


@pytest.fixture(scope="module")
def model(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def client(model, tokenizer):
    return open_client(model, tokenizer)


def open_client(model, tokenizer) -> TestClient:
    answerer = Answerer(Decoder(model, tokenizer, (2,)), tokenizer, Prompter(), 2, print)
    return TestClient(Starlette(routes=api.routes(Models([Choice("tiny", answerer)]), None)))


def complete(client, prompt, **extra) -> dict:
    reply = client.post("/v1/completions", json={"prompt": prompt, "temperature": 0, **extra})
    assert reply.status_code == 200, reply.text
    return reply.json()


def scores_of(model, ids: list[int]) -> torch.Tensor:
    """위치마다 다음 토큰의 로그 가능도 [n, vocab]."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def expected(model, context: list[int], rest: list[int]) -> tuple[float, bool]:
    """(이어지는 글의 로그 가능도, 그것이 탐욕적인 답인지)."""
    scores = scores_of(model, context + rest)[len(context) - 1 : -1]
    chosen = scores.gather(1, torch.tensor(rest)[:, None])[:, 0]
    return float(chosen.sum()), bool((scores.argmax(-1) == torch.tensor(rest)).all())


def as_lm_eval_reads(reply: dict, context_lengths: list[int]) -> list[tuple[float, bool]]:
    """local-completions가 응답에서 꺼내는 것: 문맥 뒤부터, 새로 만든 마지막 토큰 앞까지."""
    found = []
    for choice, length in zip(sorted(reply["choices"], key=lambda c: c["index"]), context_lengths, strict=True):
        part = slice(length, -1)
        chosen, tops = choice["logprobs"]["token_logprobs"][part], choice["logprobs"]["top_logprobs"][part]
        greedy = all(one == max(top.values()) for one, top in zip(chosen, tops, strict=True))
        found.append((sum(chosen), greedy))
    return found


LM_EVAL = {"model": "tiny", "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


@pytest.mark.parametrize("as_text", [False, True])
def test_the_request_of_lm_eval_gets_the_exact_likelihood(client, model, tokenizer, as_text):
    context = tokenizer(CONTEXT)["input_ids"]
    rests = [tokenizer(choice)["input_ids"] for choice in CHOICES]
    greedy = [int(scores_of(model, context)[-1].argmax())]  # 모델이 스스로 할 말도 하나 넣어야 is_greedy가 갈린다
    rests.append(greedy)
    prompts = [context + rest for rest in rests]
    if as_text:
        prompts = prompts[:-1]
        sent = [CONTEXT + choice for choice in CHOICES]
    else:
        sent = prompts
    found = as_lm_eval_reads(complete(client, sent, **LM_EVAL), [len(context)] * len(sent))
    for (logprob, is_greedy), rest in zip(found, rests, strict=False):
        want, want_greedy = expected(model, context, rest)
        assert logprob == pytest.approx(want, abs=1e-3) and is_greedy is want_greedy
    assert as_text or [greedy for _, greedy in found] == [False, False, False, True]


def test_a_model_that_ends_at_once_still_has_one_token_after_the_prompt(base, tokenizer):
    """클라이언트는 마지막 토큰을 새로 만든 것으로 보고 뺀다. 끝 토큰만 만들었어도 그 자리가 있어야 한다."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.base_model.final_layer_norm.bias.data.fill_(1)
    model.get_output_embeddings().weight.data[2] = 1
    client = open_client(model, tokenizer)
    context, rest = (tokenizer(text)["input_ids"] for text in (CONTEXT, CHOICES[0]))
    reply = complete(client, context + rest, **LM_EVAL)
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["text"] == CONTEXT + CHOICES[0]
    assert len(choice["logprobs"]["tokens"]) == len(context + rest) + 1
    assert choice["logprobs"]["tokens"][-1] == "<|endoftext|>" and reply["usage"]["completion_tokens"] == 0
    assert as_lm_eval_reads(reply, [len(context)])[0][0] == pytest.approx(expected(model, context, rest)[0], abs=1e-3)


def test_offsets_and_names_spell_the_text(client, tokenizer):
    text = "꿰뚫는 👍 뷁"  # 배우지 않은 글자는 바이트 토큰 여럿으로 나뉜다
    choice = complete(client, text, max_tokens=6, echo=True, logprobs=2)["choices"][0]
    found, whole = choice["logprobs"], choice["text"]
    assert whole.startswith(text) and found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert len({len(found[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1
    assert any(name.startswith("bytes:\\x") for name in found["tokens"])
    edges = [*found["text_offset"], len(whole)]
    assert edges == sorted(edges) and edges[0] == 0
    for name, begin, end in zip(found["tokens"], edges, edges[1:], strict=False):
        assert name.startswith("bytes:") or whole[begin:end] in (name, "") or name == "<|endoftext|>"
    for logprob, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
        assert 2 <= len(top) <= 3 and max(top.values()) >= logprob and list(top.values()) == sorted(top.values())[::-1]


def test_the_head_of_the_text_is_read_and_not_echoed(model, base):
    """BOS를 붙이는 토크나이저면 글은 그 뒤에서 재고, 돌려주지는 않는다. 토큰 번호에는 아무것도 더하지 않는다."""
    tokenizer = add_head(load_tokenizer(base))
    client = open_client(model, tokenizer)
    ids = tokenizer(CONTEXT)["input_ids"]
    choice = complete(client, CONTEXT, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == CONTEXT and len(found["tokens"]) == len(ids) - 1 and found["text_offset"][0] == 0
    assert sum(found["token_logprobs"]) == pytest.approx(expected(model, ids[:1], ids[1:])[0], abs=1e-3)
    bare = complete(client, ids, max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]
    assert bare["token_logprobs"] == [None, *found["token_logprobs"]]


def test_max_tokens_0_only_reads(client, tokenizer):
    ids = tokenizer(CONTEXT)["input_ids"]
    reply = complete(client, [ids, ids[:5]], max_tokens=0, echo=True, logprobs=1)
    assert [len(choice["logprobs"]["tokens"]) for choice in reply["choices"]] == [len(ids), 5]
    assert reply["usage"] == {"prompt_tokens": len(ids) + 5, "completion_tokens": 0, "total_tokens": len(ids) + 5}
    assert reply["choices"][0]["text"] == CONTEXT
    one = complete(client, ids[:1], max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]
    assert one["token_logprobs"] == [None] and one["top_logprobs"] == [None] and one["text_offset"] == [0]
    plain = complete(client, CONTEXT, max_tokens=0, echo=True)["choices"][0]
    assert plain["text"] == CONTEXT and plain["logprobs"] is None and plain["finish_reason"] == "length"


def test_without_echo_only_the_answer_is_measured(client, model, tokenizer):
    ids = tokenizer(CONTEXT)["input_ids"]
    echoed = complete(client, ids, max_tokens=5, echo=True, logprobs=0)["choices"][0]
    alone = complete(client, ids, max_tokens=5, logprobs=0)["choices"][0]
    assert echoed["text"] == CONTEXT + alone["text"]
    made = alone["logprobs"]["token_logprobs"]
    assert made == echoed["logprobs"]["token_logprobs"][len(ids):] and alone["logprobs"]["text_offset"][0] == 0
    assert made[0] == pytest.approx(float(scores_of(model, ids)[-1].max()), abs=1e-3)


def test_chat_gives_logprobs_too(client):
    body = {"messages": [{"role": "user", "content": "왜?"}], "temperature": 0, "max_tokens": 4, "logprobs": True}
    for top in (0, 3):
        choice = client.post("/v1/chat/completions", json={**body, "top_logprobs": top}).json()["choices"][0]
        tokens = choice["logprobs"]["content"]
        text = bytes(byte for token in tokens for byte in token["bytes"]).decode("utf-8", "ignore")
        assert choice["message"]["content"].strip() in text and len(tokens) == 4
        for token in tokens:
            assert len(token["top_logprobs"]) == top and token["logprob"] <= 0
            assert not top or token["top_logprobs"][0]["logprob"] == token["logprob"]


def test_a_stop_text_cuts_the_tokens_too(client):
    whole = complete(client, CONTEXT, max_tokens=12, logprobs=0)["choices"][0]
    stop = whole["text"][len(whole["text"]) // 2 :][:2]
    cut = complete(client, CONTEXT, max_tokens=12, logprobs=0, stop=stop)["choices"][0]
    assert stop not in cut["text"] and whole["text"].startswith(cut["text"]) and cut["finish_reason"] == "stop"
    assert all(offset < len(cut["text"]) for offset in cut["logprobs"]["text_offset"])
    assert 0 < len(cut["logprobs"]["tokens"]) < len(whole["logprobs"]["tokens"])


def test_several_prompts_are_answered_in_their_order(client):
    prompts = ["### 질문: 왜?\n\n### 답변:", CONTEXT, "세종대왕"]
    together = complete(client, prompts, max_tokens=5)
    alone = [complete(client, prompt, max_tokens=5)["choices"][0]["text"] for prompt in prompts]
    assert [choice["text"] for choice in together["choices"]] == alone
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    said = ["", "", ""]
    with client.stream("POST", "/v1/completions", json={"prompt": prompts, "max_tokens": 5, "temperature": 0,
                                                         "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                said[choice["index"]] += choice["text"]
    assert said == alone


@pytest.mark.parametrize("extra", [
    {"prompt": []}, {"prompt": [[]]}, {"prompt": ""}, {"prompt": [1, "가"]}, {"prompt": [[1], [True]]},
    {"prompt": [10**9]}, {"prompt": [-1]}, {"prompt": ["가"] * 65}, {"prompt": [5] * 2000}, {"prompt": {"a": 1}},
    {"logprobs": 21}, {"logprobs": True}, {"logprobs": -1}, {"echo": "yes"}, {"max_tokens": 0},
    {"stream": True, "echo": True}, {"stream": True, "logprobs": 1}, {"best_of": 3}, {"suffix": "끝"},
    {"presence_penalty": 1}, {"logit_bias": {"5": 1}}, {"prompt": "\ud800"}])
def test_bad_requests_are_400_in_one_korean_line(client, extra):
    body = {"prompt": "가", "max_tokens": 2, **extra}
    reply = client.post("/v1/completions", content=json.dumps(body))
    message = reply.json()["error"]["message"]
    assert reply.status_code == 400 and "\n" not in message and any("가" <= char <= "힣" for char in message), message


@pytest.mark.parametrize("name, value", [
    ("tools", [{"type": "function"}]), ("tool_choice", "required"), ("min_p", 0.1), ("ignore_eos", True),
    ("chat_template_kwargs", {"enable_thinking": False}), ("guided_choice", ["가"])])
def test_what_would_change_the_answer_is_refused_by_name(client, name, value):
    body = {"messages": [{"role": "user", "content": "가"}], name: value}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400 and name in reply.json()["error"]["message"]


def test_lm_evaluation_harness_scores_a_task(talk_server, base, model, tokenizer, tmp_path, monkeypatch):
    """남이 쓴 클라이언트를 그대로 돌려, 문항마다의 가능도와 정확도를 직접 잰 것과 비교한다."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval이 없다: pip install -r tests/requirements-lm-eval.txt")
    from lm_eval.tasks import TaskManager

    questions = [("물은 몇 도에서 끓나요?", ["100도입니다", "7입니다", "가을입니다"], 0),
                 ("한글은 누가 만들었나요?", ["김치", "세종대왕입니다", "컴퓨터"], 1),
                 ("3 더하기 4는?", ["햇빛", "나뭇잎", "7입니다"], 2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"q": q, "choices": c, "gold": g}, ensure_ascii=False)
                                                   for q, c, g in questions), encoding="utf-8")
    (tmp_path / "tiny_quiz.yaml").write_text(
        f"""task: tiny_quiz
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / 'rows.jsonl'}
output_type: multiple_choice
test_split: test
doc_to_text: "### 질문: {{{{q}}}}\\n\\n### 답변:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
""", encoding="utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    done = lm_eval.simple_evaluate(
        model="local-completions", tasks=["tiny_quiz"], batch_size=2,
        model_args={"model": "base", "base_url": f"{talk_server.url}/v1/completions", "tokenizer": str(base),
                    "num_concurrent": 1, "max_retries": 1},
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0)
    right = 0
    for sample in done["samples"]["tiny_quiz"]:
        question, choices, gold = questions[sample["doc_id"]]
        context = tokenizer(f"### 질문: {question}\n\n### 답변:")["input_ids"]
        wanted = [expected(model, context, tokenizer(f" {choice}")["input_ids"]) for choice in choices]
        for (logprob, greedy), (want, want_greedy) in zip(sample["filtered_resps"], wanted, strict=True):
            assert float(logprob) == pytest.approx(want, abs=1e-3) and bool(greedy) is want_greedy
        right += max(range(3), key=lambda place: wanted[place][0]) == gold
    assert math.isclose(done["results"]["tiny_quiz"]["acc,none"], right / 3)
