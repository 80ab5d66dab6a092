"""기반 모델 하나에 어댑터 여럿: 하나씩 얹어 물은 것과 같은 답을 하고, 번갈아 물어도 섞이지 않는다."""

import asyncio
import json
import shutil
from functools import partial

import conftest
import pytest
import torch
from conftest import load_answerer, load_script
from peft import LoraConfig, PeftModel, get_peft_model
from starlette.applications import Starlette
from starlette.testclient import TestClient
from tiny import build_neox
from transformers import AutoModelForCausalLM

from utils.engine.families import describe
from utils.engine.weights import Weights, why_not_weights
from utils.errors import UsageError
from utils.model import adapter
from utils.prompter import Prompter
from utils.sampling import Sampling
from utils.talk import api
from utils.talk.answerer import Answer
from utils.talk.models import unique_names
from utils.talk.source import find_source, find_sources, load_models

pytestmark = pytest.mark.quick

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
OTHER = {"name": "other", "prompt_no_input": "물음: {instruction}\n답:", "answer_marker": "답:",
         "prompt_input": "물음: {instruction}\n{input}\n답:"}
generate = load_script("generate.py")


def silent(line: str) -> None:
    pass


def write_adapter(folder, base, seed: int, template: dict, **lora):
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(
        init_lora_weights=False, task_type="CAUSAL_LM", base_model_name_or_path=str(base), **lora))
    model.save_pretrained(folder)
    adapter.write_prompt_info(folder, adapter.PromptInfo(template, "<|endoftext|>", 2, 64, (2,)))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_neox):
    """rank도 층도 템플릿도 서로 다른 어댑터 셋. 폴더 이름 하나는 torch의 모듈이 쓸 수 없는 이름이고 둘은 겹친다."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(folder / "v1.0" / "train", tiny_neox, 1, Prompter().template, r=4,
                      target_modules=["query_key_value"]),
        write_adapter(folder / "말투.v2", tiny_neox, 2, OTHER, r=2, lora_alpha=16,
                      target_modules=["query_key_value", "dense", "dense_h_to_4h"]),
        write_adapter(folder / "v3" / "train", tiny_neox, 3, Prompter().template, r=8, use_rslora=True,
                      target_modules=["dense_4h_to_h"]),
    ]


@pytest.fixture(scope="module")
def models(adapters):
    return load_models(find_sources(None, [str(each) for each in adapters], silent), None, None, False, None, silent)


def say(answerer, question: str, tuned: bool = True) -> list[int]:
    answer = Answer(answerer.ask(question), GREEDY, tuned)
    list(answerer.pieces(answer))
    return answer.ids


def test_each_answers_as_if_it_were_alone_also_after_switching(adapters, models, tiny_neox):
    names = ["train", "말투.v2", "train-2"]
    assert models.names == [*names, "base"] and models.default.name == "train"
    alone = {name: say(load_answerer(find_source(None, str(folder), silent), None, None, False, None, silent), "왜?")
             for name, folder in zip(names, adapters, strict=True)}
    plain = load_answerer(find_source(str(tiny_neox), None, silent), None, None, False, None, silent)
    alone["base"] = say(plain, "왜?")
    assert len({tuple(ids) for ids in alone.values()}) == 4, "넷의 답이 서로 달라야 섞임이 보인다"
    for name in ("train", "base", "말투.v2", "train", "train-2", "base", "train-2", "말투.v2", "train"):
        choice = models.choose(name)
        assert say(choice.answerer, "왜?", choice.tuned) == alone[name], name


def test_an_adapter_that_leaves_something_when_it_is_off_is_not_compared(tiny_neox, tmp_path):
    said = []
    folder = write_adapter(tmp_path / "odd", tiny_neox, 1, Prompter().template, r=4, bias="lora_only",
                           target_modules=["query_key_value"])
    alone = load_models([find_source(None, str(folder), silent)], None, None, False, None, said.append)
    assert alone.names == ["odd"] and not alone.default.answerer.can_compare
    assert any("비교하지 않는다" in line for line in said)


def test_the_oracle_is_peft(adapters, models, tiny_neox):
    """transformers와 peft로 하나씩 얹어 만든 답과도 같다. 템플릿은 어댑터마다 제 것이다."""
    asked = []
    for choice, folder in zip(models.tuned, adapters, strict=True):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_neox, dtype=torch.float32), folder)
        ids = choice.answerer.ask("하늘은?")
        words = range(len(choice.answerer.tokenizer), model.config.vocab_size)
        made = model.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=[2],
                              pad_token_id=2, suppress_tokens=list(words))[0, len(ids):].tolist()
        assert say(choice.answerer, "하늘은?") == [token for token in made if token != 2]
        asked.append(choice.answerer.tokenizer.decode(ids))
    assert asked[0] == asked[2] == "### 질문: 하늘은?\n\n### 답변:" and asked[1] == "물음: 하늘은?\n답:"


def test_answers_of_several_adapters_stand_in_one_line(models):
    """나란히 비교할 때처럼 한 묶음으로 세워도 저마다 제 어댑터로 답한다."""
    pairs = [(choice, Answer(choice.answerer.ask("왜?"), GREEDY, choice.tuned))
             for choice in map(models.choose, [*models.names, *models.names])]
    line = models.default.answerer.line
    line.submit(*(choice.answerer.task(answer) for choice, answer in pairs))

    async def wait():
        async for _ in line.follow(*(answer for _, answer in pairs)):
            pass

    asyncio.run(wait())
    for choice, answer in pairs:
        assert answer.ids == say(choice.answerer, "왜?", choice.tuned), choice.name


def test_the_api_chooses_by_name(models):
    client = TestClient(Starlette(routes=api.routes(models, None)))
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == models.names
    for name in (None, *models.names, *models.names):
        body = {"messages": [{"role": "user", "content": "왜?"}], "max_tokens": 12, "temperature": 0}
        reply = client.post("/v1/chat/completions", json=body if name is None else {**body, "model": name}).json()
        choice = models.choose(name)
        assert reply["model"] == choice.name
        text = choice.answerer.tokenizer.decode(say(choice.answerer, "왜?", choice.tuned)).replace("\ufffd", "")
        assert reply["choices"][0]["message"]["content"].strip() == text.strip()


def test_likelihood_follows_the_chosen_adapter(adapters, models, tiny_neox):
    client = TestClient(Starlette(routes=api.routes(models, None)))
    ids = models.default.answerer.tokenizer("세종대왕이 한글을 만들었다.")["input_ids"]
    folders = dict(zip(models.names, [*adapters, None], strict=True))
    for name in (*models.names, *reversed(models.names)):
        body = {"model": name, "prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}
        found = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["token_logprobs"]
        model = AutoModelForCausalLM.from_pretrained(tiny_neox, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folders[name]) if folders[name] else model
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = scores[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
        assert found[0] is None and found[1:] == pytest.approx(expected, abs=1e-4), name


def test_the_kernels_copy_the_chosen_adapter(adapters, tiny_neox, tmp_path):
    """커널의 엔진은 만들 때 고른 어댑터의 값만 베낀다. 그 뒤에 다른 것을 골라도 값이 바뀌지 않는다."""
    second = write_adapter(tmp_path / "second", tiny_neox, 7, OTHER, r=2, target_modules=["query_key_value"])
    load = partial(AutoModelForCausalLM.from_pretrained, tiny_neox, dtype=torch.float16)
    both = adapter.load_adapter(adapter.load_adapter(load(), adapters[0]), second, "adapter2")
    family = describe(both)
    held = {}
    for name in ("default", "adapter2"):
        both.set_adapter(name)
        assert why_not_weights(both, family) is None
        held[name] = Weights(both, family)
    for name, folder in (("default", adapters[0]), ("adapter2", second)):
        alone = Weights(adapter.load_adapter(load(), folder), family)
        assert held[name].rank == alone.rank
        for layer, other in zip(held[name].layers, alone.layers, strict=True):
            for field in ("down", "up"):
                assert torch.equal(getattr(layer.qkv.adapter, field), getattr(other.qkv.adapter, field))
    both = adapter.load_adapter(both, adapters[1], "adapter3")  # 다른 층에도 붙은 것
    both.set_adapter("default")
    assert "여러 어댑터" in why_not_weights(both, family), "커널이 모르는 꼴이면 transformers의 길로 간다"


def test_the_command_line_answers_with_each(adapters, capsys):
    said = conftest.call_script(capsys, "generate.py", "--peft_root", ",".join(map(str, adapters[:2])), "--ask", "왜?")
    first, second = said.split("[train]")[1].split("[말투.v2]")
    assert "토큰/초" in first and "토큰/초" in second and first.split("[")[0].strip() != second.split("[")[0].strip()


def test_names_are_made_unique():
    assert unique_names(["a", "base", "a", "a-2", "a"]) == ["a", "base-2", "a-2", "a-2-2", "a-3"]


class TestRefused:
    def refuse(self, *roots, base=None):
        with pytest.raises(UsageError) as error:
            find_sources(base, list(map(str, roots)), silent)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_the_same_adapter_twice(self, adapters):
        assert "두 번" in self.refuse(adapters[0], adapters[0])

    def test_adapters_of_different_bases(self, adapters, tmp_path):
        base = build_neox(tmp_path / "other-base", seed=5)
        other = write_adapter(tmp_path / "other", base, 1, OTHER, r=2, target_modules=["query_key_value"])
        line = self.refuse(adapters[0], other)
        assert "기반 모델이 다르다" in line and str(base) in line

    def test_a_copy_of_the_base_is_the_same_base(self, adapters, tiny_neox, tmp_path):
        copied = shutil.copytree(tiny_neox, tmp_path / "copy")
        other = shutil.copytree(adapters[1], tmp_path / "other")
        config = json.loads((other / "adapter_config.json").read_text(encoding="utf-8"))
        (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(copied)}))
        assert len(find_sources(None, [str(adapters[0]), str(other)], silent)) == 2

    def test_one_of_them_is_missing(self, adapters):
        assert "어댑터 폴더가 없다: no-such" in self.refuse(adapters[0], "no-such")

    def test_one_that_does_not_fit_the_base(self, adapters, tmp_path, tiny_neox):
        wide = build_neox(tmp_path / "wide", hidden=128, heads=4)
        other = write_adapter(tmp_path / "wide-adapter", wide, 1, OTHER, r=2, target_modules=["query_key_value"])
        sources = find_sources(str(tiny_neox), [str(adapters[0]), str(other)], silent)
        with pytest.raises(UsageError, match="wide-adapter") as error:
            load_models(sources, None, None, False, None, silent)
        assert "\n" not in str(error.value)

    def test_eval_takes_one(self, capsys, adapters):
        line = conftest.refuse(capsys, generate.serve, "--peft_root", f"{adapters[0]},{adapters[1]}", "--eval", "2")
        assert "하나만" in line
