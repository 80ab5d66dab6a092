"""합칠 것들: 어댑터, 기반 모델, 둘이 맞는지의 검사."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from utils.errors import UsageError
from utils.model import diskmap, lora, nf4, shards
from utils.model.adapter import find_adapter, read_prompt_info, tokenizer_folder
from utils.model.folder import ModelFolder, TensorEntry, find_trained_base, model_digest, open_model_folder
from utils.model.loader import receive_base
from utils.model.merged import has_merged
from utils.paths import find_input
from utils.seals import read_manifest


@dataclass(frozen=True)
class Job:
    """합칠 것들. 검사를 모두 통과했다.

    Attributes:
        root: 사용자가 적은 어댑터 폴더. prompt.json과 run.json이 여기에 있다.
        adapter: 실제로 쓸 어댑터 폴더(root 자신이나 그 안의 체크포인트).
        disk: 기반 모델의 tensor들이 메모리의 어디에 놓이는지.
        updates: 디스크의 기반 모델의 tensor 이름 -> 갱신.
        onto: original(기반 모델의 원래 가중치)이나 quantized(NF4를 다녀온 가중치)에 합친다.
        trained_dtype: 학습할 때 기반 모델을 올린 dtype.
        warnings: 합치기 전에 알릴 것들.
    """

    root: Path
    adapter: Path
    config: dict
    base: ModelFolder
    disk: diskmap.DiskMap
    updates: dict[str, lora.Update]
    onto: str
    trained_dtype: torch.dtype
    warnings: tuple[str, ...] = ()

    @property
    def tokenizer_folder(self) -> Path:
        """합친 모델에 담을 토크나이저의 폴더."""
        return tokenizer_folder(self.adapter, self.base.path)

    def base_rows(self, entry: TensorEntry, quantised: dict[str, bool]) -> Callable[[int, int], torch.Tensor]:
        """`quantised`의 것은 NF4를 다녀온 값, 다른 것은 원래 값의 [start, stop) 행을 fp32로 주는 함수."""
        if entry.name in quantised:
            return nf4.NF4Rows(entry, self.trained_dtype, quantised[entry.name]).rows
        return lambda start, stop: shards.read_rows(entry, start, stop).float()


def open_job(peft_root: str, base_model: str | None, cache_dir: str | None, onto: str) -> Job:
    """어댑터와 기반 모델을 찾아 서로 맞는지 본다. 디스크에 쓰는 것은 없다.

    Raises:
        UsageError: 어댑터나 기반 모델이 없거나, 손상되었거나, 서로 맞지 않는다.
    """
    root = Path(peft_root)
    adapter = find_adapter(root)
    config = lora.read_config(adapter)
    updates = lora.read_updates(adapter, config)
    facts = (read_manifest(adapter) or {}).get("run", {})
    read_prompt_info(adapter)  # 다 쓴 다음에 깨진 것을 알지 않게 한다
    found = find_base(base_model, config, facts, cache_dir)
    if has_merged(found.folder, adapter):
        raise UsageError(f"이미 이 어댑터를 합친 모델이다: {found.folder}. 두 번 더하지 않게, 합치기 전의 기반 모델을 "
                         "--base_model로 적는다")
    base = open_model_folder(found.folder)
    disk = diskmap.read(base)
    dtype = getattr(torch, str(facts.get("dtype", {}).get("shown", "float32")), torch.float32)
    matched = lora.match_base(updates, config, adapter, base, disk)
    return Job(root, adapter, config, base, disk, matched, onto, dtype,
               () if found.warning is None else (found.warning,))


class FoundBase(NamedTuple):
    """기반 모델의 폴더와, 배울 때의 것과 달라 보이면 알릴 말."""

    folder: Path
    warning: str | None


def find_base(base_model: str | None, config: dict, facts: dict, cache_dir: str | None) -> FoundBase:
    """기반 모델을 찾는다. 적지 않았으면 어댑터가 말하는 것이고, hub id면 받아 온다.

    맞는지는 모양이 정한다. 사용자가 손수 적은 것의 이름이나 설정이 다르면 알리기만 한다.

    Raises:
        UsageError: 폴더가 없거나 받지 못했다.
    """
    trained_on = str(config.get("base_model_name_or_path") or "")
    if base_model is None and not trained_on:
        raise UsageError("어댑터가 기반 모델을 말하지 않는다. --base_model을 적는다")
    asked = find_input(base_model) if base_model else find_trained_base(trained_on, facts)
    # 이름과 모양은 diskmap과 match_base가 본다
    folder = receive_base(asked, cache_dir, recorded=base_model is None, shapes=False)
    expected = facts.get("base_model", {}).get("id")
    from_folder = expected not in (None, hashlib.sha256(trained_on.encode()).hexdigest())
    name, given = (Path(text.replace("\\", "/")).name for text in (trained_on, base_model or trained_on))
    differs = expected != model_digest(folder) if from_folder else bool(name) and name != given
    warning = (f"기반 모델({folder})의 이름이나 설정이 어댑터가 말하는 것({trained_on})과 다르다. 모양이 맞으면 "
               "합친다. 배운 기반 모델이 맞는지 본다")
    return FoundBase(folder, warning if differs else None)
