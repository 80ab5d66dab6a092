"""LoRA 어댑터 폴더를 tensor마다의 갱신으로 읽는다. 바르게 합칠 수 없는 어댑터는 이름을 대며 거절한다."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from utils.errors import UsageError
from utils.model.adapter import PLAIN_STARTS, read_adapter_config, require_lora
from utils.model.diskmap import DiskMap
from utils.model.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ModelFolder,
    TensorEntry,
    read_safetensors_header,
    text_config,
)
from utils.model.shards import DTYPES, read_rows, row_spans

_TIED_NAMES = ("lm_head", "wte", "word_embeddings")  # embed로 시작하지 않는 입력과 출력 행렬의 이름
_PREFIX = "base_model.model."
_SAVED_BASE = ".base_layer.weight"  # 출력 행렬이나 embedding을 배우면 PEFT는 기반 모델의 것도 함께 담는다
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# 있어도 갱신이 W + scale * B @ A인 설정들. 다른 설정은 비어 있어야 하고, 모르는 설정도 그렇다.
_HARMLESS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
             "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
             "fan_in_fan_out", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern",
             "rank_pattern", "alpha_pattern", "megatron_core", "loftq_config", "eva_config", "qalora_group_size",
             "runtime_config", "ensure_weight_tying", "lora_ga_config", "corda_config"}
_EMPTY = (None, False, "none", [], {})


@dataclass(frozen=True)
class Update:
    """행렬 하나의 갱신 `scale * B @ A`. a는 [rank, in], b는 [out, rank], 둘 다 fp32다.

    `transposed`면 가중치가 [in, out]으로 놓인 층(GPT-2의 Conv1D)이다.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """더할 값의 [start, stop) 행 [stop - start, 폭], fp32. PEFT의 `get_delta_weight`와 같은 차례로 계산한다."""
        if self.transposed:
            return (self.b @ self.a[:, start:stop]).mul_(self.scale).T
        return (self.b[start:stop] @ self.a).mul_(self.scale)


def read_config(adapter: Path) -> dict:
    """어댑터의 설정. 합칠 수 없는 종류면 거절한다.

    Raises:
        UsageError: LoRA가 아니거나, 단순한 `W + scale * B @ A`가 아니다.
    """
    config = read_adapter_config(adapter)
    require_lora(config, adapter)
    odd = [f"{name}={value!r}" for name, value in config.items() if name not in _HARMLESS and value not in _EMPTY]
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        odd.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if odd:
        raise UsageError(f"이런 어댑터는 합치지 않는다(반만 합쳐지는 것을 막는다): {', '.join(odd)} ({adapter}). "
                         "합치지 않고 generate.py --peft_root로 얹어 쓴다")
    numbers = [config.get("r"), config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
    if not all(isinstance(n, int | float) and math.isfinite(n) and n > 0 for n in numbers):
        raise UsageError(f"{adapter / ADAPTER_CONFIG}의 r이나 lora_alpha가 양수가 아니다")
    return config


def read_updates(adapter: Path, config: dict) -> dict[str, Update]:
    """메모리에서의 층의 이름 -> 갱신.

    Raises:
        UsageError: 가중치가 짝이 맞지 않거나, NaN이 있거나, LoRA가 아닌 tensor가 섞여 있거나, 모두 0이다.
    """
    file = adapter / ADAPTER_WEIGHTS
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for entry in read_safetensors_header(file):
        if not entry.name.startswith(_PREFIX):
            raise UsageError(f"{file}의 {entry.name}은 PEFT의 이름({_PREFIX}...)이 아니다. "
                             "PEFT의 save_pretrained로 다시 저장한 어댑터를 쓴다")
        if entry.name.endswith(_SAVED_BASE):
            continue
        match = _MATRIX.fullmatch(entry.name.removeprefix(_PREFIX))
        if match is None or len(entry.shape) != 2 or entry.dtype not in DTYPES:
            raise UsageError(f"{file}에 합칠 줄 모르는 tensor가 있다: {entry.name} {entry.dtype} {list(entry.shape)}")
        values = read_rows(entry, 0, entry.shape[0]).float()
        if not torch.isfinite(values).all():
            raise UsageError(f"{file}의 {entry.name}에 NaN이나 inf가 들어 있다. 학습이 잘못되었다")
        pairs.setdefault(match["module"], {})[match["side"]] = values
    updates = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:  # A [r, in], B [out, r]
            raise UsageError(f"{file}에서 {module}의 lora_A와 lora_B가 짝이 맞지 않는다")
        rank = _by_pattern(config, "rank_pattern", module, config["r"])
        if pair["A"].shape[0] != rank:
            raise UsageError(f"{module}의 rank가 설정과 다르다. 설정 {rank}, 가중치 {pair['A'].shape[0]}")
        alpha = _by_pattern(config, "alpha_pattern", module, config["lora_alpha"])
        # rank를 키우면 B A의 크기도 커지므로 나누어 맞춘다. rsLoRA는 rank가 클 때 너무 작아지지 않게 제곱근으로 나눈다
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        updates[module] = Update(pair["A"], pair["B"], scale)
    if not any(update.b.any() and update.a.any() for update in updates.values()):
        raise UsageError(f"어댑터가 아무것도 바꾸지 않는다(모든 갱신이 0이다): {adapter}. 학습이 끝난 어댑터인지 본다")
    return updates


def match_base(updates: dict[str, Update], config: dict, adapter: Path, base: ModelFolder,
               disk: DiskMap) -> dict[str, Update]:
    """디스크의 기반 모델의 tensor 이름 -> 갱신.

    Raises:
        UsageError: 기반 모델에 그 층이 없거나, 모양이 다르거나, 묶인 embedding이거나, 다른 tensor를 합쳐 만드는 층이다.
            설정이 말하는 층의 갱신이 어댑터에 없다.
    """
    matched = {}
    tied = text_config(base.config).get("tie_word_embeddings", False)
    for module, update in updates.items():
        entry = disk.entries.get(f"{module}.weight")
        if f"{module}.weight" in disk.built:
            raise UsageError(f"파일의 tensor 여럿을 합치거나 나누어 만드는 층이라 어댑터를 합칠 수 없다: {module}")
        if entry is None:
            raise UsageError(f"어댑터의 층이 기반 모델 {base.path}에 없다: {module}. 어댑터를 배운 기반 모델을 적는다")
        update = replace(update, transposed=module in disk.transposed)
        if entry.dtype not in DTYPES:
            raise UsageError(f"기반 모델의 {module}이 16비트나 32비트가 아니라({entry.dtype}) 갱신을 더할 수 없다: "
                             f"{base.path}. 16비트 가중치의 모델을 --base_model로 적는다")
        if entry.shape != update.shape:
            raise UsageError(f"{module}의 모양이 다르다. 기반 모델 {list(entry.shape)}, "
                             f"어댑터 {list(update.shape)}. 어댑터를 배운 기반 모델을 적는다")
        leaf = module.rsplit(".", 1)[-1]
        if entry.name in disk.shared or (tied and (leaf.startswith("embed") or leaf in _TIED_NAMES)):
            raise UsageError(f"입력과 출력이 한 행렬로 묶인 모델이라 {module}의 갱신을 합칠 수 없다(다른 쪽도 바뀐다)")
        matched[entry.name] = update
    _require_every_layer(updates, config, disk)
    for saved in read_safetensors_header(adapter / ADAPTER_WEIGHTS):
        if saved.name.endswith(_SAVED_BASE):
            entry = disk.entries.get(saved.name.removeprefix(_PREFIX).replace(_SAVED_BASE, ".weight"))
            if entry is None or not _same(saved, entry):
                raise UsageError(f"어댑터에 든 것이 기반 모델 {base.path}의 것과 다르다: {saved.name}")
    return matched


def _require_every_layer(updates: dict[str, Update], config: dict, disk: DiskMap) -> None:
    """설정의 `target_modules`가 가리키는 층마다 갱신이 있는지 본다. 빠진 층이 있으면 배운 것의 일부만 합쳐진다."""
    if config.get("layers_to_transform") is not None:
        return
    for name, entry in disk.entries.items():
        module = name.removesuffix(".weight")
        asked = _is_named(module, config.get("target_modules")) and not _is_named(module, config.get("exclude_modules"))
        if asked and module != name and len(entry.shape) == 2 and module not in updates:
            raise UsageError(f"어댑터에 {module}의 갱신이 없다. 설정(target_modules)에는 있는 층이다. "
                             "어댑터의 파일이 온전한지 본다")


def _is_named(module: str, targets: list[str] | str | None) -> bool:
    """PEFT의 규칙: 글이면 전체와 맞는 정규식, 목록이면 이름의 끝이다."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets or ())


def _same(one: TensorEntry, other: TensorEntry) -> bool:
    if one.shape != other.shape:
        return False
    for span in row_spans(one.shape):
        left, right = (read_rows(entry, *span).float() for entry in (one, other))
        if not torch.equal(left, right):
            return False
    return True


def _by_pattern(config: dict, field: str, module: str, otherwise: float) -> float:
    """rank_pattern과 alpha_pattern을 PEFT와 같은 규칙으로 찾는다: 이름의 끝과 맞는 첫 정규식."""
    for pattern, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise
