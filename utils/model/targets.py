"""LoRA를 붙일 층을 구조에 맞게 고른다."""

import re
from collections.abc import Collection

from torch import nn
from transformers.pytorch_utils import Conv1D

from utils import hub
from utils.errors import UsageError, first_line
from utils.model import diskmap
from utils.model.configs import auto_config
from utils.model.diskmap import DiskMap
from utils.model.folder import open_model_folder
from utils.model.shape import empty_model
from utils.model.shards import DTYPES

ATTENTION_TARGETS = {
    "gpt_neox": ("query_key_value",),
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "phi3": ("qkv_proj",),
}
TRANSPOSED = ("gpt2", "openai-gpt")  # 가중치를 [in, out]으로 두는 구조(Conv1D)
COMMON_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
COMMON_LINEARS = (*COMMON_TARGETS, "gate_proj", "up_proj", "down_proj")
FUSED_TARGETS = (("query_key_value",), ("qkv_proj",), ("Wqkv",), ("c_attn",), ("in_proj",))


def find_targets(base_model: str, asked: tuple[str, ...], config: dict, cache_dir: str | None) -> tuple[str, ...]:
    """LoRA를 붙일 층을, 가중치가 없는 모델에서 미리 찾는다. 데이터를 읽기 전에 쓸 수 없는 이름을 가린다.

    Args:
        asked: 사용자가 적은 이름들.
        config: 기반 모델의 config.json.

    Raises:
        UsageError: 모델에 없는 층이거나, LoRA를 붙이지 못하거나 배워도 합칠 수 없는 층이다.
    """
    empty = empty_model(auto_config().from_pretrained(base_model, cache_dir=cache_dir, trust_remote_code=False))
    unfit = unfit_names(empty, diskmap.read(open_model_folder(hub.folder(base_model, cache_dir))))
    unfit |= dict.fromkeys(expert_names(empty), "PEFT가 전문가들을 한데 담은 가중치로 옮겨 붙이는 층")
    names = linear_names(empty) - unfit.keys()
    targets = choose_targets(asked, config, names, attention_names(empty) - unfit.keys())
    refused = [target for target in targets if target in unfit]
    if refused:
        advice = f"--lora_target_modules에 쓸 수 있는 이름: {', '.join(sorted(names))}" if names else (
            "다른 기반 모델을 --base_model로 적는다")
        raise UsageError(f"{unfit[refused[0]]}이라 배워도 합칠 수 없다: {', '.join(refused)}. {advice}")
    require_targets(empty, targets)
    require_attachable(empty, targets)
    return targets


def choose_targets(asked: tuple[str, ...], config: dict, names: Collection[str] | None = None,
                   attention: Collection[str] = ()) -> tuple[str, ...]:
    """`attention`이면 구조의 attention 층을, `all`이면 출력 행렬을 뺀 모든 선형층을, `auto`면 둘 가운데 하나를 고른다.

    auto는 선형층이 모두 흔한 이름인 구조(llama, Qwen, Gemma, EXAONE 따위)에서만 모든 선형층을 고른다. Gemma 3 270M에서
    재니 attention만 고른 것보다 KoBEST와 KoAlpaca를 더 잘 배웠다(tests/bench/README.md). 전문가나 상태가 있는 구조와
    polyglot(GPT-NeoX)에서는 attention이다. 기본값도 GPT-NeoX가 아니면 auto와 같다.

    Args:
        names: 모델에 있는 층의 이름(`linear_names`). 주면 그 안에서만 고른다. `all`은 이것이 있어야 한다.
        attention: attention 안에 있는 층의 이름. 흔한 이름이 하나도 없는 구조에서는 이것을 모두 고른다.
    """
    kind = config["model_type"]
    if asked == ("query_key_value",) and kind not in ("gpt_neox", "bloom", "falcon"):
        asked = ("auto",)
    if asked == ("auto",):
        asked = ("all",) if names and set(names) <= set(COMMON_LINEARS) else ("attention",)
    if asked == ("all",):
        return tuple(sorted(names))
    if asked == ("attention",):
        usual = ATTENTION_TARGETS.get(kind, COMMON_TARGETS)
        # 모르는 구조면 흔한 이름부터 찾아, 모델에 하나라도 있는 첫 묶음을 고른다
        groups = (usual, COMMON_TARGETS, *FUSED_TARGETS)
        present = (tuple(name for name in group if names is None or name in names) for group in groups)
        return next(filter(None, present), tuple(sorted(attention)) or usual)
    return asked


def linear_names(model: nn.Module) -> set[str]:
    """LoRA를 붙일 수 있는 층의 이름. 글을 다루는 부분만 보고, 출력 행렬은 뺀다."""
    body = find_backbone(model) or model
    paths = [path for path, module in body.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return {path.rsplit(".", 1)[-1] for path in paths} - {"lm_head", "embed_out"}


def expert_names(model: nn.Module) -> set[str]:
    """PEFT가 이름을 보고 층 대신 전문가들의 가중치(`target_parameters`)에 LoRA를 붙이는 층의 이름."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    found = set()
    for name in linear_names(model):
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # 함께 옮겨야 하는 짝이 있는 이름이다
            found.add(name)
        if config.target_parameters:
            found.add(name)
    return found


def attention_names(model: nn.Module) -> set[str]:
    """attention 안에 있는 층의 이름. 이름에 attn이나 attention이 든 부분의 안을 본다."""
    inside = set()
    for path, module in model.named_modules():
        outer, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear | Conv1D) and ("attn" in outer or "attention" in outer):
            inside.add(name)
    return inside & linear_names(model)


def find_backbone(causal: nn.Module) -> nn.Module | None:
    """출력 행렬 앞의 몸통. 그림도 보는 모델에서는 글을 다루는 부분이다. 찾지 못하면 None."""
    if causal.config.get_text_config(decoder=True) is not causal.config:
        body = causal.get_decoder()
    else:
        body = getattr(causal, causal.base_model_prefix, None)
    return None if body is causal else body


def unfit_names(model: nn.Module, disk: DiskMap) -> dict[str, str]:
    """LoRA를 붙이지 못하거나, 배워도 합칠 수 없는 층의 이름 -> 이유. 같은 이름의 층 가운데 하나만 그래도 든다.

    Args:
        model: 가중치가 없는 모델(meta).
        disk: 기반 모델의 파일이 메모리의 어디에 놓이는지.
    """
    body, names, shared, found = find_backbone(model) or model, linear_names(model), disk.shared, {}
    outer = next((f"{name}." for name, module in model.named_modules() if module is body and name), "")
    for path, module in body.named_modules():
        name, weight = path.rsplit(".", 1)[-1], f"{outer}{path}.weight"
        if name not in names:
            continue
        if not isinstance(module, nn.Linear | Conv1D) or any(True for _ in module.children()):
            found[name] = "LoRA를 붙일 수 없는 모양의 층"
        elif weight in disk.built:
            found[name] = "파일의 tensor 여럿을 합치거나 나누어 만드는 층"
        elif weight not in disk.entries or disk.entries[weight].name in shared:
            found[name] = "다른 층과 가중치를 함께 쓰는 층"
        elif disk.entries[weight].dtype not in DTYPES:
            found[name] = f"가중치가 16비트나 32비트가 아닌({disk.entries[weight].dtype}) 층"
    return found


def require_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    """`targets`가 모두 모델의 층인지 본다. 가중치가 없는 모델(meta)이어도 된다.

    Raises:
        UsageError: 없는 이름이 있다. 쓸 수 있는 이름을 말한다.
    """
    names = linear_names(model)
    unknown = [target for target in targets if target not in names]
    if unknown:
        raise UsageError(f"모델에 없는 층이다: {', '.join(unknown)}. 쓸 수 있는 이름: {', '.join(sorted(names))}")


def require_attachable(model: nn.Module, targets: tuple[str, ...]) -> None:
    """PEFT가 이 층들에 LoRA를 붙이는지 본다. 가중치가 없는 모델(meta)에 붙여 보고, 그 모델은 버린다.

    Raises:
        UsageError: PEFT가 거절하는 층이다(Mamba의 out_proj 따위).
    """
    from peft import LoraConfig, get_peft_model

    try:
        get_peft_model(model, LoraConfig(r=1, target_modules=peft_targets(model, targets)))
    except ValueError as error:
        raise UsageError(f"PEFT가 LoRA를 붙이지 못하는 층이 있다({first_line(error)}). --lora_target_modules에서 "
                         f"그 층을 뺀다: {', '.join(targets)}") from None


def peft_targets(model: nn.Module, targets: tuple[str, ...]) -> list[str] | str:
    """PEFT의 `target_modules`. 그림도 보는 모델에서는 글을 다루는 부분의 층만 고르는 정규식이다."""
    body = find_backbone(model)
    inside = next((name for name, module in model.named_modules() if module is body), "")
    if model.config.get_text_config(decoder=True) is model.config or not inside:
        return list(targets)
    names = "|".join(map(re.escape, targets))
    return rf"{re.escape(inside)}\..*\b({names})"
