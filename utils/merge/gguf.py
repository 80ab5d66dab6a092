"""합친 모델 폴더를 llama.cpp와 Ollama가 읽는 GGUF로 옮긴다. GPT-NeoX와 Llama 계열을 안다."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.errors import UsageError
from utils.model import diskmap
from utils.model.adapter import read_prompt_info
from utils.model.folder import ModelFolder, open_model_folder
from utils.model.shards import read_whole
from utils.model.tokenizer import end_token_ids, load_tokenizer
from utils.prompter import CHAT, Prompter

ARCHITECTURES = {"gpt_neox": "gptneox", "llama": "llama"}
# GGUF에 적거나 tensor로 나타나는 설정
_EXPRESSED = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "head_dim", "intermediate_size", "max_position_embeddings", "layer_norm_eps", "rms_norm_eps",
              "attention_bias", "mlp_bias", "tie_word_embeddings", "use_parallel_residual", "rope_parameters",
              "rope_scaling",
              "rope_theta", "rotary_pct", "rotary_emb_base", "partial_rotary_factor", "hidden_act",
              "bos_token_id", "eos_token_id", "pad_token_id"}
# 답하는 계산을 바꾸지 않는 설정
_HARMLESS = {"attention_dropout", "hidden_dropout", "classifier_dropout", "initializer_range", "use_cache", "dtype",
             "architectures", "model_type", "transformers_version", "_name_or_path", "pretraining_tp", "id2label",
             "label2id", "output_attentions", "output_hidden_states", "return_dict", "problem_type", "num_labels",
             "_attn_implementation", "torch_dtype", "chunk_size_feed_forward", "tokenizer_class"}
# llama.cpp가 이 구조에서 쓰는 활성 함수
_ACTIVATIONS = {"gpt_neox": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "llama": ("silu", "swish")}
_LARGEST_F16 = 65504.0
# 토큰을 자르는 정규식의 일부 -> llama.cpp가 그 방식을 부르는 이름
_SPLITS = (("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}", "llama-bpe"),)


@dataclass(frozen=True)
class _Tensor:
    """GGUF에 쓸 tensor 하나. `read`를 부르면 fp32 값을 준다."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def write(folder: Path, kind: str) -> str:
    """`folder`에 GGUF와 Modelfile을 쓴다. tensor를 하나씩 옮기므로 가장 큰 행렬 하나만 메모리에 있다.

    Args:
        kind: f16이나 q8_0. 벡터는 늘 f32로 적는다.

    Returns:
        GGUF 파일의 이름.

    Raises:
        UsageError: gguf가 설치되지 않았거나, 옮길 줄 모르는 구조나 토크나이저다.
    """
    gguf = _import_gguf()
    model = open_model_folder(folder)
    require_exportable(model.config)
    architecture = ARCHITECTURES[model.config["model_type"]]
    tokenizer = load_tokenizer(folder)
    name = folder.name
    path = folder / f"{name}-{kind}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    _add_shape(writer, model.config)
    _add_tokenizer(writer, gguf, folder, model.config, tokenizer)
    tensors = list(_tensors(gguf, model, architecture))
    for tensor in tensors:
        quantisation, dtype, n_bytes = _format(gguf, tensor.shape, kind)
        writer.add_tensor_info(tensor.name, tensor.shape if dtype != np.uint8 else gguf.quant_shape_to_byte_shape(
            tensor.shape, quantisation), np.dtype(dtype), n_bytes, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        quantisation, dtype, _ = _format(gguf, tensor.shape, kind)
        values = tensor.read()
        if dtype != np.float32 and values.abs().max() > _LARGEST_F16:
            raise UsageError(f"{tensor.name}의 값이 fp16에 담기지 않아 GGUF로 옮길 수 없다({values.abs().max():.3g})")
        writer.write_tensor_data(gguf.quants.quantize(values.numpy(), quantisation))
    writer.close()
    (folder / "Modelfile").write_text(render_modelfile(folder, path.name, tokenizer), encoding="utf-8")
    return path.name


def render_modelfile(folder: Path, gguf_name: str, tokenizer=None) -> str:
    """Ollama의 Modelfile. 템플릿과 멈출 토큰이 들어 있다."""
    tokenizer = tokenizer or load_tokenizer(folder)
    info = read_prompt_info(folder)
    if info is not None and info.template.get("name") == CHAT:
        form = _chat_form(tokenizer)
    else:
        form = _literal(Prompter(info.template if info else "default").prompt(_QUESTION).rstrip(" "))
    ends = [tokenizer.convert_ids_to_tokens(end) for end in end_token_ids(tokenizer, folder)]
    if info is not None and info.end_token not in ends:
        ends.insert(0, info.end_token)
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{form}"""', *(f'PARAMETER stop "{end}"' for end in ends),
             "PARAMETER temperature 0.7"]
    return "\n".join(lines) + "\n"


_QUESTION, _ANSWER, _SYSTEM = "<질문의 자리>", "<답의 자리>", "<지시의 자리>"
_SLOTS = {_QUESTION: "{{ .Prompt }}", _ANSWER: "{{ .Response }}", _SYSTEM: "{{ .System }}"}


def _literal(text: str) -> str:
    """Ollama의 템플릿으로 적은 글. 글에 든 중괄호는 글자 그대로 남는다."""
    text = text.replace("{{", '{{ "{{" }}')
    for mark, slot in _SLOTS.items():
        text = text.replace(mark, slot)
    return text


def _chat_form(tokenizer) -> str:
    """토크나이저의 대화 템플릿을 Ollama의 템플릿으로. 한 번의 주고받음을 실제로 만들어 자리를 찾는다."""
    user, system = {"role": "user", "content": _QUESTION}, {"role": "system", "content": _SYSTEM}

    def render(*turns: dict) -> str:
        """답의 자리와, 답의 뒤에 오는 끝까지."""
        asked = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        told = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": _ANSWER}], tokenize=False)
        _, found, rest = told.rpartition(_ANSWER)
        return _literal(asked + _ANSWER + (rest if found else ""))

    plain = render(user)
    try:
        told = render(system, user)
    except Exception:  # 지시를 받지 않는 템플릿은 제 방식으로 거절한다
        return plain
    return plain if _SLOTS[_SYSTEM] not in told else f"{{{{ if .System }}}}{told}{{{{ else }}}}{plain}{{{{ end }}}}"


def require_exportable(config: dict) -> None:
    """합치기 전에 옮길 수 있는 모델인지 설정의 항목마다 본다.

    Raises:
        UsageError: 모르는 구조거나, GGUF에 적을 자리가 없는 설정이 있다.
    """
    _import_gguf()
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise UsageError(f"GGUF로 옮길 줄 모르는 구조다: {kind} (아는 것: {', '.join(ARCHITECTURES)})")
    from transformers import AutoConfig

    usual = AutoConfig.for_model(kind).to_dict()
    for name, value in config.items():
        if name in usual and name not in _EXPRESSED | _HARMLESS and value != usual[name]:
            raise UsageError(f"GGUF로 옮길 줄 모르는 설정이다: {name}={value!r}")
    activation = config.get("hidden_act", usual["hidden_act"])
    if activation not in _ACTIVATIONS[kind]:
        raise UsageError(f"GGUF로 옮길 줄 모르는 활성 함수다: hidden_act={activation!r}")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise UsageError(f"GGUF로 옮길 줄 모르는 rotary 방식이다: {config.get('rope_scaling') or rope}")
    if kind == "gpt_neox" and _rotary_share(config) * _head_dim(config) % 2:
        width = _rotary_share(config) * _head_dim(config)
        raise UsageError(f"GGUF로 옮길 줄 모르는 rotary의 폭이다: {width:g}(짝수만 안다)")
    if kind == "llama" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(f"GGUF로 옮길 줄 모르는 rotary 방식이다: {rope}")


def _import_gguf():
    try:
        import gguf
    except ImportError:
        raise UsageError("GGUF를 쓰려면 gguf가 있어야 한다: python -m pip install gguf") from None
    return gguf


def _head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rotary_share(config: dict) -> float:
    rope = config.get("rope_parameters") or {}
    return rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))


def _add_shape(writer, config: dict) -> None:
    rope = config.get("rope_parameters") or {}
    heads, hidden, head_dim = config["num_attention_heads"], config["hidden_size"], _head_dim(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    if config["model_type"] == "gpt_neox":
        writer.add_rope_dimension_count(int(_rotary_share(config) * head_dim))
        writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rotary_emb_base", 10000))))
        writer.add_parallel_residual(config.get("use_parallel_residual", True))
        writer.add_layer_norm_eps(config.get("layer_norm_eps", 1e-5))
    else:
        writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
        writer.add_rope_dimension_count(head_dim)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000))))
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer, gguf, folder: Path, config: dict, loaded) -> None:
    """BPE 토크나이저를 옮긴다. 모델의 vocab이 더 크면 빈 자리를 쓰지 않는 토큰으로 채운다."""
    tokenizer = _read(folder / "tokenizer.json")
    if tokenizer.get("model", {}).get("type") != "BPE":
        raise UsageError(f"GGUF로 옮길 줄 모르는 토크나이저다: {tokenizer.get('model', {}).get('type')} (BPE만 안다)")
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    names = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    tokens, types = [], []
    for index in range(config["vocab_size"]):
        special = index in added and added[index].get("special")
        tokens.append(names.get(index, f"[PAD{index}]"))
        types.append(gguf.TokenType.UNUSED if index not in names else gguf.TokenType.CONTROL if special
                     else gguf.TokenType.USER_DEFINED if index in added else gguf.TokenType.NORMAL)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer.get("pre_tokenizer") or {}))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    ends = end_token_ids(loaded, folder)
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    if loaded.bos_token_id is not None:
        writer.add_bos_token_id(loaded.bos_token_id)
    if "pad_token" in _read(folder / "tokenizer_config.json"):
        writer.add_pad_token_id(loaded.pad_token_id)
    writer.add_add_bos_token(False)  # 학습과 추론이 프롬프트에 아무것도 덧붙이지 않는다
    writer.add_add_eos_token(False)
    if loaded.chat_template:
        writer.add_chat_template(loaded.chat_template)


def _pre_tokenizer(pre: dict) -> str:
    """글을 BPE에 넘기기 전에 자르는 방식의 llama.cpp 이름. 다른 방식이면 토큰이 달라지므로 거절한다."""
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    regexes = [str((step.get("pattern") or {}).get("Regex", "")) for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise UsageError("글 앞에 공백을 붙이는 토크나이저는 GGUF로 옮길 줄 모른다")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    for regex, name in _SPLITS:
        if kinds == ["Split", "ByteLevel"] and regexes[0].startswith(regex):
            return name
    raise UsageError(f"GGUF로 옮길 줄 모르는 토크나이저다(pre_tokenizer {kinds})")


def _tensors(gguf, model: ModelFolder, architecture: str) -> Iterator[_Tensor]:
    """쓸 tensor들. llama.cpp의 GPT-NeoX는 bias와 출력 행렬이 늘 있다고 보므로, 없으면 0과 embedding을 적는다."""
    config, disk = model.config, diskmap.read(model)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    written = {}
    for name, entry in disk.entries.items():
        if architecture == "llama" and name == "lm_head.weight" and entry.name in disk.shared:
            continue
        new_name = names.get_name(name.replace("lm_head", "embed_out") if architecture == "gptneox" else name,
                                  try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise UsageError(f"GGUF로 옮길 줄 모르는 tensor다: {name}")
        arrange = _same
        if "query_key_value" in name:
            arrange = _split_qkv(heads)
        elif architecture == "llama" and ".q_proj." in name:
            arrange = _interleave(heads)
        elif architecture == "llama" and ".k_proj." in name:
            arrange = _interleave(config.get("num_key_value_heads") or heads)
        written[new_name] = entry
        yield _Tensor(new_name, entry.shape,
                      lambda entry=entry, arrange=arrange: arrange(read_whole(entry)).float().contiguous())
    for weight, entry in written.items():
        bias = weight.removesuffix("weight") + "bias"
        if architecture == "gptneox" and "attn_" in weight and weight.endswith("weight") and bias not in written:
            yield _Tensor(bias, entry.shape[:1], lambda entry=entry: torch.zeros(entry.shape[0]))


def _same(values: torch.Tensor) -> torch.Tensor:
    return values


def _split_qkv(heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """attention head마다 섞인 [heads, (q, k, v), head_dim]을 [(q, k, v), heads, head_dim]으로 놓는다."""
    return lambda x: x.view(heads, 3, -1, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def _interleave(heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """회전하는 짝을 앞뒤 반쪽에서 이웃한 두 줄로 옮긴다. llama.cpp의 rotary가 그렇게 읽는다."""
    return lambda x: x.view(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _format(gguf, shape: tuple[int, ...], kind: str) -> tuple:
    """(GGUF의 양자화, numpy dtype, 바이트)."""
    types = gguf.GGMLQuantizationType
    count = int(np.prod(shape))
    if len(shape) == 1:
        return types.F32, np.float32, 4 * count
    if kind == "f16" or shape[-1] % 32:
        return types.F16, np.float16, 2 * count
    return types.Q8_0, np.uint8, count // 32 * 34


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))
