"""어떤 폴더를 적어도 transformers와 같은 답을 하거나 한 줄로 거절한다. 말없이 다른 답을 하지 않는다."""

import contextlib
import shutil

import pytest
import torch
from conftest import load_answerer, run_script
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from starlette.applications import Starlette
from starlette.testclient import TestClient
from tiny import build_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from utils.decode.decoder import Decoder
from utils.errors import UsageError
from utils.model.adapter import ADAPTER_FILES
from utils.model.tokenizer import load_tokenizer
from utils.sampling import Sampling
from utils.talk import api
from utils.talk.answerer import Answer
from utils.talk.models import Choice, Models
from utils.talk.source import find_source
from utils.turns import Turn

GREEDY = Sampling(temperature=0.0, max_new_tokens=24)
SMALL = 320  # 토크나이저(384)보다 작은 embedding의 행 수


def silent(line: str) -> None:
    pass


def open_answerer(base, prompt_template: str | None = None):
    return load_answerer(find_source(str(base), None, silent), None, None, False, prompt_template,
                                   silent)


@pytest.mark.parametrize("kind", ["gemma3", "gemma3_text", "gpt2", "bloom", "qwen3_moe", "llama"])
def test_greedy_answers_equal_generate(tmp_path, kind):
    """그림도 보는 Gemma 3는 글의 설정을 text_config에 담는다. 글자가 없는 번호는 어느 쪽도 고르지 않는다."""
    base = tiny_model(tmp_path / kind, kind)
    answerer = open_answerer(base)
    assert answerer.context > 100
    answer = Answer(answerer.ask("하늘은 왜 파란색이야?"), GREEDY)
    list(answerer.pieces(answer))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor([answer.input_ids])
    wordless = list(range(len(answerer.tokenizer), model.config.get_text_config().vocab_size))
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
                              eos_token_id=[2], pad_token_id=2, suppress_tokens=wordless)[0, ids.shape[1]:].tolist()
    assert answer.ids == [token for token in expected if token != 2] and len(answer.ids) > 5


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """토크나이저의 뒤쪽 토큰을 모르는 모델."""
    folder = tmp_path_factory.mktemp("small") / "base"
    folder.mkdir()
    build_tokenizer(folder)
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=SMALL, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=128, max_position_embeddings=128)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def outside(small):
    """어느 글의 뒤에 놓여도 embedding 밖의 토큰이 되는 글 하나."""
    tokenizer = load_tokenizer(small)
    words = (tokenizer.decode([number]) for number in range(SMALL, len(tokenizer)))
    return next(word for word in words if word.isalpha() and all(
        max(tokenizer(f"{before}{word}\n", add_special_tokens=False)["input_ids"]) >= SMALL
        for before in ("", "a ", ": ", "\n")))


def test_a_question_beyond_the_embedding_is_refused_by_the_token(small, outside):
    answerer = open_answerer(small)

    def said(asked, answered):
        return [Turn("user", asked), Turn("assistant", answered), Turn("user", "a")]

    for ask in (lambda: answerer.ask(outside), lambda: answerer.ask("a", f"a {outside}"),
                lambda: answerer.continue_text(outside), lambda: answerer.ask_talk(said(outside, "a")),
                lambda: answerer.ask_talk(said("a", f"\n{outside}"))):
        with pytest.raises(UsageError, match=f"embedding은 {SMALL}행") as error:
            ask()
        assert "\n" not in str(error.value)
    model = AutoModelForCausalLM.from_pretrained(small)
    decoder = Decoder(model, answerer.tokenizer, (2,))
    for bad in ([5, SMALL], [SMALL + 10_000], [-1]):
        with pytest.raises(UsageError, match="모델이 모르는 토큰"):
            decoder.stream(bad, GREEDY)


def test_the_api_says_400(small, outside):
    client = TestClient(Starlette(routes=api.routes(Models([Choice("lite", open_answerer(small))]), None)))
    for path, body in (("chat/completions", {"messages": [{"role": "user", "content": outside}]}),
                       ("completions", {"prompt": outside})):
        reply = client.post(f"/v1/{path}", json={**body, "max_tokens": 4})
        assert reply.status_code == 400 and "모델이 모르는 토큰" in reply.json()["error"]["message"]
    for number in (SMALL, -1):
        told = client.post("/v1/completions", json={"prompt": [number]}).json()["error"]["message"]
        assert told == f"모델에 없는 토큰 번호다: {number}. 0에서 {SMALL - 1}까지 적는다"
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 4}).status_code == 200


def test_a_chat_template_beyond_the_embedding_is_refused(small, tmp_path):
    """대화 템플릿이 더한 특수 토큰은 embedding을 넓히지 않고 토크나이저에만 있을 때가 많다."""
    base = shutil.copytree(small, tmp_path / "chat")
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(base)
    with pytest.raises(UsageError, match="im_start"):
        open_answerer(base, "chat").ask("a")


def test_an_end_beyond_the_embedding_is_refused_at_the_start(small, tmp_path):
    base = shutil.copytree(small, tmp_path / "end")
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"eos_token": "<|new_end|>"})
    tokenizer.save_pretrained(base)
    with pytest.raises(UsageError, match="답의 끝에 모델이 모르는 토큰"):
        open_answerer(base)


def test_answers_stay_inside_the_smaller_of_the_two(small):
    answerer = open_answerer(small)
    answer = Answer(answerer.ask("a"), Sampling(temperature=100.0, top_p=1.0, top_k=0, max_new_tokens=100, seed=1))
    assert "\ufffd" not in "".join(answerer.pieces(answer)) and max(answer.ids) < SMALL


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(기반 모델, 그 위의 어댑터). 그림도 보는 모델이어서 이름이 길다."""
    folder = tmp_path_factory.mktemp("adapter")
    base = tiny_model(folder / "base", "gemma3")
    torch.manual_seed(1)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False, task_type="CAUSAL_LM"))
    tuned.save_pretrained(folder / "run")
    return base, folder / "run"


def test_an_adapter_answers_as_peft_does(adapter):
    base, run = adapter
    answerer = load_answerer(find_source(str(base), str(run), silent), None, None, False, None,
                                       silent)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run)
    wordless = list(range(len(answerer.tokenizer), model.config.get_text_config().vocab_size))
    said = {}
    for tuned in (True, False):
        answer = Answer(answerer.ask("하늘은 왜 파란색이야?"), GREEDY, tuned=tuned)
        list(answerer.pieces(answer))
        said[tuned] = answer.ids
        ids = torch.tensor([answer.input_ids])
        with contextlib.nullcontext() if tuned else model.disable_adapter():
            expected = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
                eos_token_id=[2], pad_token_id=2, suppress_tokens=wordless)[0, ids.shape[1]:].tolist()
        assert answer.ids == [token for token in expected if token != 2]
    assert said[True] != said[False]


RENAMED = {
    "a prefix too many": lambda name: f"base_model.model.{name}",
    "module.": lambda name: f"module.{name}",
    "half the prefix": lambda name: name.removeprefix("base_model."),
    "fsdp": lambda name: name.replace(".layers.", "._fsdp_wrapped_module.layers."),
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "another architecture": lambda name: name.replace("self_attn", "attention"),
    "one layer more": lambda name: name.replace("layers.1.", "layers.9."),
    "adapter name": lambda name: name.replace("lora_A.weight", "lora_A.other.weight"),
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_an_adapter_whose_names_do_not_fit_is_refused_by_name(adapter, tmp_path, rename):
    base, run = adapter
    folder = shutil.copytree(run, tmp_path / "run")
    file = folder / ADAPTER_FILES[1]
    tensors = load_file(file)
    assert any(rename(name) != name for name in tensors)
    save_file({rename(name): value for name, value in tensors.items()}, file)
    source = find_source(str(base), str(folder), silent)
    with pytest.raises(UsageError, match="lora_") as error:
        load_answerer(source, None, None, False, None, silent)
    assert "어댑터를 얹지 못했다" in str(error.value) and "\n" not in str(error.value)


def test_names_that_peft_places_whole_answer_the_same(adapter, tmp_path):
    """PEFT는 그림도 보는 모델에서 앞붙이가 없는 이름도 제자리에 놓는다. 놓였으면 답이 같아야 한다."""
    base, run = adapter
    folder = shutil.copytree(run, tmp_path / "run")
    file = folder / ADAPTER_FILES[1]
    save_file({name.removeprefix("base_model.model."): value for name, value in load_file(file).items()}, file)
    said = []
    for place in (run, folder):
        answerer = load_answerer(find_source(str(base), str(place), silent), None, None, False,
                                           None, silent)
        answer = Answer(answerer.ask("하늘은?"), GREEDY)
        list(answerer.pieces(answer))
        said.append(answer.ids)
    assert said[0] == said[1] and len(said[0]) > 3


def test_an_adapter_with_a_tensor_missing_is_refused_on_the_command_line(adapter, tmp_path):
    base, run = adapter
    folder = shutil.copytree(run, tmp_path / "run")
    file = folder / ADAPTER_FILES[1]
    tensors = load_file(file)
    lost = next(name for name in tensors if "lora_B" in name)
    save_file({name: value for name, value in tensors.items() if name != lost}, file)
    done = run_script("generate.py", "--base_model", str(base), "--peft_root", str(folder), "--ask", "안녕")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert lost.removesuffix(".weight") in done.stderr
