"""기반 모델을 올리는 일."""

import shutil

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file, save_file
from tiny import build_neox

from utils.errors import UsageError
from utils.model import loader
from utils.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("width", "named"), [(64, []), (48, [48])])
def test_widths_that_the_cpu_reads_wrongly_are_named(width, named, tmp_path):
    """NF4의 표와 블록의 배율로 손수 편 값과 다른 폭만 든다."""
    model = loader.load_base(build_neox(tmp_path, hidden=width), loader.Device(torch.device("cpu"), torch.float32, ""),
                             "4bit")
    weight = model.gpt_neox.layers[0].attention.query_key_value.weight
    state, codes = weight.quant_state, weight.data.flatten()
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    chosen = state.code[torch.stack([codes >> 4, codes & 15], 1).flatten().long()]
    by_hand = (chosen.view(-1, state.blocksize) * scales[:, None]).view(state.shape)
    assert torch.allclose(bnb.dequantize_4bit(weight.data, state), by_hand, atol=1e-6) is (not named)
    assert loader.inexact_widths(model) == named


def test_a_model_without_its_tokenizer_is_refused(tmp_path, tiny_neox):
    """transformers는 파일이 없으면 낱말이 없는 토크나이저를 만든다."""
    folder = shutil.copytree(tiny_neox, tmp_path / "base")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UsageError, match="토크나이저.*가 없다"):
        load_tokenizer(folder)


@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_a_base_model_with_a_nan_is_refused_by_the_name_of_the_weight(quantize, tmp_path):
    folder = build_neox(tmp_path)
    state = load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    state[name][3, 5] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"NaN이나 inf가 들어 있다: .*{name}"):
        loader.load_base(folder, loader.Device(torch.device("cpu"), torch.float32, ""), quantize)
