"""체크포인트 폴더를 끊겨도 온전하게 쓰고, 이어서 쓸 수 있는 것을 가려낸다.

쓰는 순서: 임시 폴더에 모두 쓴다 -> 디스크에 내린다 -> 크기와 sha256을 manifest.json에 적는다 -> 다시 읽어 본다 ->
이름을 바꾼다 -> 오래된 것을 지운다. 어디서 끊겨도 `checkpoint-N`은 온전하거나, 온전하지 않음이 드러난다.
"""

import re
import shutil
from pathlib import Path

from utils import seals
from utils.files import STAGING, rename
from utils.model.folder import ADAPTER_FILES

RESUMABLE = (*ADAPTER_FILES, "scheduler.pt", "trainer_state.json")
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """`checkpoint-N` 폴더들. 오래된 것부터다."""
    found = [folder for folder in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(folder.name)]
    return sorted((folder for folder in found if folder.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """체크포인트의 optimizer step. 이름이 `checkpoint-N`이 아니면 ValueError다."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(checkpoint.name)
    return int(match[1])


def damage(folder: Path) -> str | None:
    """이어 갈 수 없는 체크포인트면 무엇이 손상되었는지 한마디로 말한다. 온전하면 None이다."""
    return seals.damage(folder, RESUMABLE)


def newest_valid(output_dir: str | Path) -> Path | None:
    """온전한 `checkpoint-N` 가운데 가장 새것. 없으면 None이다."""
    return next((folder for folder in reversed(checkpoints(output_dir)) if damage(folder) is None), None)


def prune(output_dir: str | Path, keep: int, best: Path | None) -> None:
    """새것 `keep`개와 가장 좋은 것만 남긴다. 지우다 끊겨도 반쯤 지운 것이 체크포인트로 보이지 않는다."""
    for folder in checkpoints(output_dir)[:-keep]:
        if folder != best:
            doomed = folder.with_name(f"{STAGING}old-{folder.name}")
            rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def sweep(output_dir: str | Path) -> None:
    """끊긴 실행이 남긴 임시 폴더를 지운다. 폴더를 잠근 다음에만 부른다."""
    for folder in Path(output_dir).glob(f"{STAGING}*"):
        shutil.rmtree(folder, ignore_errors=True)
