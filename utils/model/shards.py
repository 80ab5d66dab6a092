"""safetensors shard를 조각으로 읽고 쓴다. 모델이 아무리 커도 한 번에 조각 몇 개만 메모리에 있다."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from utils.model.folder import INDEX_FILE, ITEM_BYTES, TensorEntry

CHUNK_BYTES = 2**20  # CPU의 캐시에 머무는 크기라서, 읽고 더하고 해시하고 쓰는 동안 RAM을 다시 오가지 않는다
WRITERS = min(4, (os.cpu_count() or 1) + 1)  # 나란히 쓰는 shard의 수. 하나 더 있어야 끝에 노는 코어가 없다
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # 갱신을 더할 수 있는 것
_READABLE = {**DTYPES, "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
             "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


@dataclass(frozen=True)
class Planned:
    """쓸 tensor 하나. `chunks`를 부르면 그 내용을 앞에서부터 조각으로 준다."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[memoryview]]

    @property
    def n_bytes(self) -> int:
        return ITEM_BYTES.get(self.dtype, 1) * math.prod(self.shape)


class HashingFile:
    """쓰면서 sha256을 센다. 다 쓴 것을 다시 읽지 않는다."""

    def __init__(self, path: Path):
        self._stream = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *_) -> None:
        self._stream.close()

    def write(self, chunk: bytes | memoryview) -> None:
        self._digest.update(chunk)
        left = memoryview(chunk)
        while left:  # 버퍼 없이 쓰는 write는 준 것보다 적게 쓸 수 있다
            left = left[self._stream.write(left):]
        self.size += len(chunk)

    def facts(self) -> dict:
        """지금까지 쓴 것의 크기와 sha256. manifest.json의 한 칸이다."""
        return {"size": self.size, "sha256": self._digest.hexdigest()}


def raw_chunks(entry: TensorEntry) -> Iterator[memoryview]:
    """tensor의 바이트를 고치지 않고 조각으로 준다. 같은 버퍼를 다시 쓰므로 다음 조각을 받기 전에 다 써야 한다."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.end - entry.start)))
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        left = entry.end - entry.start
        while left:
            chunk = buffer[:left]
            if stream.readinto(chunk) != len(chunk):
                raise OSError(f"읽는 동안 짧아진 파일: {entry.file}")
            left -= len(chunk)
            yield chunk


def read_rows(entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
    """첫 차원의 [start, stop) 행 [stop - start, ...]를 파일의 dtype 그대로 읽는다. 스칼라는 [1] 벡터로 본다.

    safetensors의 `get_slice`는 쓰지 않는다: mmap이라 잘린 파일에서 프로세스가 죽고(SIGBUS), 읽은 쪽이 RAM에 남는다.

    Raises:
        OSError: 읽는 동안 파일이 짧아졌다.
    """
    n_rows = entry.shape[0] if entry.shape else 1
    row_bytes = (entry.end - entry.start) // max(1, n_rows)
    buffer = bytearray((stop - start) * row_bytes)
    with entry.file.open("rb") as stream:
        stream.seek(entry.start + start * row_bytes)
        if stream.readinto(buffer) != len(buffer):
            raise OSError(f"읽는 동안 짧아진 파일: {entry.file}")
    return torch.frombuffer(buffer, dtype=_READABLE[entry.dtype]).view(stop - start, *entry.shape[1:])


def read_whole(entry: TensorEntry) -> torch.Tensor:
    """온전한 tensor [entry.shape]. 파일의 dtype 그대로다."""
    return read_rows(entry, 0, *(entry.shape[:1] or (1,))).view(entry.shape)


def row_spans(shape: tuple[int, ...], n_bytes: int | None = None) -> Iterator[tuple[int, int]]:
    """fp32로 펼쳐도 `n_bytes`(적지 않으면 조각 하나의 크기)를 넘지 않는 행의 범위들. 스칼라는 한 행이다."""
    rows = shape[0] if shape else 1
    row_bytes = 4 * max(1, math.prod(shape[1:]))  # fp32로 펼친 한 행
    step = max(1, (n_bytes or CHUNK_BYTES) // row_bytes)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def to_bytes(values: torch.Tensor) -> memoryview:
    """CPU의 tensor [...]를 그 dtype 그대로의 바이트로."""
    return memoryview(values.contiguous().flatten().view(torch.uint8).numpy())


def write_model(folder: Path, tensors: list[Planned], max_bytes: int, say: Callable[[str], None]) -> dict:
    """shard 여럿을 나란히 쓰고, 마지막에 index를 쓴다. 나누는 법과 이름은 huggingface_hub의 것이다.

    Args:
        max_bytes: shard 하나의 바이트. 혼자서 넘는 tensor는 혼자 한 shard가 된다.
        say: shard를 쓸 때마다 한 줄을 받는다.

    Returns:
        파일 이름 -> {"size", "sha256"}.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(by_name, get_storage_size=lambda tensor: tensor.n_bytes,
                                                 filename_pattern="model{suffix}.safetensors", max_shard_size=max_bytes)
    shards = {name: [by_name[member] for member in members] for name, members in split.filename_to_tensors.items()}
    files = {}
    with _one_torch_thread(), ThreadPoolExecutor(WRITERS) as pool:
        facts_of = pool.map(_write_shard, [folder / name for name in shards], shards.values())
        for name, facts in zip(shards, facts_of, strict=True):
            files[name] = facts
            say(f"  {name} {facts['size'] / 1e6:,.0f} MB")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """shard를 나란히 쓰는 동안에는 torch의 연산 하나하나를 다시 나누지 않게 한다."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_shard(path: Path, members: list[Planned]) -> dict:
    # 원소가 큰 dtype부터 놓아야 모든 tensor의 자리가 원소 크기의 배수가 된다
    members = sorted(members, key=lambda tensor: -ITEM_BYTES.get(tensor.dtype, 1))
    with HashingFile(path) as file:
        file.write(_header(members))
        for tensor in members:
            begin = file.size
            for chunk in tensor.chunks():
                file.write(chunk)
            written = file.size - begin
            if written != tensor.n_bytes:
                raise OSError(f"{tensor.name}을 {tensor.n_bytes:,}바이트 써야 하는데 {written:,}바이트를 썼다")
        return file.facts()


def _header(members: list[Planned]) -> bytes:
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in members:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape),
                               "data_offsets": [at, at + tensor.n_bytes]}
        at += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # 값이 8의 배수인 자리에서 시작하게 빈칸으로 채운다
    return len(text).to_bytes(8, "little") + text
