"""토큰으로 바꾼 데이터를 디스크의 배열로 두고, 같은 데이터를 다시 쓸 때 그대로 연다."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from utils.errors import UsageError

KEEP = 8
_META = "meta.json"
_FLAT = {"tokens": np.int32, "answer": np.int8}
_PER_DOCUMENT = {"lengths": np.int64, "digests": np.uint64, "questions": np.uint64, "numbers": np.int64}


def open_cache(folder: Path) -> tuple[dict[str, np.ndarray], dict] | None:
    """(배열들, 함께 적어 둔 것). 없거나 온전하지 않으면 None이다. 토큰은 디스크에 둔 채 필요한 만큼만 읽힌다."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        for name, kind in {**_FLAT, **_PER_DOCUMENT}.items():
            count = meta["n_tokens"] if name in _FLAT else meta["n_documents"]
            if (folder / name).stat().st_size != count * np.dtype(kind).itemsize:
                return None
        arrays = {name: np.memmap(folder / name, kind, "r") for name, kind in _FLAT.items()}
        arrays |= {name: np.fromfile(folder / name, kind) for name, kind in _PER_DOCUMENT.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):  # 읽기만 되는 폴더의 캐시도 쓴다
        (folder / _META).touch()
    return arrays, meta


class CacheWriter:
    """캐시 폴더 하나를 쓴다. 다 쓴 뒤에 이름을 바꾸므로 쓰다 만 캐시는 열리지 않는다.

    Raises:
        UsageError: 폴더에 쓸 수 없거나 디스크가 가득 찼다.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._staged = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        self._files: dict = {}
        self._counts = {"tokens": 0, "lengths": 0}

    def append(self, columns: dict[str, list]) -> None:
        """배열 이름 -> 덧붙일 값. 처음 부를 때 폴더를 만든다."""
        try:
            if not self._files:
                self._staged.mkdir(parents=True, exist_ok=True)
                self._files = {name: (self._staged / name).open("wb") for name in {**_FLAT, **_PER_DOCUMENT}}
            for name, kind in {**_FLAT, **_PER_DOCUMENT}.items():
                self._files[name].write(np.asarray(columns[name], kind).tobytes())
        except OSError as error:
            raise self._unwritable(error) from None
        for name in self._counts:
            self._counts[name] += len(columns[name])

    def commit(self, meta: dict) -> None:
        """배열을 닫고 `meta`를 마지막에 적은 뒤 캐시의 제 이름을 준다. 오래 안 쓴 캐시는 지운다."""
        meta = {**meta, "n_tokens": self._counts["tokens"], "n_documents": self._counts["lengths"]}
        try:
            self._close()
            (self._staged / _META).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
            if open_cache(self._folder) is None:  # 다른 프로세스가 먼저 만들었으면 그것을 쓴다
                shutil.rmtree(self._folder, ignore_errors=True)
                self._staged.rename(self._folder)
        except OSError as error:
            if open_cache(self._folder) is None:
                raise self._unwritable(error) from None
        _drop_old(self._folder.parent)

    def discard(self) -> None:
        """쓰다 만 것을 지운다. 다 쓴 캐시에는 아무 일도 하지 않는다."""
        self._close()
        shutil.rmtree(self._staged, ignore_errors=True)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()

    def _unwritable(self, error: OSError) -> UsageError:
        return UsageError(f"토큰의 캐시를 쓰지 못했다: {self._folder.parent} ({error.strerror or error}). "
                          "디스크의 빈 곳을 만들거나 --cache_dir로 다른 폴더를 적는다")


def _drop_old(parent: Path) -> None:
    """가장 최근에 쓴 `KEEP`개만 남긴다."""
    used = []
    for meta in parent.glob(f"*/{_META}"):
        try:
            used.append((meta.stat().st_mtime, meta.parent))
        except OSError:
            continue
    for _, folder in sorted(used, reverse=True)[KEEP:]:
        (folder / _META).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
