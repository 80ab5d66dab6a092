"""합친 모델 폴더의 GGUF: 설정, 토크나이저, tensor를 llama.cpp와 Ollama가 읽는 파일로 옮긴다."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.chat_settings import CHAT
from utils.data.encoder import head_ids
from utils.errors import UsageError
from utils.merge.exportable import ARCHITECTURES, head_dim_of, import_gguf, require_exportable, rotary_share
from utils.merge.modelfile import render_modelfile
from utils.model import diskmap
from utils.model.adapter import read_prompt_info
from utils.model.folder import ModelFolder, open_model_folder
from utils.model.shards import read_whole
from utils.model.tokenizer import end_token_ids, load_tokenizer

_LARGEST_F16 = 65504.0
# 토큰을 자르는 정규식의 일부 -> llama.cpp가 그 방식을 부르는 이름
_SPLITS = (("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}", "llama-bpe"),)


@dataclass(frozen=True)
class _Tensor:
    """GGUF에 쓸 tensor 하나. `read`를 부르면 fp32 값을 준다."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Format:
    """tensor 하나를 적는 법.

    Attributes:
        kind: GGUF의 양자화.
        dtype: 파일에 적는 numpy dtype. Q8_0은 묶음의 바이트다.
        n_bytes: 모두 몇 바이트인지.
    """

    kind: int
    dtype: type
    n_bytes: int


def write(folder: Path, kind: str) -> str:
    """`folder`에 GGUF와 Modelfile을 쓴다. tensor를 하나씩 옮기므로 가장 큰 행렬 하나만 메모리에 있다.

    Args:
        kind: f16이나 q8_0. 벡터는 늘 f32로 적는다.

    Returns:
        GGUF 파일의 이름.

    Raises:
        UsageError: gguf가 설치되지 않았거나, 옮길 줄 모르는 구조나 토크나이저다.
    """
    gguf = import_gguf()
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
        form = _format(gguf, tensor.shape, kind)
        packed = form.dtype == np.uint8  # 묶음으로 적으면 마지막 축의 크기도 바이트로 말한다
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, form.kind) if packed else tensor.shape
        writer.add_tensor_info(tensor.name, shape, np.dtype(form.dtype), form.n_bytes, raw_dtype=form.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        form = _format(gguf, tensor.shape, kind)
        values = tensor.read()
        if form.dtype != np.float32 and values.abs().max() > _LARGEST_F16:
            raise UsageError(f"{tensor.name}의 값이 fp16에 담기지 않아 GGUF로 옮길 수 없다({values.abs().max():.3g})")
        writer.write_tensor_data(gguf.quants.quantize(values.numpy(), form.kind))
    writer.close()
    (folder / "Modelfile").write_text(render_modelfile(folder, path.name, tokenizer), encoding="utf-8")
    return path.name


def _add_shape(writer, config: dict) -> None:
    rope = config.get("rope_parameters") or {}
    heads, hidden, head_dim = config["num_attention_heads"], config["hidden_size"], head_dim_of(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    if config["model_type"] == "gpt_neox":
        writer.add_rope_dimension_count(int(rotary_share(config) * head_dim))
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
    if (normalizer := (tokenizer.get("normalizer") or {}).get("type")) not in (None, "NFC"):
        raise UsageError(f"글을 바꾸어 읽는 토크나이저는 GGUF로 옮길 줄 모른다(normalizer {normalizer})")
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    names = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    tokens, types = [], []
    for index in range(config["vocab_size"]):
        special = index in added and added[index].get("special")
        tokens.append(names.get(index, f"[PAD{index}]"))
        types.append(gguf.TokenType.UNUSED if index not in names else gguf.TokenType.CONTROL if special
                     else gguf.TokenType.USER_DEFINED if index in added else gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer.get("pre_tokenizer") or {}))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    ends = end_token_ids(loaded, folder)
    info = read_prompt_info(folder)  # 배운 답이 끝나는 토큰은 llama.cpp가 늘 멈추는 자리(eot)에 적는다
    learned_end = info.end_token_id if info else ends[0]
    turn_end = next((end for end in (learned_end, *ends[1:]) if end != ends[0]), None)
    special = gguf.SpecialVocab(folder, load_merges=True, special_token_types=())  # merge와 대화 템플릿을 읽는다
    pad = loaded.pad_token_id if "pad_token" in _read(folder / "tokenizer_config.json") else None
    ids = {"eos": ends[0], "eot": turn_end, "bos": loaded.bos_token_id, "pad": pad}
    special.special_token_ids = {kind: number for kind, number in ids.items() if number is not None}
    # 대화 템플릿은 글머리의 토큰을 스스로 적는다. 끝 토큰은 학습과 추론이 프롬프트에 덧붙이지 않는다
    starts = (info is None or info.template.get("name") != CHAT) and head_ids(loaded) == [loaded.bos_token_id]
    special.add_special_token = {"bos": starts, "eos": False}
    special.add_to_gguf(writer, quiet=True)


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
    """attention head마다 섞인 [heads, (q, k, v), head_dim]을 [(q, k, v), heads, head_dim]으로 놓는다.

    GPT-NeoX의 query_key_value는 weight [3 x hidden, hidden]과 bias [3 x hidden]의 행이 q0 k0 v0 q1 k1 v1 ...의 차례다.
    llama.cpp는 q가 모두 온 다음에 k, v가 온다고 본다.
    """
    def arrange(values: torch.Tensor) -> torch.Tensor:
        apart = values.view(heads, 3, -1, *values.shape[1:])  # [heads, 3, head_dim] 또는 [heads, 3, head_dim, hidden]
        return apart.transpose(0, 1).reshape(values.shape)

    return arrange


def _interleave(heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """회전하는 짝을 앞뒤 반쪽에서 이웃한 두 줄로 옮긴다. llama.cpp의 rotary가 그렇게 읽는다.

    rotary는 head_dim의 두 칸을 짝지어 돌린다. transformers의 Llama는 i와 i + head_dim / 2가 짝이고, llama.cpp는 2i와
    2i + 1이 짝이다. 그래서 행의 차례가 0, d/2, 1, d/2 + 1, ...이 되게 옮긴다. q와 k를 똑같이 옮기므로 q k^T는 그대로다.
    """
    def arrange(values: torch.Tensor) -> torch.Tensor:
        halves = values.view(heads, 2, -1, *values.shape[1:])  # [heads, 앞뒤 반쪽, head_dim / 2, hidden]
        return halves.transpose(1, 2).reshape(values.shape)

    return arrange


def _format(gguf, shape: tuple[int, ...], kind: str) -> _Format:
    """벡터는 f32, 행렬은 `kind`. Q8_0은 값 32개마다 int8 32개와 fp16 배율 하나, 곧 34바이트다."""
    types = gguf.GGMLQuantizationType
    count = math.prod(shape)
    if len(shape) == 1:
        return _Format(types.F32, np.float32, 4 * count)
    if kind == "f16" or shape[-1] % 32:
        return _Format(types.F16, np.float16, 2 * count)
    return _Format(types.Q8_0, np.uint8, count // 32 * 34)


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))
