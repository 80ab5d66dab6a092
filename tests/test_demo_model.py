"""함께 든 데모 모델의 약속: polyglot과 같은 특이한 점, 크기, 읽은 글의 경계, 배우면 생기는 재주."""

import importlib
import json
import math
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from safetensors import safe_open

from utils import record
from utils.data.blocks import split_by_content
from utils.data.dataset import load_documents
from utils.data.encoder import Encoder
from utils.data.rows import read_rows
from utils.data.texts import END_TOKEN
from utils.model.loader import Device, load_base
from utils.model.tokenizer import end_token_id, load_tokenizer
from utils.paths import BASE_DEMO, DATA_DEMO
from utils.prompter import EXAMPLES, Prompter

END_ID = 2
N_TEXTS = 3000
VAL_PERCENT = 5  # finetune-lora.py의 기본값
SEEDS = (42, 1, 2)


@pytest.fixture(scope="module")
def sources():
    """데모의 글을 짓는 모듈들."""
    sys.path.insert(0, str(BASE_DEMO))
    yield {name: importlib.import_module(name) for name in ("corpus", "demo_rows", "korean", "sentences")}
    sys.path.remove(str(BASE_DEMO))


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


def test_four_bits_and_sixteen_bits_are_the_same_model():
    """가중치가 이미 NF4로 반올림한 값이어서 4비트로 올려도 변하지 않는다."""
    cpu = Device(torch.device("cpu"), torch.float32, "테스트")
    ids = torch.arange(10, 60)[None]
    with torch.no_grad():
        logits = [load_base(BASE_DEMO, cpu, quantize)(input_ids=ids).logits for quantize in (None, "4bit")]
    assert torch.allclose(*logits, atol=2e-2)


def test_tokenizer_keeps_every_text(tokenizer):
    for text in ("변호사", "뷁 쀍", "next", "a\n\n### 1. 개요", "漢字 🙂"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_digits_and_their_sounds_are_single_tokens(tokenizer, sources):
    for number in (7, 3482, 90_668, 123_456):
        assert len(tokenizer(str(number))["input_ids"]) == len(str(number))
        spoken = sources["korean"].read_number(number)
        assert len(tokenizer(" " + spoken)["input_ids"]) == len(spoken.replace(" ", ""))


def test_the_base_never_read_a_row_nor_its_form(sources):
    """기반 모델이 읽은 글에는 행의 문장도 수도 시각도 날짜도 없고, 묻고 답하는 형식도 없다."""
    rows = {*sources["demo_rows"].make_rows(), *sources["demo_rows"].EXAMPLES}
    corpus = sources["corpus"].Corpus(random.Random(1), rows)
    texts = [corpus.text() for _ in range(N_TEXTS)]
    assert all(text.count(END_TOKEN) == 1 and text.endswith(END_TOKEN) for text in texts)
    whole = "\n".join(texts)
    assert not re.search(r"### 질문|### 답변|줘:|뭐야|뭐지|무엇이야|어떻게 읽어|설명해", whole)
    numbers = set(re.findall(r"(?<![\d,])\d[\d,]*(?!\d)", whole))
    times = set(re.findall(r"오[전후] \d+시 \d+분", whole)) | set(re.findall(r"\d+월 \d+일", whole))
    sentences = set(re.findall(r'"([^"]+)"', whole)) | set(re.findall(r": (.+)", whole)) | set(whole.splitlines())
    assert len(numbers) > 400 and len(times) > 100 and len(sentences) > 2000
    assert (numbers | times | sentences) & rows == set()


def test_examples_of_the_page_are_what_the_demo_does(sources):
    rows = [row for _, row in read_rows(DATA_DEMO)]
    asked = [Prompter().prompt(*example) for example in EXAMPLES]
    assert any("AI가 뭐지?" in each for each in asked) and "AI가 뭐지?" in {row["instruction"] for row in rows}
    for unseen in sources["demo_rows"].EXAMPLES:
        assert any(unseen in each for each in asked)
        assert not [row for row in rows if unseen in row["instruction"].split(": ")]


def test_enough_rows_are_held_out_whatever_the_seed(tokenizer, tmp_path):
    documents = load_documents(DATA_DEMO, Prompter(), Encoder(tokenizer, END_ID), 1024, END_ID, str(tmp_path))
    sizes = [len(split_by_content(documents, VAL_PERCENT, seed)[1]) for seed in SEEDS]
    assert min(sizes) >= 200


def first_command() -> list[str]:
    """README의 첫 명령의 플래그."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return shlex.split(re.search(r"python finetune-lora\.py(.*)", readme)[1])


def test_first_command_in_short_learns_and_says_what_it_learnt(tmp_path):
    """README의 첫 명령을 수 읽기만으로 줄인 것: 처음 보는 수를 읽게 되고, 배운 답과 다음 명령을 말한다."""
    rows = [line for line in DATA_DEMO.read_text(encoding="utf-8").splitlines() if "숫자를 읽어 줘" in line][:400]
    (tmp_path / "rows.json").write_text("\n".join(rows), encoding="utf-8")
    done = run_script("finetune-lora.py", *first_command(), "--data_path", str(tmp_path / "rows.json"), "--output_dir",
                      str(tmp_path / "run"), "--val_set_size", "15", "--cutoff_len", "128", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = record.read_run(tmp_path / "run")
    assert run["eval_loss_after"] < run["eval_loss_before"]
    exact = run["exact"]
    assert exact["rows"] >= 30
    assert exact["base"] <= 0.05 * exact["rows"] and exact["tuned"] >= 0.5 * exact["rows"], exact
    assert f"검증 질문 {exact['rows']}개 가운데 정답과 똑같은 답" in done.stdout
    scripts = {Path(name) for name in re.findall(r"다음 명령.*", done.stdout, re.DOTALL)[0].split() if ".py" in name}
    assert scripts == {ROOT / "merge-lora.py", ROOT / "generate.py"}, "다른 폴더에서 실행해도 그대로 칠 수 있다"
    assert "모범 답" in (tmp_path / "run" / "samples.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_first_command_teaches_a_skill(seed, tmp_path):
    """README의 첫 명령이 하는 약속: 처음 보는 질문에 정답과 똑같이 답하는 비율이 0에 가깝다가 90%를 넘는다."""
    done = run_script("finetune-lora.py", *first_command(), "--seed", str(seed), "--output_dir", str(tmp_path / "run"),
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    exact = record.read_run(tmp_path / "run")["exact"]
    assert exact["rows"] >= 200
    assert exact["base"] <= 0.02 * exact["rows"] and exact["tuned"] >= 0.9 * exact["rows"]
    assert f"검증 질문 {exact['rows']}개 가운데 정답과 똑같은 답" in done.stdout
    polite, meaning, number = re.findall("학습한 모델의 답: (.+)", done.stdout)[:3]
    assert (polite, number) == ("저는 어제 도서관에서 책을 읽었습니다.", "삼천사백팔십이")
    assert meaning == "AI는 사람처럼 배우고 생각하는 컴퓨터 프로그램입니다."


def test_base_predicts_korean_prose(tokenizer):
    model = load_base(BASE_DEMO, Device(torch.device("cpu"), torch.float32, "테스트"))
    text = "민수는 동생과 공원에서 자전거를 탔다. 나는 저녁에 집에서 맛있는 빵을 먹었다. 내일은 도서관에 갈 것이다."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 0.75 * math.log(len(tokenizer))
