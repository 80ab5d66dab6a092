"""커널이 아는 구조마다의 아주 작은 진짜 모델."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": 304, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": None,
         "pad_token_id": None}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
FAMILIES = {
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_neox-sequential": {"use_parallel_residual": False, "attention_bias": False},
    "llama": GROUPED | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                                            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                            "original_max_position_embeddings": 64}},
    "mistral": GROUPED | {"sliding_window": 24},
    "qwen2": GROUPED | {"tie_word_embeddings": True},
    "qwen3": GROUPED | {"tie_word_embeddings": True},
    "gemma3_text": GROUPED | {"num_key_value_heads": 1, "sliding_window": 16, "query_pre_attn_scalar": 40,
                              "final_logit_softcapping": 20.0, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": GROUPED | {"sliding_window": 16, "sliding_window_pattern": 2,
                          "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4-full": GROUPED | {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "hyperclovax": GROUPED | {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "embedding_multiplier": 2.0,
                              "logits_scaling": 0.5, "use_post_norm": True},
    "granite": GROUPED | {"attention_multiplier": 0.2, "residual_multiplier": 0.6, "embedding_multiplier": 3.0,
                          "logits_scaling": 2.0},
}


def build(name: str, dtype: torch.dtype = torch.float32, **changes):
    """가중치를 키워 로짓의 차이를 뚜렷하게 한 모델. norm과 bias도 무작위라서 빠뜨리면 드러난다."""
    torch.manual_seed(3)
    sizes = SIZES | FAMILIES[name] | changes
    if "layer_types" in sizes:  # 층을 늘리면 두 층의 꼴을 되풀이한다
        sizes["layer_types"] = (sizes["layer_types"] * sizes["num_hidden_layers"])[: sizes["num_hidden_layers"]]
    config = AutoConfig.for_model(name.split("-")[0], **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def add_lora(model, rank: int = 4, targets="all-linear"):
    """모든 선형층에 LoRA를 붙인다. B도 무작위다."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    tuned = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets,
                                             task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.08)
    return tuned


def quantize(model, kind: str, double_quant: bool = True):
    """출력 행렬을 뺀 선형층을 bitsandbytes의 NF4나 int8로 바꾼다."""
    import bitsandbytes as bnb

    dtype = model.dtype
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear or name == "lm_head":
                continue
            if kind == "nf4":
                linear = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=child.bias is not None,
                                           compute_dtype=dtype, compress_statistics=double_quant, quant_type="nf4",
                                           device="meta")
                weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4",
                                           compress_statistics=double_quant, module=linear)
                linear.weight = weight.to(child.weight.device)
                linear.support_avx512bf16_for_cpu = False
            else:
                linear = bnb.nn.Linear8bitLt(child.in_features, child.out_features, bias=child.bias is not None,
                                             has_fp16_weights=False, device="meta")
                codes, scales, _ = bnb.functional.int8_vectorwise_quant(child.weight.data.half())
                linear.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes,
                                                  SCB=scales)
            linear.bias = child.bias
            setattr(parent, name, linear)
    return model


def exact(model):
    """양자화한 가중치를 풀어 fp32로 만든 사본. 정답으로 쓴다."""
    import bitsandbytes as bnb

    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                state = child.weight.quant_state
                state.dtype = torch.float32
                weight = bnb.functional.dequantize_4bit(child.weight.data, state)
            elif isinstance(child, bnb.nn.Linear8bitLt):
                weight = child.weight.data.float() * child.weight.SCB[:, None] / 127
            else:
                continue
            linear = torch.nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
            linear.weight = torch.nn.Parameter(weight)
            linear.bias = child.bias
            setattr(parent, name, linear)
    return torch.nn.Module.float(model)  # transformers는 양자화한 모델의 float()를 거절한다
