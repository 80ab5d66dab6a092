"""합친 모델 폴더를 llama.cpp와 Ollama가 읽는 GGUF로 옮긴다. GPT-NeoX와 Llama 계열을 안다."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from utils.errors import UsageError
from utils.lora import find_tensor
from utils.modelfolder import ModelFolder, TensorEntry, open_model_folder
from utils.prompter import Prompter
from utils.shards import read_rows

ARCHITECTURES = {"gpt_neox": "gptneox", "llama": "llama"}
_DROPPED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
# 토큰을 자르는 정규식의 일부 -> llama.cpp가 그 방식을 부르는 이름
_SPLITS = (("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}", "llama-bpe"),)


def write(folder: Path, kind: str) -> str:
    """`folder`에 GGUF와 Modelfile을 쓴다. tensor를 하나씩 옮기므로 가장 큰 행렬 하나만 메모리에 있다.

    Args:
        kind: f16이나 q8_0. 벡터는 늘 f32로 적는다.

    Returns:
        GGUF 파일의 이름.

    Raises:
        UsageError: gguf가 깔리지 않았거나, 옮길 줄 모르는 구조나 토크나이저다.
    """
    gguf = _import_gguf()
    model = open_model_folder(folder)
    architecture = _architecture(model.config)
    name = folder.name
    path = folder / f"{name}-{kind}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    _add_shape(writer, model.config)
    _add_tokenizer(writer, gguf, folder, model.config)
    tensors = list(_tensors(gguf, model, architecture))
    for new_name, entry, _ in tensors:
        quantisation, dtype, n_bytes = _format(gguf, entry, kind)
        writer.add_tensor_info(new_name, entry.shape if dtype != np.uint8 else gguf.quant_shape_to_byte_shape(
            entry.shape, quantisation), np.dtype(dtype), n_bytes, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, entry, arrange in tensors:
        quantisation, _, _ = _format(gguf, entry, kind)
        values = arrange(read_rows(entry, 0, entry.shape[0])).float().numpy()
        writer.write_tensor_data(gguf.quants.quantize(values, quantisation))
    writer.close()
    (folder / "Modelfile").write_text(render_modelfile(folder, path.name), encoding="utf-8")
    return path.name


def render_modelfile(folder: Path, gguf_name: str) -> str:
    """Ollama의 Modelfile. 템플릿과 멈출 토큰이 들어 있다."""
    from utils.loader import read_prompt_info

    info = read_prompt_info(folder)
    end = info.end_token if info else _read(folder / "tokenizer_config.json").get("eos_token", "<|endoftext|>")
    if isinstance(end, dict):
        end = end["content"]
    lines = [f"FROM ./{gguf_name}", f'PARAMETER stop "{end}"', "PARAMETER temperature 0.7"]
    if info is None or "prompt_no_input" in info.template:
        form = Prompter(info.template if info else "default").prompt("{{ .Prompt }}").rstrip(" ")
        lines.insert(1, f'TEMPLATE """{form}"""')
    return "\n".join(lines) + "\n"


def require_exportable(config: dict) -> None:
    """합치기 전에 옮길 수 있는 모델인지 본다."""
    _import_gguf()
    _architecture(config)


def _import_gguf():
    try:
        import gguf
    except ImportError:
        raise UsageError("GGUF를 쓰려면 gguf가 있어야 한다: python -m pip install gguf") from None
    return gguf


def _architecture(config: dict) -> str:
    if config["model_type"] not in ARCHITECTURES:
        raise UsageError(f"GGUF로 옮길 줄 모르는 구조다: {config['model_type']} (아는 것: {', '.join(ARCHITECTURES)})")
    return ARCHITECTURES[config["model_type"]]


def _add_shape(writer, config: dict) -> None:
    rope = config.get("rope_parameters") or {}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise UsageError(f"GGUF로 옮길 줄 모르는 rotary 방식이다: {rope or config.get('rope_scaling')}")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    if config["model_type"] == "gpt_neox":
        fraction = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
        writer.add_rope_dimension_count(int(fraction * head_dim))
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


def _add_tokenizer(writer, gguf, folder: Path, config: dict) -> None:
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
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


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


def _tensors(gguf, model: ModelFolder, architecture: str) -> Iterator[tuple[str, TensorEntry, Callable]]:
    """(GGUF의 이름, tensor, 행의 차례를 바꾸는 함수)."""
    config = model.config
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    for entry in model.tensors.values():
        if entry.name.endswith(_DROPPED):
            continue
        new_name = names.get_name(entry.name.replace("lm_head", "embed_out") if architecture == "gptneox"
                                  else entry.name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise UsageError(f"GGUF로 옮길 줄 모르는 tensor다: {entry.name}")
        arrange = _same
        if "query_key_value" in entry.name:
            arrange = _split_qkv(heads)
        elif architecture == "llama" and ".q_proj." in entry.name:
            arrange = _interleave(heads)
        elif architecture == "llama" and ".k_proj." in entry.name:
            arrange = _interleave(config.get("num_key_value_heads") or heads)
        yield new_name, entry, arrange
    if not config.get("tie_word_embeddings") and find_tensor(model.tensors, "lm_head.weight") is None:
        raise UsageError(f"{model.path}에 출력 행렬이 없다")


def _same(values: torch.Tensor) -> torch.Tensor:
    return values


def _split_qkv(heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """머리마다 섞인 [heads, (q, k, v), head_dim]을 [(q, k, v), heads, head_dim]으로 놓는다."""
    return lambda x: x.view(heads, 3, -1, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def _interleave(heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """회전하는 짝을 앞뒤 반쪽에서 이웃한 두 줄로 옮긴다. llama.cpp의 rotary가 그렇게 읽는다."""
    return lambda x: x.view(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _format(gguf, entry: TensorEntry, kind: str) -> tuple:
    """(GGUF의 양자화, numpy dtype, 바이트)."""
    types = gguf.GGMLQuantizationType
    count = int(np.prod(entry.shape))
    if len(entry.shape) == 1:
        return types.F32, np.float32, 4 * count
    if kind == "f16" or entry.shape[-1] % 32:
        return types.F16, np.float16, 2 * count
    return types.Q8_0, np.uint8, count // 32 * 34


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))
