"""어댑터 폴더는 얹히거나, 무엇이 틀렸는지와 가까이에 있는 것을 말하는 한 줄의 거절이 된다."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from utils.errors import UsageError
from utils.model.adapter import find_adapter, is_learned, load_adapter
from utils.model.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS

pytestmark = pytest.mark.quick


@pytest.fixture
def saved(tmp_path, tiny_neox):
    model = AutoModelForCausalLM.from_pretrained(tiny_neox)
    get_peft_model(model, LoraConfig(r=2, target_modules=["query_key_value"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_numbers_is_refused(saved, tiny_neox, bad):
    state = load_file(saved / ADAPTER_WEIGHTS)
    name = sorted(state)[0]
    state[name][0, 0] = bad
    save_file(state, saved / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"NaN이나 inf가 들어 있다.*{name}"):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_neox), saved)


def test_an_adapter_of_another_architecture_is_told_in_korean(saved, tiny_neox):
    config = (saved / ADAPTER_CONFIG).read_text(encoding="utf-8")
    (saved / ADAPTER_CONFIG).write_text(config.replace("query_key_value", "q_proj"), encoding="utf-8")
    with pytest.raises(UsageError, match="배운 층이 이 모델에 없다. 다른 구조"):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_neox), saved)


@pytest.mark.parametrize("changes, named", [
    ({"peft_type": "LOKR"}, "LOKR"), ({"peft_type": None}, "LoRA 어댑터만"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"), ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    ({"alora_invocation_tokens": [3, 4]}, "aLoRA")])
def test_an_adapter_that_is_not_the_same_each_time_is_refused(saved, tiny_neox, changes, named):
    config = json.loads((saved / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    (saved / ADAPTER_CONFIG).write_text(json.dumps({**config, **changes}), encoding="utf-8")
    with pytest.raises(UsageError, match=named):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_neox), saved)


def test_tied_tables_are_filled_by_one_name(tmp_path):
    """입력과 출력이 묶인 모델의 배운 토큰은 어댑터에 한 번만 담긴다."""
    base = tiny_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]))
    for name, parameter in model.named_parameters():
        if is_learned(name):
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "adapter")
    served = load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(served.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("asked", ["train", "train/fap", "faq", "train/faq-merged"])
def test_the_adapters_nearby_are_named(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    for name in ("faq", "말투"):
        (tmp_path / "train" / name / "checkpoint-3").mkdir(parents=True)
        (tmp_path / "train" / name / ADAPTER_CONFIG).touch()
    with pytest.raises(UsageError, match="있는 어댑터: train/faq, train/말투$"):
        find_adapter(asked)
