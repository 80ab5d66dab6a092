"""체크포인트 폴더를 끊겨도 온전하게 쓰고, 이어서 쓸 수 있는 것을 가려낸다.

쓰는 순서: 임시 폴더에 모두 쓴다 -> 디스크에 내린다 -> 크기와 sha256을 manifest.json에 적는다 -> 다시 읽어 본다 ->
이름을 바꾼다 -> 오래된 것을 지운다. 어디서 끊겨도 `checkpoint-N`은 온전하거나, 온전하지 않음이 드러난다.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path, PurePosixPath

MANIFEST = "manifest.json"
STAGING = ".tmp-"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
RESUMABLE = (*ADAPTER, "scheduler.pt", "trainer_state.json")
_NAME = re.compile(r"checkpoint-(\d+)")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXT = ("No space left", "os error 28)", "os error 27)", "os error 112)", "os error 122)",
              "PytorchStreamWriter failed", "inline_container.cc", "iostream error", "file write failed")


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


def newest_valid(output_dir: str | Path) -> Path | None:
    """온전한 `checkpoint-N` 가운데 가장 새것. 없으면 None이다."""
    return next((folder for folder in reversed(checkpoints(output_dir)) if damage(folder) is None), None)


def damage(folder: Path, required: tuple[str, ...] = RESUMABLE) -> str | None:
    """폴더의 어느 파일이 어떻게 손상되었는지 한마디로 말한다. 온전하면 None이다."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST}이 없거나 깨졌다"
    gone = [name for name in required if name not in manifest["files"]]
    if gone:
        return f"{gone[0]}이 {MANIFEST}에 없다"
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name}이 없다"
        size = file.stat().st_size
        if size != expected.get("size"):
            return f"{name}의 크기가 {size:,}바이트다(적힌 크기 {expected.get('size')}바이트)"
        if file_sha256(file) != expected.get("sha256"):
            return f"{name}의 내용이 적힌 sha256과 다르다"
    return None


def read_manifest(folder: Path) -> dict | None:
    """manifest.json의 내용. 없거나, 한 글자라도 바뀌었거나, 모양이 다르면 None이다."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.pop("seal", None) != _seal(manifest):
        return None
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("run"), dict):
        return None
    inside = all(isinstance(entry, dict) and _is_inside(name) for name, entry in files.items())
    return manifest if inside else None


def staging_of(final: Path) -> Path:
    """`final`을 쓰는 동안의 임시 폴더."""
    return final.with_name(STAGING + final.name)


def stage(final: Path) -> Path:
    """`final`을 쓸 임시 폴더를 비워서 만든다."""
    staging = staging_of(final)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def seal(folder: Path, facts: dict) -> None:
    """폴더의 파일을 모두 디스크에 내리고, 맨 끝에 manifest.json을 쓴 다음 다시 읽어 확인한다.

    Args:
        facts: manifest.json에 함께 적을 것. `run`(실행의 조건)이 들어 있어야 한다.

    Raises:
        OSError: 쓴 것과 읽은 것이 다르다. 디스크가 찼거나 고장났다.
    """
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file != folder / MANIFEST:
            _flush(file)
            files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    write_manifest(folder, {**facts, "files": files})
    found = damage(folder, required=())
    if found:
        raise OSError(errno.EIO, f"쓴 것을 다시 읽으니 {found}", str(folder))


def write_manifest(folder: Path, manifest: dict) -> None:
    """manifest.json을 쓴다. `run`과 `files`에, 한 글자라도 바뀌면 드러나게 하는 `seal`을 더한다."""
    text = json.dumps({**manifest, "seal": _seal(manifest)}, ensure_ascii=False, indent=2)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    _flush(folder / MANIFEST)


def publish(staging: Path, final: Path, facts: dict) -> None:
    """임시 폴더를 봉하고 제 이름으로 바꾼다. 같은 이름의 폴더가 있으면 비켜 놓았다가 지운다.

    Windows는 있는 폴더 위로 이름을 바꾸지 못하고 폴더를 fsync하지 못한다. 그래서 둘 다 쓰지 않는다.
    """
    seal(staging, facts)
    old = final.with_name(f"{STAGING}old-{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        _rename(final, old)
    _rename(staging, final)
    shutil.rmtree(old, ignore_errors=True)


def publish_files(staging: Path, folder: Path, facts: dict) -> None:
    """임시 폴더의 파일을 하나씩 `folder`로 옮긴다. manifest.json이 맨 끝이므로 도중에 끊기면 손상이 드러난다."""
    seal(staging, facts)
    names = [file.name for file in sorted(staging.iterdir()) if file.name != MANIFEST]
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in [*names, MANIFEST]:
        (staging / name).replace(folder / name)
    staging.rmdir()


def prune(output_dir: str | Path, keep: int, best: Path | None) -> None:
    """새것 `keep`개와 가장 좋은 것만 남긴다. 지우다 끊겨도 반쯤 지운 것이 체크포인트로 보이지 않는다."""
    for folder in checkpoints(output_dir)[:-keep]:
        if folder != best:
            doomed = folder.with_name(f"{STAGING}old-{folder.name}")
            _rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def sweep(output_dir: str | Path) -> None:
    """끊긴 실행이 남긴 임시 폴더를 지운다. 폴더를 잠근 다음에만 부른다."""
    for folder in Path(output_dir).glob(f"{STAGING}*"):
        shutil.rmtree(folder, ignore_errors=True)


def is_full_disk(error: BaseException) -> bool:
    """디스크가 차서 난 오류인지. torch와 safetensors는 errno 없이 글로만 알린다."""
    return getattr(error, "errno", None) in _FULL or any(text in str(error) for text in _FULL_TEXT)


def _seal(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and not set(name) & set("\\:\0")


def _rename(source: Path, target: Path) -> None:
    for wait in (0.1, 0.3, 1.0, 3.0):
        try:
            source.rename(target)
            return
        except PermissionError:  # Windows에서는 백신이나 색인이 파일을 잠깐 열어 두기도 한다
            time.sleep(wait)
    source.rename(target)


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
