"""작지만 진짜인 모델: 한국어 글로 학습한 토크나이저와, transformers가 아는 어떤 구조든 작게 만든 무작위 폴더."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SPECIAL = ["<|unused0|>", "<|unused1|>", "<|endoftext|>", "<|sep|>"]
END = 2
CONTEXT = 56
TEXT = """\
### 질문: 하늘은 왜 파란가요?

### 답변: 햇빛이 공기를 지날 때 파란 빛이 더 많이 흩어지기 때문입니다.
### 질문: 물은 몇 도에서 끓나요?

### 답변: 바다 높이에서는 섭씨 100도에서 끓습니다. 높은 산에서는 더 낮은 온도에서 끓습니다.
### 질문: 3 더하기 4는 얼마인가요?

### 답변: 3에 4를 더하면 7입니다.
### 질문: 한글은 누가 만들었나요?

### 답변: 세종대왕이 1443년에 만들어 1446년에 널리 알렸습니다.
### 질문: 가을에 나뭇잎의 색이 바뀌는 이유을 알려 주세요.

### 답변: 날이 추워지면 잎의 초록 색소가 먼저 사라지고, 가려져 있던 노란 색소와 붉은 색소가 드러납니다.
### 질문: 아침에 일찍 일어나는 방법이 있을까요?

### 답변: 잠자리에 드는 시간을 먼저 앞당기고, 일어나자마자 햇빛을 보는 것이 좋습니다.
### 질문: 김치는 어떻게 보관하나요?

### 답변: 공기가 닿지 않게 눌러 담고 차가운 곳에 둡니다. 온도가 자주 바뀌면 빨리 십니다.
### 질문: 컴퓨터가 느려졌을 때 무엇을 먼저 보아야 하나요?

### 답변: 메모리와 디스크의 남은 공간을 먼저 보고, 쓰지 않는 프로그램을 닫습니다.
"""

NEOX_MASKED = -1e9  # 2022년의 변환기가 mask 자리에 적던 값. fp16에 담으면 -inf다
WIDTH, HEADS, KV_HEADS, HEAD, INNER = 64, 4, 2, 16, 128
# 설정의 이름 -> 작은 값. 구조가 그 이름을 쓸 때만 적는다.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "embedding_dim", "emb_dim",
                     "word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width",
                     "attention_hidden_size", "backbone_hidden_size"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
                     "encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads",
                     "num_decoder_attention_heads", "swa_num_attention_heads", "linear_num_heads",
                     "linear_num_value_heads", "num_query_groups", "index_n_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads"),
                    KV_HEADS),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "kv_channels", "dim_head", "d_head", "v_head_dim",
                     "qk_nope_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim",
                     "index_head_dim", "attention_head_size", "rotary_dim", "mamba_d_head", "mamba_head_dim",
                     "q_lora_rank", "kv_lora_rank", "o_lora_rank", "lora_rank", "gated_norm_rank", "loop_gate_rank",
                     "laurel_rank", "adapter_rank", "time_step_rank", "mamba_dt_rank", "router_hidden_size",
                     "hidden_size_per_layer_input", "d_rel", "hc_lowrank", "ple_embed_dim"), HEAD),
    "qk_rope_head_dim": 8, "qk_head_dim": 24,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "dff",
                     "dim_ff", "d_inner", "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size",
                     "mamba_d_ssm"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
                     "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size",
                     "expert_ffn_hidden_size", "prompt_mid_dim"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "zero_expert_num"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts",
                     "moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index",
                     "mamba_n_groups", "mamba_ngroups", "n_groups", "o_groups"), 1),
    "num_nextn_predict_layers": 0, "num_kv_shared_layers": 0, "num_mtp_modules": 0, "moe_layer_end_index": 1,
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size",
                     "attention_chunk_size", "local_attention", "keep_window_size"), 16),
    "index_topk": 64,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length",
                     "context_length", "max_target_positions", "original_max_position_embeddings"), CONTEXT),
    "unk_token_id": 0, "cls_token_id": 1, "mask_token_id": 1, "forced_eos_token_id": None, "decoder_start_token_id": 2,
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
          "num_encoder_layers", "num_decoder_layers", "num_blocks")
# 이름만으로는 알 수 없는 것. "start"는 기본 설정을 만들 때부터, "fields"는 줄인 다음에 적는다.
ODD: dict[str, dict] = {
    "bamba": {"fields": {"attn_layer_indices": [1]}},
    "cohere_compass_text": {"fields": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                            "full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}},
    "dbrx": {"start": {"attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0},
                       "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 32, "moe_num_experts": 4,
                                      "moe_top_k": 2}}},
    "deepseek_v2": {"start": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1}},
    "dory": {"fields": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                        "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1}},
    "dots1": {"start": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
                        "topk_group": 1}},
    "gemma4_assistant": {"start": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
                                                    "vocab_size_per_layer_input": 0}}},
    "gpt_neox": {"fields": {"num_attention_heads": 2, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}},
    "granitemoehybrid": {"fields": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}},
    "hunyuan_v1_moe": {"fields": {"moe_topk": 2, "num_experts": 4}},
    "jamba": {"fields": {"attn_layer_period": 2, "attn_layer_offset": 1}},
    "lfm2_moe": {"fields": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}},
    "longcat_flash": {"fields": {"head_dim": 8}},
    "mamba2": {"fields": {"num_heads": 8, "head_dim": 16}},
    "recurrent_gemma": {"fields": {"num_hidden_layers": 3}},
    "reformer": {"start": {"is_decoder": True}, "fields": {
        "attn_layers": ["local", "local"], "axial_pos_shape": [7, 8], "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 8, "max_position_embeddings": CONTEXT}},
}


def build_tokenizer(folder: Path, vocab_size: int = 384):
    """polyglot처럼 끝 토큰이 2번이고 pad가 없는 byte-level BPE 토크나이저를 학습해 폴더에 쓴다."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[END], bos_token=SPECIAL[END],
                                        unk_token=SPECIAL[END])
    tokenizer.save_pretrained(folder)
    return tokenizer


def add_head(tokenizer):
    """토크나이저가 Gemma와 Llama처럼 글머리에 토큰(1번) 하나를 스스로 붙이게 한다."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{SPECIAL[1]} $A",
                                                                    special_tokens=[(SPECIAL[1], 1)])
    return tokenizer


def build_neox(folder: Path, *, layers: int = 2, hidden: int = 64, heads: int = 2, context: int = 256,
               vocab_size: int = 384, dtype: torch.dtype = torch.float16, seed: int = 0, brief: bool = False) -> Path:
    """polyglot의 특이한 점을 모두 가진 작은 GPT-NeoX를 무작위 가중치로 쓴다.

    Args:
        brief: 몇 토큰 만에 끝 토큰으로 답을 그친다. 그러지 않으면 무작위 모델은 멈출 줄 모른다.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    size = len(build_tokenizer(folder, vocab_size))
    torch.manual_seed(seed)
    config = GPTNeoXConfig(vocab_size=size + 13, hidden_size=hidden, num_hidden_layers=layers,
                           num_attention_heads=heads, intermediate_size=hidden * 4, rotary_pct=0.5,
                           max_position_embeddings=context, use_parallel_residual=True, bos_token_id=0,
                           eos_token_id=0, tie_word_embeddings=False)
    model = GPTNeoXForCausalLM(config)
    if brief:  # 마지막 norm의 첫 칸을 늘 1로 두고, 끝 토큰의 행이 그 칸을 크게 읽는다
        with torch.no_grad():
            model.gpt_neox.final_layer_norm.bias[0] = 1.0
            model.get_output_embeddings().weight[END, 0] = 0.5
    model.to(dtype).save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_config(model_type: str, vocab_size: int, **overrides):
    """`model_type`의 기본 설정에서 크기만 줄인 설정.

    층마다 다른 구조(sliding과 full, linear와 full, dense와 expert)는 종류마다 한 층씩 남긴다.
    """
    from transformers import CONFIG_MAPPING

    odd = ODD.get(model_type, {})
    kind = CONFIG_MAPPING[model_type]
    defaults = kind(**odd.get("start", {}))
    return kind(**{**odd.get("start", {}), **_shrunk(defaults, vocab_size), **odd.get("fields", {}), **overrides})


def _shrunk(config, vocab_size: int) -> dict:
    fields = config.to_dict()
    small = {name: size for name, size in SIZES.items() if isinstance(fields.get(name), int)}
    if "qk_rope_head_dim" in fields:  # MLA는 head_dim을 스스로 정한다. K와 V를 낮은 차원에 함께 담아 kv head가 없다
        small.pop("head_dim", None)
        small |= {name: HEADS for name in ("num_key_value_heads",) if name in small}
    elif "head_dim" in fields:
        small["head_dim"] = HEAD
    if fields.get("num_key_value_heads", 0) is None:
        small["num_key_value_heads"] = KV_HEADS
    ids = {name: value for name, value in fields.items() if name.endswith(("token_id", "token_index", "_idx"))}
    small |= {name: END for name in ids if name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    small |= {name: vocab_size for name in fields if name in ("vocab_size", "decoder_vocab_size",
                                                              "vocab_size_per_layer_input", "unpadded_vocab_size")}
    small |= {name: 0.0 for name, value in fields.items() if "drop" in name and isinstance(value, float)}
    depth = next((fields[name] for name in LAYERS if isinstance(fields.get(name), int)), 2)
    kept = _one_of_each(fields, depth)
    small |= {name: len(kept) for name in LAYERS if isinstance(fields.get(name), int)}
    small |= {name: [value[at] for at in kept] for name, value in fields.items()
              if isinstance(value, list) and len(value) == depth}
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            small[name] = {"model_type": part.model_type, **_shrunk(part, vocab_size)}
    return small


def _one_of_each(fields: dict, depth: int) -> list[int]:
    """종류가 저마다 다른 층의 번호. 적어도 둘이다."""
    lists = [fields[name] for name in fields if name.endswith(("layer_types", "block_type", "types"))
             and isinstance(fields[name], list) and len(fields[name]) == depth]
    seen, kept = set(), []
    for at in range(depth):
        mark = tuple(str(values[at]) for values in lists)
        if mark not in seen:
            seen.add(mark)
            kept.append(at)
    return sorted({*kept, *range(min(2, depth))}) if len(kept) < 2 else kept


def tiny(model_type: str, folder: Path, *, dtype: torch.dtype = torch.float16, seed: int = 0, **overrides) -> Path:
    """`model_type` 구조의 작은 무작위 모델과 토크나이저를 safetensors 폴더로 쓴다.

    bias는 0이 아니고 norm은 1이 아니다. 기본값 그대로면 빠뜨려도 드러나지 않는다.

    Args:
        overrides: 설정에서 바꿀 값.
    """
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(folder)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = tiny_config(model_type, len(tokenizer) + 13, **overrides)
    model = AutoModelForCausalLM.from_config(config)
    enliven(model)
    model.to(dtype).save_pretrained(folder)
    return folder


@torch.no_grad()
def enliven(model) -> None:
    """작은 무작위 모델의 답이 뚜렷하도록 행렬을 키우고, 0인 bias와 1인 norm을 흔든다."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or name.endswith(("A_log", "dt_bias")):
            continue
        if id(parameter) in tables:
            parameter.normal_(0, 0.5)
        elif parameter.ndim >= 2:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


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


def lora_neox(folder: Path, *, dropout: float = 0.0, rank: int = 4):
    """`folder`의 GPT-NeoX를 CPU에 fp32로 올려 Q, K, V의 행렬에 LoRA를 단 것. A의 값은 늘 같고 B는 0이다."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return get_peft_model(base, LoraConfig(r=rank, lora_dropout=dropout, target_modules=["query_key_value"],
                                           task_type="CAUSAL_LM"))
