"""체크포인트를 끊겨도 온전하게 쓰고, 이어서 쓸 수 있는 것을 가려낸다."""

from pathlib import Path


def newest_valid(output_dir: str | Path) -> Path | None:
    """온전한 `checkpoint-N` 가운데 가장 새것. 없으면 None이다."""
    folders = sorted(Path(output_dir).glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    return next((folder for folder in reversed(folders) if (folder / "trainer_state.json").is_file()), None)
