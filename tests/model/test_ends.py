"""답의 끝은 하나가 아니다: 토크나이저, 두 설정 파일, 대화 템플릿, 학습의 기록이 말하는 어느 끝에서도 멈춘다."""

import json
import shutil

import pytest
import torch
from conftest import load_answerer
from transformers import AutoModelForCausalLM

from utils.decode.decoder import Decoder
from utils.model import adapter
from utils.model.tokenizer import end_token_ids, load_tokenizer
from utils.sampling import Sampling
from utils.talk.source import find_source

EOS, SEP = 2, 3
GREEDY = Sampling(temperature=0.0, max_new_tokens=48)
# 모델마다 다른 답의 끝
TURNS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "[|endofturn|]", "<|end|>")


@pytest.fixture()
def base(tiny_neox, tmp_path):
    return shutil.copytree(tiny_neox, tmp_path / "base")


def chat_tokenizer(base, turn: str, template: str):
    """`turn`을 특수 토큰으로 더하고 대화 템플릿을 적은 토크나이저."""
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [turn]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("space", ["", "\n", " "])
def test_the_token_after_an_answer_in_the_chat_template_is_an_end(base, turn, space):
    template = ("{% for m in messages %}<|sep|>{{ m.role }}\n{{ m.content }}" + space + turn + "\n{% endfor %}")
    tokenizer = chat_tokenizer(base, turn, template)
    assert end_token_ids(tokenizer, base) == (EOS, tokenizer.convert_tokens_to_ids(turn))


@pytest.mark.parametrize("template", [
    "{{ raise_exception('이 대화는 다루지 않는다') }}", "{{ nothing.here.at.all }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}", "{% for m in messages %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}여기서 끝{% endfor %}", "{% if",
])
def test_a_template_without_an_end_adds_none(base, template):
    assert end_token_ids(chat_tokenizer(base, "<|im_end|>", template), base) == (EOS,)


@pytest.mark.parametrize("file, content", [
    ("generation_config.json", {"eos_token_id": [SEP, EOS]}), ("generation_config.json", {"eos_token_id": SEP}),
    ("config.json", {"eos_token_id": [SEP]}), ("config.json", {"text_config": {"eos_token_id": SEP}}),
])
def test_every_end_of_the_settings_is_kept(base, file, content):
    path = base / file
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**before, **content}), encoding="utf-8")
    assert end_token_ids(load_tokenizer(base), base) == (EOS, SEP)


@pytest.mark.parametrize("said", [0, None, [0, 300], [10**9], [], "2", [None, "3"], -1, {}, [[3]], True])
def test_what_is_not_a_special_token_in_use_is_no_end(base, said):
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": said}), encoding="utf-8")
    assert end_token_ids(load_tokenizer(base), base) == (EOS,)


def end_with(base, token: int) -> tuple[list[int], list[int]]:
    """(질문, 끝 앞까지의 탐욕적인 답). 답의 여섯째 토큰이 나올 자리마다 `token`이 나오도록 모델을 고쳐 쓴다."""
    tokenizer = load_tokenizer(base)
    ids = tokenizer("안녕", add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    answer = list(Decoder(model, tokenizer, ()).stream(ids, GREEDY))
    first = answer.index(answer[5])
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[[token, answer[5]]] = head[[answer[5], token]]
    model.to(torch.float16).save_pretrained(base)
    return ids, answer[:first]


def test_generation_stops_at_any_end_and_generate_agrees(base):
    ids, expected = end_with(base, SEP)
    tokenizer = load_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    decoder = Decoder(model, tokenizer, (EOS, SEP))
    assert list(decoder.stream(ids, GREEDY)) == expected and decoder.finish_reason == "stop"
    theirs = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                            do_sample=False, max_new_tokens=48, eos_token_id=[EOS, SEP], pad_token_id=EOS)
    assert theirs[0, len(ids):].tolist() == [*expected, SEP]
    only_eos = Decoder(model, tokenizer, (EOS,))
    assert list(only_eos.stream(ids, GREEDY)) != expected and only_eos.finish_reason == "length"


@pytest.mark.parametrize("place", ["generation_config.json", "config.json", "prompt.json"])
def test_serving_stops_where_the_folder_says(base, place):
    ids, expected = end_with(base, SEP)
    for name in ("generation_config.json", "config.json"):
        content = json.loads((base / name).read_text(encoding="utf-8"))
        content["eos_token_id"] = [EOS, SEP] if name == place else EOS
        (base / name).write_text(json.dumps(content), encoding="utf-8")
    if place == "prompt.json":
        adapter.write_prompt_info(base, adapter.PromptInfo({"name": "chat"}, "<|endoftext|>", EOS, 64, (EOS, SEP)))
    source = find_source(str(base), None, lambda line: None)
    answerer = load_answerer(source, None, None, False, "default", lambda line: None)
    from utils.talk.answerer import Answer

    answer = Answer(ids, GREEDY)
    list(answerer.pieces(answer))
    assert answer.ids == expected and answer.finish_reason == "stop"


def test_the_record_keeps_every_end_and_old_records_still_open(tiny_run, tmp_path):
    info = adapter.read_prompt_info(tiny_run)
    assert info.end_token_id == EOS and info.end_token_ids == (EOS,)
    content = json.loads((tiny_run / adapter.PROMPT_FILE).read_text(encoding="utf-8"))
    del content["end_token_ids"]
    (tmp_path / adapter.PROMPT_FILE).write_text(json.dumps(content), encoding="utf-8")
    assert adapter.read_prompt_info(tmp_path).end_token_ids == ()
