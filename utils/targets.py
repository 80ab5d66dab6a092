"""LoRA를 붙일 층을 구조에 맞게 고른다."""

AUTO_TARGETS = {
    "gpt_neox": ("query_key_value",),
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "phi3": ("qkv_proj",),
}
TRANSPOSED = ("gpt2", "openai-gpt")  # 가중치를 [in, out]으로 두는 구조(Conv1D)
COMMON_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def choose_targets(asked: tuple[str, ...], config: dict) -> tuple[str, ...]:
    """`auto`면 구조의 attention 층을 고른다. 기본값도 GPT-NeoX가 아니면 auto와 같다."""
    kind = config["model_type"]
    if asked == ("auto",) or (asked == ("query_key_value",) and kind not in ("gpt_neox", "bloom", "falcon")):
        return AUTO_TARGETS.get(kind, COMMON_TARGETS)
    return asked
