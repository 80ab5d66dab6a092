"""손으로 쓴 학습 길이 GPT-NeoX 모델에서 읽는 것을 맡는다: 계산할 수 있는 모델인지, 층의 가중치, 입력 embedding."""

import torch
from torch import nn

from utils.engine.train_ops import NF4_BLOCK


def why_not(model: nn.Module) -> str | None:
    """이 모델을 손으로 쓴 길로 계산할 수 없는 까닭. 계산할 수 있으면 None."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    if config.model_type != "gpt_neox":
        return f"구조가 GPT-NeoX가 아니라 {config.model_type}"
    if not config.use_parallel_residual or config.hidden_act != "gelu" or not config.attention_bias:
        return "병렬 잔차, gelu, bias가 있는 GPT-NeoX가 아니다"
    if config.hidden_dropout or config.attention_dropout or config.rope_parameters["rope_type"] != "default":
        return "은닉 dropout이나 늘린 rotary가 있다"
    head_dim = config.hidden_size // config.num_attention_heads
    if config.hidden_size % 8 or config.hidden_size > 8192 or head_dim % 8 or config.intermediate_size % 8:
        return "크기가 8의 배수가 아니다"
    if int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)) % 16:
        return "회전하는 차원이 16의 배수가 아니다"
    for layer in base.gpt_neox.layers:
        qkv = layer.attention.query_key_value
        if not hasattr(qkv, "lora_A") or list(qkv.active_adapters) != ["default"] or qkv.merged:
            return "query_key_value에 LoRA 하나가 있어야 한다"
        plain = type(qkv.lora_A["default"]) is nn.Linear and not qkv.use_dora.get("default", False)
        if not plain or qkv.lora_B["default"].bias is not None:
            return "LoRA의 변형(DoRA, bias)을 쓴다"
        for linear in (qkv.base_layer, layer.attention.dense, layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h):
            state = getattr(linear.weight, "quant_state", None)
            four_bit = state is not None and state.quant_type == "nf4" and state.blocksize == NF4_BLOCK
            if type(linear) is not nn.Linear and not four_bit:
                return "LoRA가 다른 층에도 있거나 NF4가 아닌 양자화를 쓴다"
    expected = 2 * len(base.gpt_neox.layers)
    if sum(parameter.requires_grad for parameter in model.parameters()) != expected:
        return "LoRA 말고도 배우는 가중치가 있다"
    if type(base.lm_head) is not nn.Linear or base.lm_head.bias is not None:
        return "출력 행렬이 평범한 선형층이 아니다"
    return None


class HostEmbedding(nn.Module):
    """핀 고정된 CPU 메모리에 두고 필요한 행만 PCIe로 읽는 입력 embedding. VRAM을 쓰지 않는다.

    표를 매개변수로 두지 않으므로 모델의 장치를 묻는 코드는 여전히 GPU라고 답을 얻는다.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.device = weight.device
        table = weight.detach().cpu()
        self.table = table.pin_memory() if weight.is_cuda else table

    @property
    def weight(self) -> torch.Tensor:
        return self.table

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table[input_ids.cpu()].to(self.device)


def restore_embedding(model: nn.Module) -> None:
    """`HostEmbedding`을 GPU의 평범한 embedding으로 되돌린다. 학습 뒤의 답 만들기는 GPU에 있는 표를 읽는다."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "embed_in", None), HostEmbedding):
            host = module.embed_in
            module.embed_in = nn.Embedding.from_pretrained(host.table.to(host.device), freeze=True)


class Layer:
    """층 하나의 가중치와 상수."""

    def __init__(self, index: int, module: nn.Module, dtype: torch.dtype):
        attention, mlp = module.attention, module.mlp
        lora = attention.query_key_value
        first, second = module.input_layernorm, module.post_attention_layernorm
        self.index, self.eps = index, float(first.eps)
        self.w1, self.b1, self.w2, self.b2 = (
            part.detach().to(dtype) for part in (first.weight, first.bias, second.weight, second.bias))
        self.qkv, self.dense, self.up, self.down = (
            lora.base_layer, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h)
        self.bias = (self.dense.bias.detach().float() + self.down.bias.detach().float()).to(dtype)
        self.qkv_bias, self.up_bias = (linear.bias.detach().to(dtype) for linear in (self.qkv, self.up))
        self.lora_a, self.lora_b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
        self.a, self.b = self.lora_a.detach(), self.lora_b.detach()
        self.rank, self.scale = self.a.shape[0], float(lora.scaling["default"])
        self.dropout = float(getattr(lora.lora_dropout["default"], "p", 0.0))
