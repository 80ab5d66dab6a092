"""config.json과 어긋나는 가중치는 한 바이트도 읽기 전에 거절되고, 성한 모델은 어떤 구조든 거절되지 않는다."""

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_architectures import TARGETS, build_model
from tiny import build_neox, write_shards

from utils.environment import peak_ram_bytes
from utils.errors import UsageError
from utils.model.folder import open_model_folder
from utils.model.loader import require_base

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 300}
GATED = {**SMALL, "intermediate_size": 128, "num_key_value_heads": 1}
KINDS = {  # 올릴 때 이름을 바꾸거나, 전문가를 합치거나, head를 묶는 구조들
    "bloom": {"n_layer": 2, "hidden_size": 64, "n_head": 2, "vocab_size": 300},
    "falcon": SMALL,
    "mixtral": {**GATED, "num_local_experts": 4},
    "qwen3_moe": {**GATED, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    "phi3": {**GATED, "pad_token_id": 0},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    from transformers import AutoConfig, AutoModelForCausalLM

    place = tmp_path_factory.mktemp("models")
    built = {kind: build_model(kind, place / kind) for kind in TARGETS}
    for kind, sizes in KINDS.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        model.to(torch.float16).save_pretrained(place / kind)
        built[kind] = place / kind
    return {**built, "gpt_neox": build_neox(place / "gpt_neox"), "demo": ROOT / "resources" / "polyglot-ko-demo"}


@pytest.mark.parametrize("kind", [*TARGETS, *KINDS, "gpt_neox", "demo"])
def test_good_model_is_never_refused(models, kind):
    assert require_base(models[kind])["model_type"]


def changed(model: Path, folder: Path, **values) -> Path:
    """설정만 바꾼 모델. 가중치는 그대로다."""
    folder.mkdir(parents=True)
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **values}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_neox"])
def test_every_kind_of_mismatch_is_one_line(models, kind, tmp_path):
    layers, hidden = ("n_layer", "n_embd") if kind == "gpt2" else ("num_hidden_layers", "hidden_size")
    wrongs = [{layers: 3}, {layers: 10**9}, {layers: 1e30}, {hidden: 96}, {hidden: 10**12}, {hidden: "x"},
              {hidden: None}, {hidden: -4}, {"vocab_size": 7}, {"vocab_size": 10**18}, {"model_type": "없다"},
              {"model_type": "bert"}, {"layer_types": ["없다"]}, {"num_attention_heads": 0}]
    for n, wrong in enumerate(wrongs):
        folder = changed(models[kind], tmp_path / str(n), **wrong)
        with pytest.raises(UsageError, match=r"config\.json") as refused:
            require_base(folder)
        assert str(folder) in str(refused.value) and "\n" not in str(refused.value), wrong


def test_of_one_file_and_shards_the_one_that_transformers_reads_is_read(models, tmp_path):
    folder = changed(models["llama"], tmp_path / "both", quantization_config=None)
    write_shards(folder, {"다른 것": torch.zeros(2)}, 2)
    assert require_base(folder)
    assert open_model_folder(folder).shards == [folder / "model.safetensors"]


def test_the_tensor_and_both_shapes_are_named(models, tmp_path):
    folder = changed(models["gpt_neox"], tmp_path / "wide", vocab_size=999)
    with pytest.raises(UsageError, match=r"embed.*weight.*999 x 64"):
        require_base(folder)


def write_polyglot(folder: Path, **changes) -> Path:
    """polyglot-ko-1.3b와 모양과 이름이 같은 2.6 GB의 빈 파일(디스크를 차지하지 않는다)."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    folder.mkdir()
    sizes = {"vocab_size": 30080, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
             "intermediate_size": 8192, "tie_word_embeddings": False}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**sizes))
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[name.replace("lm_head", "embed_out")] = {"dtype": "F16", "shape": list(tensor.shape),
                                                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    GPTNeoXConfig(**{**sizes, **changes}).save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="빈 자리를 쓰지 않는 파일은 Linux에서 만든다")
def test_large_model_is_judged_from_its_headers_alone(tmp_path):
    good, bad = write_polyglot(tmp_path / "good"), write_polyglot(tmp_path / "bad", hidden_size=2560)
    require_base(good)  # transformers를 불러온 다음의 메모리를 잰다
    memory = peak_ram_bytes()
    require_base(good)
    with pytest.raises(UsageError, match="2560"):
        require_base(bad)
    assert peak_ram_bytes() - memory < 100e6
