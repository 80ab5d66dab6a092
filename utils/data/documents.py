"""토큰으로 바꾼 문서들과, 그것을 디스크에 둔 캐시. 배열을 디스크에서 읽으므로 데이터가 메모리보다 커도 된다."""

import contextlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UsageError, why
from utils.files import own_staging_of, put

KEEP = 8
_META = "meta.json"
_FLAT = {"tokens": np.int32, "answer": np.int8}
_PER_DOCUMENT = {"lengths": np.int64, "digests": np.uint64, "questions": np.uint64, "numbers": np.int64}

MUTED = 2  # 답이지만 배우지 않는 자리(weight 0)의 표시


class Document(NamedTuple):
    """문서 하나: 토큰 [n] int32와, 토큰마다 배우는 답인지 [n] bool."""

    tokens: np.ndarray
    learned: np.ndarray


@dataclass
class Documents:
    """토큰으로 바꾼 문서들. 모두 한 줄로 이어 두고 자리만 기억한다.

    `cutoff_len`보다 긴 문서는 꺼낼 때 토큰 경계에서 잘리고 끝 토큰은 남는다.

    Attributes:
        tokens: 모든 문서의 토큰. [n_tokens] int32. 디스크에 둔 배열일 수 있다.
        answer: 배우는 답(끝 토큰 포함)에 속하면 1, 배우지 않는 답이면 `MUTED`, 아니면 0. [n_tokens] int8.
        offsets: 자르기 전의 문서 i는 tokens[offsets[i]:offsets[i+1]]이다. [n_documents + 1] int64.
        digests: 문서 내용의 해시. [n_documents] uint64.
        questions: 질문의 해시. 질문이 따로 없으면 내용의 해시다. [n_documents] uint64.
        numbers: 파일에서의 행 번호. [n_documents] int64.
        cutoff_len: 문서의 가장 긴 길이(토큰). None이면 자르지 않는다.
        end_id: 끝 토큰의 번호.
        sha256: 데이터 파일의 해시.
        found: 읽으면서 본 것들(`check.Inspector.found`).
        pairs: 선호 쌍인가. 그러면 2k번째와 2k + 1번째 문서가 한 질문의 고른 답과 버린 답이다.
    """

    tokens: np.ndarray
    answer: np.ndarray
    offsets: np.ndarray
    digests: np.ndarray
    questions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    cutoff_len: int | None = None
    end_id: int = 0
    sha256: str = ""
    found: dict = field(default_factory=dict)
    pairs: bool = False

    @property
    def per_row(self) -> int:
        """함께 다니는 문서의 수: 선호 쌍이면 2, 아니면 1."""
        return 2 if self.pairs else 1

    def asked(self, members: np.ndarray) -> np.ndarray:
        """`members` 가운데 물어볼 것. 선호 쌍이면 고른 답의 문서만이다."""
        return members[::self.per_row]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def full_lengths(self) -> np.ndarray:
        """자르기 전의 길이. [n_documents]"""
        return np.diff(self.offsets)

    def lengths(self) -> np.ndarray:
        """자른 뒤의 길이. [n_documents]"""
        full = self.full_lengths()
        return full if self.cutoff_len is None else np.minimum(full, self.cutoff_len)

    @property
    def n_cut(self) -> int:
        """블록보다 길어 잘리는 문서의 수."""
        return int((self.full_lengths() > self.lengths()).sum())

    def document(self, index: int) -> Document:
        """문서 하나. 길면 자르고 끝 토큰을 둔다."""
        start, end = self.offsets[index], self.offsets[index + 1]
        if self.cutoff_len is None or end - start <= self.cutoff_len:
            return Document(self.tokens[start:end], self.answer[start:end] == 1)
        kept = slice(start, start + self.cutoff_len - 1)  # 한 자리는 끝 토큰의 것이다
        tokens = np.append(self.tokens[kept], np.int32(self.end_id))
        learned_end = self.answer[kept.stop] != MUTED
        return Document(tokens, np.append(self.answer[kept] == 1, learned_end))

    def muted(self, index: int) -> np.ndarray:
        """질문까지 배울 때에도 배우지 않는 토큰인지. [`document(index)`의 길이] bool."""
        start, end = self.offsets[index], self.offsets[index + 1]
        if self.cutoff_len is not None:
            end = min(end, start + self.cutoff_len)
        return self.answer[start:end] == MUTED


class CacheWriter:
    """캐시 폴더 하나를 쓴다. 다 쓴 뒤에 이름을 바꾸므로 쓰다 만 캐시는 열리지 않는다.

    Raises:
        UsageError: 폴더에 쓸 수 없거나 디스크가 가득 찼다.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._staged = own_staging_of(folder)
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
                put(self._staged, self._folder)
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
        return UsageError(f"토큰의 캐시를 쓰지 못했다: {self._folder.parent} ({why(error)}). "
                          "디스크의 여유 공간을 늘리거나 --cache_dir로 다른 폴더를 적는다")


class Cache(NamedTuple):
    """연 캐시: 배열의 이름 -> 배열, 그리고 함께 적어 둔 것."""

    arrays: dict[str, np.ndarray]
    meta: dict


def open_cache(folder: Path) -> Cache | None:
    """캐시 폴더. 없거나 온전하지 않으면 None이다. 토큰은 디스크에 둔 채 필요한 만큼만 읽힌다."""
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
    return Cache(arrays, meta)


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
