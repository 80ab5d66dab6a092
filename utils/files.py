"""파일을 잃지 않게 쓰는 한 가지 방법: 옆의 임시 이름에 쓰고, 다 쓴 뒤에 제 이름을 준다. 잠금도 여기에 있다.

파일 하나는 `staged_file`, 잠근 폴더 하나는 `staged`, 봉한 폴더는 `seals`의 `stage`와 `publish`로 쓴다. 모두 `put`으로
끝난다.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from utils.errors import FULL_DISK, UsageError, json_reason, why
from utils.process import is_first_process

STAGING = ".tmp-"
LOCK_FILE = ".lock"
WAITS = (0.1, 0.3, 1.0, 3.0)  # 초
_FULL_TEXT = ("No space left", "os error 28)", "os error 27)", "os error 112)", "os error 122)",
              "PytorchStreamWriter failed", "inline_container.cc", "iostream error", "file write failed")


@contextlib.contextmanager
def staged_file(target: Path, failed: str | None = None) -> Iterator[TextIO]:
    """글을 임시 이름에 쓰고, 블록이 무사히 끝나면 `target`의 이름을 준다. 도중에 끝나면 아무것도 남기지 않는다.

    Args:
        failed: 쓰지 못했을 때 할 말의 앞부분. 적지 않으면 OSError를 그대로 올린다.

    Raises:
        UsageError: 쓰지 못했고 `failed`가 있다.
    """
    staging = own_staging_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging.open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
        put(staging, target)
    except OSError as error:
        if failed is None:
            raise
        raise UsageError(f"{failed}: {target} ({why(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(output_dir: str) -> Iterator[Path]:
    """옆의 임시 폴더를 잠가 그 안에 쓸 자리를 주고, 탈 없이 끝나면 제자리로 옮긴다. 탈이 나면 지운다.

    어디서 끊겨도 `output_dir`에는 아무것도 없거나 다 된 모델이 있다. 잠금은 프로세스가 죽으면 풀린다.

    Raises:
        UsageError: 같은 `output_dir`에 쓰는 다른 실행이 있다.
    """
    output = Path(output_dir).resolve()
    staging = staging_of(output)
    work = staging / output.name
    try:
        with locked(staging, output_dir):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                yield work
                if output.is_dir():
                    output.rmdir()  # 그 사이에 누가 무엇을 두었으면 여기서 멈춘다
                put(work, output)
            finally:
                shutil.rmtree(work, ignore_errors=True)
                with contextlib.suppress(OSError):  # Windows는 잠근 파일을 지우지 못하고, 잠금을 풀 때 지운다
                    (staging / LOCK_FILE).unlink()
    finally:
        with contextlib.suppress(OSError):  # 그 사이에 다른 실행이 잠갔으면 그것의 폴더다
            staging.rmdir()


def put(source: Path, target: Path) -> None:
    """임시 이름의 파일이나 폴더에 제 이름을 준다. 있던 파일은 대신하고, 있던 폴더는 비켜 놓았다가 지운다.

    Windows는 있는 폴더 위로 이름을 바꾸지 못하고 폴더를 fsync하지 못한다. 그래서 둘 다 쓰지 않는다.
    """
    if not target.is_dir():
        rename(source, target)
        return
    old = target.with_name(f"{STAGING}old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    rename(target, old)
    rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


def rename(source: Path, target: Path) -> None:
    """이름을 바꾼다. 있던 파일은 대신한다. Windows에서 백신이나 색인이 잠깐 열어 둔 것은 기다렸다가 다시 한다."""
    for wait in WAITS:
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(wait)
    source.replace(target)


def staging_of(final: Path) -> Path:
    """`final`을 쓰는 동안의 임시 이름. 함께 배우는 프로세스 모두에게 같다."""
    return final.with_name(STAGING + final.name)


def own_staging_of(final: Path) -> Path:
    """이 프로세스만 쓰는 임시 이름. 잠그지 않고 쓰는 파일과 폴더에 쓴다."""
    return final.with_name(f"{STAGING}{os.getpid()}-{final.name}")


@contextlib.contextmanager
def locked(folder: Path, output_dir: str | Path | None = None, busy: str | None = None) -> Iterator[None]:
    """폴더를 이 프로세스의 것으로 잠근다. 운영 체제의 잠금이므로 프로세스가 죽으면 남지 않는다.

    Args:
        output_dir: 사용자가 적은 폴더. 적지 않으면 `folder`다. 알리는 말에 쓴다.
        busy: 다른 실행이 잠갔을 때 할 말. 적지 않으면 output_dir를 바꾸라고 한다.

    Raises:
        UsageError: 다른 실행이 잠갔거나 폴더에 쓸 수 없다.
    """
    from filelock import FileLock, Timeout

    output_dir = output_dir or folder
    if not is_first_process():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE)
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(busy or f"다른 실행이 쓰는 중이다: {output_dir}. 끝나기를 기다리거나 다른 --output_dir를 "
                         "적는다") from None
    except OSError as error:
        raise UsageError(f"output_dir에 쓸 수 없다: {output_dir} ({why(error)})") from None
    try:
        yield
    finally:
        lock.release()


def file_sha256(file: Path) -> str:
    """파일 내용의 sha256(16진수 64글자)."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_sha256(*texts: str) -> str:
    """차례대로 이은 글들의 sha256(16진수 64글자). 나뉜 자리가 다르면 값도 다르다."""
    return hashlib.sha256("\x1f".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def read_json(path: Path, missing: str) -> dict:
    """JSON 파일을 읽는다.

    Raises:
        UsageError: 없으면 `missing`을, 깨졌으면 그 자리를 말한다.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError:
        raise UsageError(missing) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"올바른 JSON이 아니다: {path}. {json_reason(error)}") from None


def is_full_disk(error: BaseException) -> bool:
    """디스크가 차서 난 오류인지. torch와 safetensors는 errno 없이 글로만 알린다."""
    return getattr(error, "errno", None) in FULL_DISK or any(text in str(error) for text in _FULL_TEXT)
