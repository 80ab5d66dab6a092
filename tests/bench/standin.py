"""polyglot-ko와 모양이 같은 무작위 가중치의 모델을 GPU에서 층마다 양자화해 몇 초 만에 만든다."""

import torch

SHAPES = {
    "1.3b": {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "rotary_pct": 0.5},
    "3.8b": {"num_hidden_layers": 32, "hidden_size": 3072, "num_attention_heads": 24, "rotary_pct": 0.5},
    "5.8b": {"num_hidden_layers": 28, "hidden_size": 4096, "num_attention_heads": 16, "rotary_pct": 0.25},
    "12.8b": {"num_hidden_layers": 40, "hidden_size": 5120, "num_attention_heads": 40, "rotary_pct": 0.5},
}


def config_of(shape: str) -> dict:
    """그 크기의 config.json에 든 것."""
    sizes = SHAPES[shape]
    return {"model_type": "gpt_neox", "vocab_size": 30080, "intermediate_size": 4 * sizes["hidden_size"],
            "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None, "hidden_act": "gelu",
            "tie_word_embeddings": False, **sizes}


def build(shape: str, dtype: torch.dtype, double_quant: bool, compute: torch.dtype, seed: int = 0, device="cuda"):
    """NF4로 양자화된 GPTNeoXForCausalLM. 어댑터는 없다.

    Args:
        dtype: 양자화하지 않는 가중치(embedding, norm, bias, 출력 행렬)의 dtype.
        double_quant: absmax도 양자화할지.
        compute: 4비트 선형층이 계산하는 dtype.
    """
    import bitsandbytes as bnb
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(**{k: v for k, v in config_of(shape).items() if k != "model_type"})
    with torch.device("meta"):
        model = GPTNeoXForCausalLM._from_config(config, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size):
        return torch.randn(*size, device=device, dtype=torch.float32, generator=generator) * 0.02

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            linear = bnb.nn.Linear4bit(module.in_features, module.out_features, compute_dtype=compute, device="meta",
                                       compress_statistics=double_quant, quant_type="nf4")
            weight = random(module.out_features, module.in_features).to(dtype)
            linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=double_quant,
                                              quant_type="nf4", module=linear).to(device)
            linear.bias = torch.nn.Parameter(random(module.out_features).to(dtype), requires_grad=False)
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, linear)
        elif isinstance(module, torch.nn.LayerNorm):
            module.weight = torch.nn.Parameter((1 + random(config.hidden_size)).to(dtype))
            module.bias = torch.nn.Parameter(random(config.hidden_size).to(dtype))
    model.gpt_neox.embed_in.weight = torch.nn.Parameter(random(config.vocab_size, config.hidden_size).to(dtype))
    model.lm_head.weight = torch.nn.Parameter(random(config.vocab_size, config.hidden_size).to(dtype))
    model.gpt_neox.rotary_emb = type(model.gpt_neox.rotary_emb)(config).to(device)
    model.is_loaded_in_4bit = True
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def add_lora(model, seed: int = 0, rank: int = 8, up: float = 0.0):
    """query_key_value에 r 8, alpha 16, dropout 0.05인 LoRA를 붙인다. `up`은 B의 표준편차다."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.05, task_type="CAUSAL_LM",
                                             target_modules=["query_key_value"]))
    if up:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=up)
    return model
