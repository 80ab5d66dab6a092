"""봉한 폴더: 파일마다의 크기와 sha256을 manifest.json에 적어, 끊기거나 바뀐 것이 드러나게 한다.

임시 폴더에 쓰고(stage), 봉하고(seal), 제 이름을 준다(publish). 읽을 때는 무엇이 손상되었는지 묻는다(damage).
"""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath

from utils.files import file_sha256, put, staging_of

MANIFEST = "manifest.json"


def stage(final: Path) -> Path:
    """`final`을 쓸 임시 폴더를 비워서 만든다. 여러 프로세스가 함께 쓰므로 이름이 모두에게 같다."""
    staging = staging_of(final)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(staging: Path, final: Path, facts: dict) -> None:
    """임시 폴더를 봉하고 제 이름을 준다."""
    seal(staging, facts)
    put(staging, final)


def publish_files(staging: Path, folder: Path, facts: dict) -> None:
    """임시 폴더의 파일을 하나씩 `folder`로 옮긴다. manifest.json이 맨 끝이므로 도중에 끊기면 손상이 드러난다."""
    seal(staging, facts)
    names = [file.name for file in sorted(staging.iterdir()) if file.name != MANIFEST]
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in [*names, MANIFEST]:
        put(staging / name, folder / name)
    staging.rmdir()


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


def damage(folder: Path, required: tuple[str, ...]) -> str | None:
    """폴더의 어느 파일이 어떻게 손상되었는지 한마디로 말한다. 온전하면 None이다."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST}이 없거나 깨졌다"
    gone = [name for name in required if name not in manifest["files"]]
    if gone:
        return f"{MANIFEST}에 없는 파일이 있다: {gone[0]}"
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"없는 파일: {name}"
        size = file.stat().st_size
        if size != expected.get("size"):
            return f"{name}의 크기가 {size:,}바이트다(적힌 크기 {expected.get('size')}바이트)"
        if file_sha256(file) != expected.get("sha256"):
            return f"{name}의 내용이 적힌 sha256과 다르다"
    return None


def _seal(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and not set(name) & set("\\:\0")


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
