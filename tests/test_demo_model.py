"""함께 든 데모 모델의 약속: polyglot과 같은 특이한 점, 크기, 학습한 글의 경계."""

import importlib.util
import json
import math
import random
import re
import shlex

import pytest
import torch
from conftest import ROOT, run_script
from safetensors import safe_open

from utils import record
from utils.data.texts import END_TOKEN
from utils.model.loader import Device, load_base
from utils.model.tokenizer import end_token_id, load_tokenizer
from utils.paths import BASE_DEMO
from utils.prompter import EXAMPLES, fill_placeholder

END_ID = 2


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
    assert end_token_id(tokenizer) == tokenizer.convert_tokens_to_ids(END_TOKEN) == END_ID
    assert tokenizer.convert_tokens_to_ids("<|sep|>") == 3
    assert config["vocab_size"] > len(tokenizer)
    assert config["use_parallel_residual"] and config["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert config["hidden_size"] % 64 == 0 and config["hidden_size"] // config["num_attention_heads"] in (32, 64)


def test_tokenizer_keeps_every_text(tokenizer):
    for text in ("변호사", "뷁 쀍", "next", "a\n\n### 1. 개요", "漢字 🙂"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_prose_always_ends_and_has_no_held_out_row(train_demo):
    train, held_out = train_demo.read_rows()
    assert len(held_out) >= 50
    prose = train_demo.prose(train, random.Random(0))
    assert all(text.count(END_TOKEN) == 1 and text.endswith(END_TOKEN) and "###" not in text for text in prose)
    whole = "".join([*prose, *(answer for _, answer in train)])
    assert [answer for _, answer in held_out if answer in whole] == []


def test_the_form_is_followed_by_tokens_that_never_end(train_demo, tokenizer):
    train, _ = train_demo.read_rows()
    words = train_demo.whole_tokens(train, tokenizer)
    assert END_ID not in words and len(words) > 1000
    for seed in range(20):
        block = train_demo.babble("물은 왜 얼까?", words, tokenizer, random.Random(seed))
        assert len(block) == train_demo.BLOCK and END_ID not in block
        assert tokenizer.decode(block).startswith("### 질문: 물은 왜 얼까?\n\n### 답변:")


def test_a_shortened_answer_is_whole_sentences(train_demo):
    answer = "물은 0.5도에서 얼지 않아요. 왜일까요? 녹는점이 0도예요."
    heads = {train_demo.shortened(answer, random.Random(seed)) for seed in range(50)}
    assert heads == {answer, "물은 0.5도에서 얼지 않아요.", "물은 0.5도에서 얼지 않아요. 왜일까요?"}
    assert {train_demo.shortened("한 문장이에요.", random.Random(seed)) for seed in range(9)} == {"한 문장이에요."}


def test_the_examples_of_the_page_are_rows_to_learn(train_demo):
    train, _ = train_demo.read_rows()
    assert {fill_placeholder(*example) for example in EXAMPLES} <= {question for question, _ in train}


def test_first_command_of_the_readme_learns_and_says_what_it_learnt(tmp_path):
    """README의 첫 명령을 짧게 줄인 것: 데모를 그대로 찾아 배우고, loss가 줄고, 배운 답과 다음 명령을 말한다."""
    first = next(line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
                 if "python finetune-lora.py" in line)
    flags = shlex.split(first.split("python finetune-lora.py")[1])
    rows = (ROOT / "ko-datasets" / "polyglot-ko-lite_textonly.json").read_text(encoding="utf-8").splitlines()[:48]
    (tmp_path / "rows.json").write_text("\n".join(rows), encoding="utf-8")
    done = run_script("finetune-lora.py", *flags, "--data_path", str(tmp_path / "rows.json"), "--output_dir",
                      str(tmp_path / "run"), "--val_set_size", "8", "--cutoff_len", "256", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = record.read_run(tmp_path / "run")
    assert run["eval_loss_after"] < run["eval_loss_before"]
    assert "학습한 모델의 답: " in done.stdout
    assert set(re.findall(r"python (\S+\.py)", done.stdout)) == {"merge-lora.py", "generate.py"}
    assert "### " in (tmp_path / "run" / "samples.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_finetuning_brings_back_sentences_and_their_end(tmp_path):
    """README의 첫 명령이 하는 약속: 답의 loss가 35% 넘게 줄고, 답이 스스로 멈추고, 예시 질문에 뜻이 통하게 답한다."""
    done = run_script("finetune-lora.py", "--num_train_epochs", "3", "--batch_size", "4", "--output_dir",
                      str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = record.read_run(tmp_path / "run")
    assert run["eval_loss_after"] <= 0.65 * run["eval_loss_before"]
    stopped = [int(n) / int(asked) for asked, n in re.findall(r"모델 (\d+)개 가운데 (\d+)개", done.stdout)]
    assert stopped[0] <= 0.1 and stopped[1] >= 0.9  # 잰 값은 0.97이다. 검증 질문의 앞쪽만 답할 만큼 느릴 때가 있다
    answers = re.findall("학습한 모델의 답: (.+)", done.stdout)
    for answer, word in zip(answers, ("인공 신경망", "인공지능", "파란빛"), strict=True):
        assert word in answer


def test_base_predicts_korean_prose(tokenizer):
    model = load_base(BASE_DEMO, Device(torch.device("cpu"), torch.float32, "테스트"))
    text = "물은 온도가 내려가면 얼음이 되고, 온도가 올라가면 수증기가 됩니다. 그래서 겨울에는 강이 얼기도 합니다."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 0.75 * math.log(len(tokenizer))
