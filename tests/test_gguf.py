"""GGUF의 약속: llama.cpp가 transformers와 같은 토큰으로 답한다. llama-cpp-python이 깔린 곳에서만 답까지 견준다."""

import json
import shutil

import pytest
import torch
from conftest import build_neox

from utils import gguf_export
from utils.errors import UsageError
from utils.paths import BASE_DEMO

gguf = pytest.importorskip("gguf", reason="gguf가 깔리지 않았다")

TIE = 0.01
PROMPTS = [f"### 질문: {question}\n\n### 답변:" for question in (
    "한국의 수도는 어디인가?", "물은 몇 도에서 끓나?", "1 더하기 1은?", "봄에 피는 꽃은?", "세종대왕은 누구인가?",
    "컴퓨터가 뭐지?", "딥러닝이 뭐야?", "비가 오는 까닭은?", "김치는 어떻게 담그나?", "하늘은 왜 파란가?",
    "달은 왜 모양이 바뀌나?", "태극기의 뜻은?", "서울에서 부산까지 얼마나 걸리나?", "건강에 좋은 음식은?",
    "잠을 잘 자는 법은?", "책을 읽으면 좋은 점은?", "3 곱하기 7은?", "지구는 왜 둥근가?",
    "감기에 걸리면?", "변호사는?")]


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    """무작위 가중치는 답이 한쪽으로 뚜렷하게 갈리도록 크게 잡는다."""
    from transformers import AutoModelForCausalLM

    folder = build_neox(tmp_path_factory.mktemp("gguf") / "neox", layers=2, hidden=64, heads=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.15)
    model.half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(neox, tmp_path_factory):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("gguf") / "llama"
    tokenizer = AutoTokenizer.from_pretrained(neox)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer) + 5, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=2,
        initializer_range=0.15, tie_word_embeddings=False))
    model.half().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["neox", "llama"])
def test_every_tensor_is_there_and_close(request, family, kind):
    folder = request.getfixturevalue(family)
    reader = gguf.GGUFReader(folder / gguf_export.write(folder, kind))
    written = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    assert len(written) == len(state)
    embedding = next(tensor for name, tensor in state.items() if "embed" in name and "out" not in name)
    gap = torch.from_numpy(written["token_embd.weight"].copy()).float() - embedding.float()
    assert gap.abs().max() <= (0 if kind == "f16" else embedding.float().abs().max() / 250)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """함께 든, 끝까지 배운 GPT-NeoX."""
    return shutil.copytree(BASE_DEMO, tmp_path_factory.mktemp("gguf") / "demo")


@pytest.mark.parametrize("family", ["demo", "neox", "llama"])
def test_llama_cpp_answers_with_the_same_tokens(request, family):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python이 깔리지 않았다")
    folder = request.getfixturevalue(family)
    compare(llama_cpp, folder, folder / gguf_export.write(folder, "f16"))


def compare(llama_cpp, folder, gguf_path, n_new: int = 24) -> None:
    """질문 20개에 두 쪽이 탐욕적으로 고른 토큰이 모두 같은지 본다.

    llama.cpp는 KV cache를 fp16으로 두므로, logit이 `TIE`보다 덜 벌어진 두 토큰 가운데서는 다른 쪽을 고르기도 한다.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    other = llama_cpp.Llama(str(gguf_path), n_ctx=256, n_threads=1, verbose=False)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        assert other.tokenize(prompt.encode(), add_bos=False, special=False) == ids
        expected = model.generate(torch.tensor([ids]), max_new_tokens=n_new, do_sample=False, eos_token_id=-1,
                                  pad_token_id=0)[0, len(ids):].tolist()
        other.reset()
        answer = []
        for token in other.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            answer.append(token)
            if len(answer) == n_new:
                break
        if answer != expected:
            at = next(i for i, pair in enumerate(zip(answer, expected, strict=True)) if len(set(pair)) == 2)
            with torch.no_grad():
                logits = model(torch.tensor([ids + expected[:at]])).logits[0, -1]
            assert logits[expected[at]] - logits[answer[at]] < TIE


def test_modelfile_carries_template_and_stop(neox):
    text = gguf_export.render_modelfile(neox, "m.gguf")
    assert "FROM ./m.gguf" in text and 'stop "<|endoftext|>"' in text
    assert 'TEMPLATE """### 질문: {{ .Prompt }}\n\n### 답변:"""' in text


def test_unknown_kinds_are_refused_by_name(neox):
    with pytest.raises(UsageError, match="gpt2"):
        gguf_export.require_exportable({"model_type": "gpt2"})
    tokenizer = json.loads((neox / "tokenizer.json").read_text(encoding="utf-8"))
    assert gguf_export._pre_tokenizer(tokenizer["pre_tokenizer"]) == "gpt-2"
    with pytest.raises(UsageError, match="Whitespace"):
        gguf_export._pre_tokenizer({"type": "Whitespace"})
