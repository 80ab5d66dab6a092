"""어댑터 폴더 하나: 찾고, 읽고, 모델에 얹고, 스스로를 설명하는 prompt.json을 쓴다."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from utils.errors import UsageError, first_line
from utils.files import read_json
from utils.model.checkpoint import newest_valid
from utils.model.folder import ADAPTER_CONFIG, ADAPTER_FILES, ADAPTER_WEIGHTS
from utils.paths import looks_like_hub_id
from utils.seals import MANIFEST, damage

PROMPT_FILE = "prompt.json"
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # 기반 가중치를 건드리지 않는 시작(init_lora_weights)
_UNREPEATABLE = ("pissa_niter", "corda", "lora_ga", "loftq")  # 얹을 때 난수나 데이터로 기반 가중치를 다시 나누는 시작


@dataclass(frozen=True)
class PromptInfo:
    """어댑터나 병합 모델이 스스로를 설명하는 정보. `prompt.json`에 담긴다.

    Attributes:
        template: 학습에 쓴 템플릿 전체.
        end_token: 답의 끝을 뜻하는 토큰의 글자.
        end_token_id: 그 토큰의 번호.
        cutoff_len: 학습한 블록의 길이(토큰).
        end_token_ids: 답을 멈추게 하는 모든 토큰의 번호. 옛 파일에는 없어서 비어 있다.
        head_ids: 글머리에 붙여 배운 토큰(BOS)의 번호. 붙이지 않던 때의 파일에는 없어서 비어 있다.
    """

    template: dict
    end_token: str
    end_token_id: int
    cutoff_len: int
    end_token_ids: tuple[int, ...] = ()
    head_ids: tuple[int, ...] = ()


def base_of(model):
    """PEFT로 감싼 모델이면 그 안의 기반 모델, 아니면 그대로."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_adapter(model, adapter: Path, name: str = "default"):
    """`find_adapter`가 찾은 어댑터를 모델에 얹는다. 병합하지 않는다.

    Args:
        model: 기반 모델, 또는 이미 다른 어댑터를 얹은 PeftModel. 뒤의 것이면 그 위에 하나를 더 얹는다.
        name: PEFT 안에서의 이름. 얹은 것들 가운데 하나를 `set_adapter(name)`으로 고른다.

    Raises:
        UsageError: LoRA가 아니거나, 설정이 잘못되었거나, 이 모델의 어댑터가 아니다.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    require_repeatable(adapter)
    advice = "배운 기반 모델이 맞는지, 파일이 온전한지 본다"
    try:
        if isinstance(model, PeftModel):
            tuned = model
            tuned.load_adapter(str(adapter), adapter_name=name, is_trainable=False)
        else:
            tuned = PeftModel.from_pretrained(model, str(adapter), adapter_name=name, is_trainable=False)
        # PEFT는 자리를 못 찾은 tensor를 말없이 버린다. 같은 값을 한 번 더 넣어 그 이름을 받는다
        state = load_file(Path(adapter) / ADAPTER_WEIGHTS)
        found = set_peft_model_state_dict(tuned, state, adapter_name=name)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = first_line(error)
        if reason.startswith("Target modules"):
            reason = "배운 층이 이 모델에 없다. 다른 구조의 모델에서 배운 어댑터다"
        raise UsageError(f"어댑터를 얹지 못했다: {adapter} ({reason}). {advice}") from None
    if broken := next((key for key, value in state.items() if not value.isfinite().all()), None):
        raise UsageError(f"어댑터에 NaN이나 inf가 들어 있다: {adapter}의 {broken}. 학습이 잘못되었으니 다시 배운다")
    lost = _lost(tuned, found, name)
    if lost:
        raise UsageError(f"어댑터를 얹지 못했다: {adapter}. {lost}. {advice}")
    return tuned


def require_reloadable(model) -> None:
    """지금 저장할 어댑터가 같은 모델에 다시 얹히는지 본다. 이름을 바꾸어 저장하는 구조가 있다. 값은 바뀌지 않는다.

    Raises:
        UsageError: 자리를 잃는 tensor가 있다.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    lost = _lost(model, set_peft_model_state_dict(model, get_peft_model_state_dict(model)))
    if lost:
        raise UsageError(f"이 모델의 어댑터는 다시 얹지 못한다: {lost}. --lora_target_modules로 다른 층을 고른다")


def require_repeatable(adapter: Path) -> None:
    """얹을 때마다 같은 모델이 되고, 답의 토큰마다 같은 것을 더하는 어댑터인지 본다.

    Raises:
        UsageError: LoRA가 아니거나, 얹을 때 기반 가중치를 난수나 데이터로 다시 나누거나, 글의 어느 자리부터만 더한다.
    """
    config = read_adapter_config(adapter)
    require_lora(config, adapter)
    start = str(config.get("init_lora_weights"))
    if start.startswith(_UNREPEATABLE):
        raise UsageError(f"얹을 때마다 기반 가중치를 다르게 나누는 어댑터다(init_lora_weights={start!r}): {adapter}. "
                         "PEFT의 save_pretrained에 path_initial_model_for_weight_conversion을 주어 보통의 LoRA로 다시 "
                         "저장한 것을 쓴다")
    if config.get("alora_invocation_tokens"):
        raise UsageError(f"정한 말이 나온 뒤에만 더하는 어댑터(aLoRA)는 쓰지 않는다: {adapter}")


def require_lora(config: object, adapter: Path) -> None:
    """어댑터의 설정이 LoRA의 것인지 본다.

    Raises:
        UsageError: 설정이 아니거나 다른 방법의 어댑터다.
    """
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UsageError(f"어댑터가 LoRA가 아니다(peft_type {kind!r}): {adapter}. LoRA 어댑터만 쓴다")


def can_turn_off(adapter: Path) -> bool:
    """어댑터를 끄면 기반 모델이 되는지. 함께 배운 bias, 되풀이한 층, 얹을 때 나눈 기반 가중치는 꺼도 남는다."""
    config = read_adapter_config(adapter)
    left = (config.get("bias") or "none") != "none" or config.get("layer_replication")
    return not left and config.get("init_lora_weights", True) in PLAIN_STARTS


def _lost(model, found, name: str = "default") -> str:
    """PEFT의 `set_peft_model_state_dict`가 놓지 못했거나 채우지 못한 어댑터 `name`의 tensor. 없으면 빈 글이다.

    묶인 embedding처럼 두 이름이 한 tensor를 가리키면 한 이름으로만 채워도 된다.
    """
    places = {key: id(value) for key, value in model.named_parameters(remove_duplicate=False) if is_learned(key)}
    filled = {place for key, place in places.items() if key not in found.missing_keys}
    empty = sorted(key for key in found.missing_keys
                   if is_learned(key) and name in key.split(".") and places.get(key) not in filled)
    for names, said in ((sorted(found.unexpected_keys), "모델에 놓일 자리가 없다"), (empty, "어댑터에 없다")):
        if names:
            return f"{names[0]}(모두 {len(names)}개)가 {said}"
    return ""


def is_learned(name: str) -> bool:
    """어댑터가 채워야 하는 자리의 이름인지. 다른 이름은 기반 모델의 가중치다."""
    return ".lora_" in name or ".modules_to_save." in name or ".trainable_tokens_" in name


def find_adapter(peft_root: str | Path) -> Path:
    """어댑터를 찾는 단 하나의 규칙: `peft_root` 안의 완성된 어댑터, 없으면 온전한 `checkpoint-N` 가운데 가장 새것.

    Raises:
        UsageError: 폴더가 없거나 어댑터가 없다.
    """
    root = Path(peft_root)
    if root.is_file():
        raise UsageError(f"어댑터의 폴더가 아니라 파일이다: {root}. 그 파일이 든 폴더를 적는다: {root.parent}")
    if not root.is_dir():
        advice = f". hub의 어댑터면 먼저 받는다: hf download {peft_root} --local-dir {root.name}(그 폴더를 " \
                 "--peft_root로 적는다)" if looks_like_hub_id(peft_root) else ""
        raise UsageError(f"어댑터 폴더가 없다: {root}{advice or _nearby(root.parent)}")
    if all((root / name).is_file() for name in ADAPTER_FILES):
        found = damage(root, ADAPTER_FILES) if (root / MANIFEST).exists() else None
        if found is None:
            return root
        raise UsageError(f"어댑터가 손상되었다. {root}: {found}. "
                         "체크포인트가 남아 있으면 그 폴더를 --peft_root로 적는다")
    checkpoint = newest_valid(root)
    if checkpoint is not None:
        return checkpoint
    if (root / ADAPTER_CONFIG).is_file():
        raise UsageError(f"어댑터에 가중치({ADAPTER_WEIGHTS})가 없다: {root}")
    raise UsageError(f"어댑터가 없다: {root}. finetune-lora.py의 --output_dir를 적는다{_nearby(root)}")


def tokenizer_folder(adapter: Path, base: str | Path) -> Path:
    """토크나이저를 읽을 폴더. 다른 도구가 배우며 쓴 것(대화 템플릿까지)을 함께 담은 어댑터면 어댑터의 폴더다."""
    own = "tokenizer_config.json", "tokenizer.json"
    is_whole = all((adapter / name).is_file() for name in own) and not (adapter / PROMPT_FILE).is_file()
    return adapter if is_whole else Path(base)


def _nearby(folder: Path) -> str:
    """적은 자리 가까이에 있는 어댑터들을 말하는 글. 없으면 빈 글이다."""
    found = {file.parent for place in (folder, Path("train")) for file in place.glob(f"*/{ADAPTER_CONFIG}")}
    names = sorted(each.as_posix() for each in found if not each.name.startswith("checkpoint-"))
    return f". 있는 어댑터: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else ""


def read_adapter_config(adapter: Path) -> dict:
    return read_json(adapter / ADAPTER_CONFIG, f"어댑터 설정이 없다: {adapter / ADAPTER_CONFIG}")


def read_prompt_info(folder: str | Path) -> PromptInfo | None:
    """폴더에 담긴 템플릿과 끝 토큰을 읽는다. 이 도구가 만든 폴더가 아니면 None이다."""
    file = Path(folder) / PROMPT_FILE
    if not file.is_file():
        return None
    content = read_json(file, "")
    try:
        lists = {name: tuple(content.get(name, ())) for name in ("end_token_ids", "head_ids")}
        return PromptInfo(**{**content, **lists})
    except (AttributeError, TypeError):
        raise UsageError(f"{file}의 항목이 맞지 않는다") from None


def write_prompt_info(folder: str | Path, info: PromptInfo) -> None:
    text = json.dumps(asdict(info), ensure_ascii=False, indent=2)
    (Path(folder) / PROMPT_FILE).write_text(text + "\n", encoding="utf-8")
