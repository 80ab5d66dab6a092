"""실행의 조건: 체크포인트에 담고, 이어 갈 때 비교하고, 스스로 고른 것을 물려받는다."""

import hashlib
import json
from pathlib import Path

from utils import seals
from utils.chat_settings import DATE
from utils.data.blocks import fingerprint
from utils.model import checkpoint
from utils.model.adapter import read_prompt_info
from utils.model.folder import model_digest
from utils.process import n_processes
from utils.train.inputs import Inputs
from utils.train.records import BatchShape, Settings

SAME_FLAGS = ("cutoff_len", "learning_rate", "val_set_size", "train_on_inputs", "seed", "lora_r",
              "lora_alpha", "lora_dropout", "early_stopping_patience")
EPOCHS, SPLIT = "num_train_epochs", "split"


def describe(settings: Settings, inputs: Inputs) -> dict:
    """실행의 조건. 이것이 같으면 이어서 배운 것이 한 번에 배운 것과 같다."""
    facts = {name: _fact(getattr(settings, name)) for name in (*SAME_FLAGS, EPOCHS)}
    template = json.dumps(inputs.prompter.template, ensure_ascii=False, sort_keys=True)
    return {
        "base_model": _fact(settings.base_model, model_digest(settings.base_model)),
        "data_path": _fact(settings.data_path, inputs.data_sha256),
        SPLIT: _split_fact(inputs),
        "prompt_template": _fact(inputs.prompter.name, hashlib.sha256(template.encode()).hexdigest()),
        "lora_target_modules": _fact(",".join(inputs.targets)),
        "dtype": _fact(inputs.device.dtype_name),
        "processes": _fact(n_processes()),
        "batch_size": _batch_fact(inputs.batch, settings.cutoff_len),
        **facts,
        **({"dpo_beta": _fact(settings.dpo_beta)} if settings.dpo_beta is not None else {}),  # 선호 쌍에만 있다
    }


def earlier_batch(settings: Settings) -> BatchShape | None:
    """이어 갈 실행의 batch와 블록. 새로 시작하거나 이어 갈 것이 없으면 None이다.

    스스로 고른 batch는 epoch의 수에 따라 달라지므로, 더 배우려고 이어 가도 처음에 고른 것을 쓴다.
    """
    last = _earlier(settings)
    manifest = (seals.read_manifest(last) if last else None) or {}
    found = manifest.get("run", {}).get("batch_size", {}).get("id")
    if isinstance(found, int):  # 블록을 cutoff_len까지 채운 실행(`_batch_fact`)
        return BatchShape(found, settings.cutoff_len, settings.cutoff_len)
    return BatchShape(*found) if isinstance(found, list) and len(found) == 3 else None


def earlier_date(settings: Settings) -> str | None:
    """이어 갈 실행의 대화 템플릿이 적은 날짜. 새로 시작하거나, 날짜를 적지 않는 템플릿이면 None이다."""
    last = _earlier(settings)
    info = read_prompt_info(last) if last else None
    return info.template.get(DATE) if info else None


def _earlier(settings: Settings) -> Path | None:
    """이어 갈 체크포인트일 폴더. 새로 시작하거나 이어 갈 것이 없으면 None이다."""
    asked = settings.resume_from_checkpoint
    if not asked:
        return None
    return checkpoint.newest_valid(Path(settings.output_dir)) if asked is True else Path(asked)


def _split_fact(inputs: Inputs) -> dict:
    """학습하는 행과 검증하는 행. 나누는 법이 바뀐 버전에서 이어 가면 검증 행을 배우게 된다."""
    documents, parts = inputs.documents, inputs.parts
    train, held_out = (len(members) // documents.per_row for members in parts)
    return _fact(f"학습 {train:,}행과 검증 {held_out:,}행", fingerprint(documents, *parts))


def _batch_fact(batch: BatchShape, cutoff_len: int) -> dict:
    """batch의 조건. 블록을 cutoff_len까지 채우면 수 하나이고, 아니면 (batch, 블록의 길이, 담는 양)이다."""
    if batch.room == cutoff_len:
        return _fact(batch.size)
    return _fact(f"{batch.size} x {batch.room}토큰", [batch.size, batch.block_len, batch.room])


def _fact(shown, identity=None) -> dict:
    return {"id": shown if identity is None else identity, "shown": str(shown)}


def differences(old: dict, new: dict) -> list[str]:
    """달라진 조건을 `이름: 앞 -> 뒤`로 적는다. epoch은 늘어난 것이면 괜찮다.

    나뉜 행은 데이터와 템플릿과 seed가 정하므로, 그것들이 같은데도 다를 때만 말한다.
    """
    changed = [_change(name, old.get(name), fact) for name, fact in new.items() if name != SPLIT]
    changed = [line for line in changed if line]
    if not changed and SPLIT in new and (line := _change(SPLIT, old.get(SPLIT), new[SPLIT])):
        changed = [f"{line}. 행을 다르게 나누던 버전에서 시작한 실행이다"]
    return changed


def _change(name: str, before: object, now: dict) -> str:
    """조건 하나가 어떻게 달라졌는지. 그대로면 빈 글이다."""
    before = before if isinstance(before, dict) else {"id": None, "shown": "없음"}
    was = before.get("id")
    longer = name == EPOCHS and isinstance(was, int | float) and was <= now["id"]
    if was == now["id"] or longer:
        return ""
    content = "(내용이 다르다)" if before.get("shown") == now["shown"] else ""
    return f"{name}: {before.get('shown')} -> {now['shown']}{content}"
