"""GGUF의 약속: llama.cpp가 transformers와 같은 토큰으로 답한다. xllamacpp가 설치된 곳에서만 답까지 비교한다."""

import json
import re
import shutil
import urllib.request

import pytest
import torch
from tiny import build_neox

from utils.errors import UsageError
from utils.merge.exportable import require_exportable
from utils.merge.gguf import _pre_tokenizer, write
from utils.merge.modelfile import _chat_form, _literal, render_modelfile
from utils.paths import BASE_DEMO

gguf = pytest.importorskip("gguf", reason="gguf가 설치되지 않았다")

TIE = 0.01
PROMPTS = [f"### 질문: {question}\n\n### 답변:" for question in (
    "한국의 수도는 어디인가?", "물은 몇 도에서 끓나?", "1 더하기 1은?", "봄에 피는 꽃은?", "세종대왕은 누구인가?",
    "컴퓨터가 뭐지?", "딥러닝이 뭐야?", "비가 오는 이유은?", "김치는 어떻게 담그나?", "하늘은 왜 파란가?",
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
    reader = gguf.GGUFReader(folder / write(folder, kind))
    written = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    assert len(written) == len(state)
    embedding = next(tensor for name, tensor in state.items() if "embed" in name and "out" not in name)
    gap = torch.from_numpy(written["token_embd.weight"].copy()).float() - embedding.float()
    assert gap.abs().max() <= (0 if kind == "f16" else embedding.float().abs().max() / 250)


def expected_tensors(folder) -> dict:
    """llama.cpp가 읽는 이름과 순서로 놓은 가중치. 읽는 법은 llama.cpp의 그래프에서 왔다.

    GPT-NeoX의 q, k, v는 head마다 섞여 있고 llama.cpp는 q 전부, k 전부, v 전부를 읽는다. Llama의 rotary는 반으로
    나눈 두 칸을 돌리고 llama.cpp는 이웃한 두 칸을 돌리므로, q와 k의 head 안에서 i째와 i + d/2째 행이 이웃이 된다.
    """
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    found = {}
    for name, tensor in state.items():
        if "query_key_value" in name:
            size = len(tensor) // heads // 3
            order = [head * 3 * size + part * size + row for part in range(3) for head in range(heads)
                     for row in range(size)]
        elif "self_attn.q_proj" in name or "self_attn.k_proj" in name:
            count = heads if "q_proj" in name else groups
            size = len(tensor) // count
            order = [head * size + half * size // 2 + row for head in range(count) for row in range(size // 2)
                     for half in range(2)]
        else:
            order = list(range(len(tensor)))
        found[name] = tensor[order].float()
    return found


NAMES = {  # 폴더의 이름 -> GGUF의 이름
    "gpt_neox.embed_in": "token_embd", "embed_out": "output", "lm_head": "output",
    "gpt_neox.final_layer_norm": "output_norm", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down"}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    layer = re.search(r"layers\.(\d+)\.(.+)", stem)
    return f"blk.{layer[1]}.{NAMES[layer[2]]}.{kind}" if layer else f"{NAMES[stem]}.{kind}"


@pytest.mark.parametrize("family", ["neox", "llama"])
def test_every_tensor_holds_the_values_in_the_order_that_llama_cpp_reads(request, family):
    folder = request.getfixturevalue(family)
    reader = gguf.GGUFReader(folder / write(folder, "f16"))
    written = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    expected = {gguf_name(name): tensor for name, tensor in expected_tensors(folder).items()}
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(torch.from_numpy(written[name].copy()).float().reshape(tensor.shape), tensor), name


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """함께 든, 끝까지 배운 GPT-NeoX."""
    return shutil.copytree(BASE_DEMO, tmp_path_factory.mktemp("gguf") / "demo")


def reshaped(neox, llama, folder, kind: str, **changes):
    """설정을 바꾼 작은 모델. 무작위 가중치는 답이 한쪽으로 뚜렷하게 갈리도록 크게 잡는다."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = neox if kind == "gpt_neox" else llama
    config = AutoConfig.from_pretrained(source)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.15)
    model.half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["demo", "neox", "llama"])
def test_llama_cpp_answers_with_the_same_tokens(request, family, kind):
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp가 설치되지 않았다")
    folder = request.getfixturevalue(family)
    compare(xllamacpp, folder, folder / write(folder, kind), exact=kind == "f16")


@pytest.mark.parametrize(("kind", "changes"), [
    ("gpt_neox", {"attention_bias": False}),
    ("gpt_neox", {"tie_word_embeddings": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}),
    ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}}),
    ("gpt_neox", {"layer_norm_eps": 1e-2, "hidden_act": "gelu_pytorch_tanh"}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"head_dim": 32, "rms_norm_eps": 1e-2}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
])
def test_every_setting_reaches_llama_cpp(neox, llama, tmp_path, kind, changes):
    folder = reshaped(neox, llama, tmp_path / "model", kind, **changes)
    written = folder / write(folder, "f16")
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp가 설치되지 않았다")
    compare(xllamacpp, folder, written, n_prompts=4)


@pytest.mark.parametrize(("kind", "changes", "named"), [
    ("gpt_neox", {"hidden_act": "relu"}, "relu"),
    ("gpt_neox", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
    ("gpt_neox", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.1}}, "폭"),
    ("gpt_neox", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama", {"hidden_act": "gelu"}, "gelu"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}}, "llama3"),
])
def test_settings_that_gguf_cannot_say_are_refused_by_name(neox, llama, kind, changes, named):
    config = json.loads(((neox if kind == "gpt_neox" else llama) / "config.json").read_text(encoding="utf-8"))
    require_exportable(config)
    with pytest.raises(UsageError, match=named):
        require_exportable({**config, **changes})


def ask(server, request: dict) -> dict:
    """llama.cpp의 서버에 묻는다. 토큰의 번호를 주는 것은 /completion뿐이다."""
    where = f"{server.listening_address}/completion"
    body = urllib.request.Request(where, json.dumps(request).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(body, timeout=60) as reply:
        return json.load(reply)


def compare(xllamacpp, folder, gguf_path, n_new: int = 16, n_prompts: int = len(PROMPTS), exact: bool = True) -> None:
    """질문마다 두 쪽이 탐욕적으로 고른 토큰이 모두 같은지 본다.

    llama.cpp는 KV cache를 fp16으로 두므로, logit이 `TIE`보다 덜 벌어진 두 토큰 가운데서는 다른 쪽을 고르기도 한다.

    Args:
        exact: False면(8비트) 글을 같은 토큰으로 자르고 첫 토큰을 대개 같게 고르는지만 본다.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(gguf_path), 256, 1, False
    settings.cpuparams.n_threads = 1
    server = xllamacpp.Server(settings)
    request = {"temperature": 0, "return_tokens": True, "cache_prompt": False, "ignore_eos": True,
               "n_predict": n_new if exact else 1}
    agreed = 0
    for prompt in PROMPTS[:n_prompts]:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = ask(server, {**request, "prompt": ids})["tokens"]
        written = ask(server, {**request, "prompt": prompt})
        assert written["tokens"] == answer and written["tokens_evaluated"] == len(ids)
        banned = [[end] for end in tokenizer.all_special_ids]  # ignore_eos는 끝 토큰을 고르지 못하게 한다
        expected = model.generate(torch.tensor([ids]), max_new_tokens=len(answer), do_sample=False, eos_token_id=-1,
                                  pad_token_id=0, bad_words_ids=banned)[0, len(ids):].tolist()
        agreed += answer == expected
        if exact and answer != expected:
            at = next(i for i, pair in enumerate(zip(answer, expected, strict=True)) if len(set(pair)) == 2)
            with torch.no_grad():
                logits = model(torch.tensor([ids + expected[:at]])).logits[0, -1]
            assert logits[expected[at]] - logits[answer[at]] < TIE
    assert agreed >= 0.7 * n_prompts


def test_modelfile_carries_template_and_stop(neox):
    text = render_modelfile(neox, "m.gguf")
    assert "FROM ./m.gguf" in text and 'stop "<|endoftext|>"' in text
    system = "{{ if .System }}{{ .System }}\n\n{{ end }}"
    assert f'TEMPLATE """### 질문: {system}{{{{ .Prompt }}}}\n\n### 답변:"""' in text


def test_unknown_kinds_are_refused_by_name(neox):
    with pytest.raises(UsageError, match="gpt2"):
        require_exportable({"model_type": "gpt2"})
    tokenizer = json.loads((neox / "tokenizer.json").read_text(encoding="utf-8"))
    assert _pre_tokenizer(tokenizer["pre_tokenizer"]) == "gpt-2"
    with pytest.raises(UsageError, match="Whitespace"):
        _pre_tokenizer({"type": "Whitespace"})


def test_a_tokenizer_that_rewrites_the_text_is_refused(neox, tmp_path):
    """llama.cpp의 BPE는 글을 바꾸지 않고 읽으므로 토큰이 달라진다."""
    folder = shutil.copytree(neox, tmp_path / "nfkc")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**content, "normalizer": {"type": "NFKC"}}), encoding="utf-8")
    with pytest.raises(UsageError, match="NFKC"):
        write(folder, "f16")


CHATML = ("{% for m in messages %}"
          "{{ '<|sep|>' + m['role'] + '\\n' + m['content'] + '<|endoftext|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|sep|>assistant\\n' }}{% endif %}")


def test_chat_template_bos_and_every_end_are_carried(neox, tmp_path):
    from transformers import AutoTokenizer

    from utils.model.adapter import PromptInfo, write_prompt_info

    folder = shutil.copytree(neox, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.bos_token = CHATML, "<|unused1|>"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}', encoding="utf-8")
    write_prompt_info(folder, PromptInfo({"name": "chat"}, "<|endoftext|>", 2, 64))
    reader = gguf.GGUFReader(folder / write(folder, "f16"))
    fields = {name: reader.fields[f"tokenizer.{name}"].contents() for name in (
        "chat_template", "ggml.bos_token_id", "ggml.eos_token_id", "ggml.eot_token_id", "ggml.add_bos_token")}
    assert fields == {"chat_template": CHATML, "ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.eot_token_id": 3,
                      "ggml.add_bos_token": False}
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop "<|endoftext|>"' in text and 'PARAMETER stop "<|sep|>"' in text
    told = "<|sep|>user\n{{ .Prompt }}<|endoftext|>\n<|sep|>assistant\n{{ .Response }}<|endoftext|>\n"
    system = "<|sep|>system\n{{ .System }}<|endoftext|>\n"
    assert f'TEMPLATE """{{{{ if .System }}}}{system}{told}{{{{ else }}}}{told}{{{{ end }}}}"""' in text


@pytest.mark.parametrize("template, starts", [({"name": "chat"}, False), (None, True)])
def test_the_head_of_the_text_is_left_to_llama_cpp(neox, tmp_path, template, starts):
    """글머리의 토큰은 llama.cpp가 붙인다. 대화 템플릿은 스스로 적으므로 붙이지 않게 한다."""
    from tiny import add_head
    from transformers import AutoTokenizer

    from utils.model.adapter import PromptInfo, write_prompt_info

    folder = shutil.copytree(neox, tmp_path / "headed")
    tokenizer = add_head(AutoTokenizer.from_pretrained(folder))
    tokenizer.chat_template, tokenizer.bos_token = CHATML, "<|unused1|>"
    tokenizer.save_pretrained(folder)
    if template:
        write_prompt_info(folder, PromptInfo(template, "<|endoftext|>", 2, 64))
    reader = gguf.GGUFReader(folder / write(folder, "f16"))
    assert reader.fields["tokenizer.ggml.add_bos_token"].contents() is starts


def test_a_template_that_refuses_a_system_turn_is_carried_without_it(neox, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(neox)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refusal + CHATML
    assert _chat_form(tokenizer, {}).startswith("<|sep|>user\n{{ .Prompt }}")


def test_the_modelfile_asks_with_the_thinking_that_was_learned(neox):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(neox)
    tokenizer.chat_template = CHATML + "{% if enable_thinking is false and add_generation_prompt %}<>{% endif %}"
    asked = "<|sep|>user\n{{ .Prompt }}<|endoftext|>\n<|sep|>assistant\n"
    assert f"{asked}<>{{{{ .Response }}}}" in _chat_form(tokenizer, {"enable_thinking": False})
    assert f"{asked}{{{{ .Response }}}}" in _chat_form(tokenizer, {})


def test_braces_of_a_template_stay_letters(neox):
    assert _literal("{{x}} <질문의 자리>") == '{{ "{{" }}x}} {{ .Prompt }}'


def test_published_neox_is_exported_without_its_masks(tmp_path):
    from tiny import published_neox

    folder = published_neox(tmp_path / "base", torch.float16, 2)
    reader = gguf.GGUFReader(folder / write(folder, "f16"))
    assert not [tensor.name for tensor in reader.tensors if "mask" in tensor.name or "inv_freq" in tensor.name]
    assert len(reader.tensors) == 28
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 2


def test_values_beyond_fp16_are_refused(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(llama, tmp_path / "llama")
    state = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="fp16"):
        write(folder, "f16")
