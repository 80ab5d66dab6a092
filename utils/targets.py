"""LoRA를 붙일 층을 구조에 맞게 고른다."""

from utils.engine.families import Family, describe
from utils.errors import UsageError

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
    """`auto`면 구조의 attention 층을, `all`이면 출력 행렬을 뺀 모든 선형층을 고른다.

    기본값도 GPT-NeoX가 아니면 auto와 같다.

    Raises:
        UsageError: `all`인데 선형층의 이름을 모르는 구조다.
    """
    kind = config["model_type"]
    if asked == ("all",):
        family = describe(config)
        if isinstance(family, Family):
            return tuple(family.linears())
        raise UsageError(f"--lora_target_modules all은 이 모델({family})에 쓸 수 없다. 층의 이름을 쉼표로 적는다")
    if asked == ("auto",) or (asked == ("query_key_value",) and kind not in ("gpt_neox", "bloom", "falcon")):
        return AUTO_TARGETS.get(kind, COMMON_TARGETS)
    return asked
