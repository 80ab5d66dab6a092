"""테스트가 함께 쓰는 작은 진짜 모델들: 공개된 폴더의 모양을 그대로 지닌다. 가중치는 무작위다."""

import json
from pathlib import Path

import torch
from conftest import build_tokenizer
from safetensors.torch import load_file, save_file

NEOX_MASKED = -1e9  # 2022년의 변환기가 mask 자리에 적던 값. fp16에 담으면 -inf다


def published_neox(folder: Path, dtype: torch.dtype = torch.float16, shards: int = 1, *, layers: int = 2,
                   hidden: int = 64, heads: int = 2, context: int = 128, seed: int = 0) -> Path:
    """2022년의 변환기가 쓴 polyglot-ko 폴더의 모양.

    가중치 곁에 층마다 mask(bool 삼각형, 스칼라)와 rotary의 주파수가 있다. 출력 행렬의 이름은 `embed_out`이다.
    vocab은 토크나이저보다 크다. config.json의 eos는 0인데 토크나이저의 것은 2다. 설정의 이름도 그때의 것이다.

    Args:
        dtype: 가중치의 dtype. mask의 스칼라와 주파수도 이것이다.
        shards: 나누어 담을 파일의 수. 1이면 index가 없다.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocab = -(-(len(build_tokenizer(folder)) + 1) // 128) * 128
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, rotary_pct=0.5, max_position_embeddings=context, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False)).to(dtype)
    state = {name.replace("lm_head.", "embed_out."): value.contiguous() for name, value in model.state_dict().items()}
    rotary = hidden // heads // 2
    for layer in range(layers):
        place = f"gpt_neox.layers.{layer}.attention"
        state[f"{place}.bias"] = torch.ones(1, 1, context, context, dtype=torch.bool).tril()
        state[f"{place}.masked_bias"] = torch.tensor(NEOX_MASKED).to(dtype)
        state[f"{place}.rotary_emb.inv_freq"] = (10000 ** (-torch.arange(0, rotary, 2) / rotary)).to(dtype)
    config = {"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
              "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": 4 * hidden,
              "layer_norm_eps": 1e-5, "max_position_embeddings": context, "model_type": "gpt_neox",
              "num_attention_heads": heads, "num_hidden_layers": layers, "num_steps": "global_step320000",
              "rotary_emb_base": 10000, "rotary_pct": 0.5, "tie_word_embeddings": False,
              "torch_dtype": str(dtype).removeprefix("torch."), "transformers_version": "4.23.1", "use_cache": True,
              "use_parallel_residual": True, "vocab_size": vocab}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_shards(folder, state, shards)
    return folder


def write_shards(folder: Path, state: dict[str, torch.Tensor], shards: int = 1) -> None:
    """이름을 바꾸지 않고 `shards`개의 파일에 나누어 쓴다."""
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(state)
    files = {name: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors"
             for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def rename_tensors(folder: Path, rename) -> None:
    """파일 하나짜리 모델의 tensor의 이름을 바꾼다."""
    state = load_file(folder / "model.safetensors")
    save_file({rename(name): value for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"})


def tiny_model(folder: Path, kind: str, dtype: torch.dtype = torch.float16, seed: int = 0, **changes) -> Path:
    """구조의 이름마다 가장 작은 모델 하나. `changes`는 설정을 고친다."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocab = len(build_tokenizer(folder)) + 5
    common = {"vocab_size": vocab, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
              "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 2}
    settings = {
        "gpt2": {"vocab_size": vocab, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 2,
                 "eos_token_id": 2},
        "bloom": {"vocab_size": vocab, "hidden_size": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 2,
                  "eos_token_id": 2, "pad_token_id": 2},
        "mixtral": {**common, "num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {**common, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "gemma3": {"text_config": common, "mm_tokens_per_image": 4, "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 16}},
    }.get(kind, common)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**settings, **changes}))
    model.to(dtype).save_pretrained(folder)
    return folder
