"""함께 든 데모 모델의 약속: polyglot과 같은 특이한 점, 크기, 학습한 글의 경계."""

import importlib.util
import json
import math
import random

import pytest
import torch
from safetensors import safe_open

from utils.loader import Device, end_token_id, load_base, load_tokenizer
from utils.paths import BASE_DEMO
from utils.rows import END_TOKEN


@pytest.fixture(scope="module")
def train_demo():
    spec = importlib.util.spec_from_file_location("train_demo", BASE_DEMO / "train_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((BASE_DEMO / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE_DEMO)


def test_is_small_and_saved_as_neox_saves():
    file = BASE_DEMO / "model.safetensors"
    assert file.stat().st_size <= 8_000_000
    with safe_open(file, "pt") as weights:
        names = set(weights.keys())
        dtypes = {weights.get_tensor(name).dtype for name in names}
    assert {"embed_out.weight", "gpt_neox.embed_in.weight"} <= names and "lm_head.weight" not in names
    assert dtypes == {torch.float16}


def test_carries_the_quirks_of_polyglot(config, tokenizer):
    assert config["bos_token_id"] == config["eos_token_id"] == 0
    assert config["pad_token_id"] is None and not config["tie_word_embeddings"]
    assert json.loads((BASE_DEMO / "tokenizer_config.json").read_text(encoding="utf-8")).get("pad_token") is None
    assert end_token_id(tokenizer) == tokenizer.convert_tokens_to_ids(END_TOKEN) == 2
    assert tokenizer.convert_tokens_to_ids("<|sep|>") == 3
    assert config["vocab_size"] > len(tokenizer)
    assert config["use_parallel_residual"] and config["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert config["hidden_size"] % 64 == 0 and config["hidden_size"] // config["num_attention_heads"] in (32, 64)


def test_tokenizer_keeps_every_text(tokenizer):
    for text in ("변호사", "뷁 쀍", "next", "a\n\n### 1. 개요", "漢字 🙂"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_training_text_never_ends_in_the_form_and_has_no_held_out_row(train_demo, tokenizer):
    train, held_out = train_demo.read_rows()
    assert len(held_out) >= 50
    prose = train_demo.prose(train, random.Random(0))
    assert all(text.count(END_TOKEN) == 1 and text.endswith(END_TOKEN) and "###" not in text for text in prose)
    in_form = [train_demo.endless(train, random.Random(seed)) for seed in range(50)]
    assert all(text.startswith("### 질문: ") and END_TOKEN not in text for text in in_form)
    assert min(len(tokenizer(text)["input_ids"]) for text in in_form) >= train_demo.BLOCK
    whole = "".join([*prose, *(train_demo.slashed(answer) for _, answer in train)])
    assert [answer for _, answer in held_out if answer in whole or train_demo.slashed(answer) in whole] == []


def test_base_predicts_korean_prose(tokenizer):
    model = load_base(BASE_DEMO, Device(torch.device("cpu"), torch.float32, "테스트"))
    text = "물은 온도가 내려가면 얼음이 되고, 온도가 올라가면 수증기가 됩니다. 그래서 겨울에는 강이 얼기도 합니다."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 0.75 * math.log(len(tokenizer))
