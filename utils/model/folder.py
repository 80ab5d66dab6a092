"""모델 폴더 하나의 파일들: 이름, 설정, safetensors의 헤더. 가중치를 올리기 전에 온전하고 안전한지 가려낸다."""

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UsageError
from utils.files import read_json
from utils.paths import ROOT, find_recorded, looks_like_hub_id

SAMPLE_BYTES = 1 << 20  # model_digest가 파일의 양끝에서 읽는 바이트
MAX_HEADER_BYTES = 64 * 2**20
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# safetensors의 dtype -> 값 하나의 바이트. 없는 것(BOOL, I8, F8)은 1바이트다
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
PUBLISHED = ("polyglot-ko-1.3b", "polyglot-ko-3.8b", "polyglot-ko-5.8b", "polyglot-ko-12.8b")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


@dataclass(frozen=True)
class TensorEntry:
    """shard 안의 tensor 하나. `start`와 `end`는 파일의 처음부터 센 바이트 위치다."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


@dataclass(frozen=True)
class ModelFolder:
    """검사를 통과한 모델 폴더."""

    path: Path
    config: dict
    tensors: dict[str, TensorEntry]

    @property
    def shards(self) -> list[Path]:
        return sorted({entry.file for entry in self.tensors.values()})

    @property
    def n_bytes(self) -> int:
        return sum(entry.end - entry.start for entry in self.tensors.values())


def open_model_folder(path: str | Path) -> ModelFolder:
    """모델 폴더의 설정과 safetensors의 헤더만 읽어 온전한지 본다.

    Raises:
        UsageError: 폴더가 없거나, 모델이 아니거나, 덜 받아졌거나, pickle이나 원격 코드를 요구한다.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"모델 폴더가 없다: {path}")
    config = read_config(path)
    tensors: dict[str, TensorEntry] = {}
    expected = _expected_shards(path)
    for name in sorted(set(expected.values())) if expected else [SINGLE_FILE]:
        for entry in read_safetensors_header(path / name):
            if expected and expected.get(entry.name) != name:
                raise UsageError(f"{path / INDEX_FILE}: {name} 파일과 어긋난다: {entry.name}")
            tensors[entry.name] = entry
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise UsageError(f"{path}에 tensor {missing[0]}(모두 {len(missing)}개)이 없다. 모델을 다시 받는다")
    return ModelFolder(path, config, tensors)


def download_command(path: Path) -> str:
    """polyglot-ko를 `path`에 받는 명령. 읽지 않는 pickle 가중치(.bin)는 받지 않는다.

    폴더의 이름이 공개된 모델의 이름이 아니면(합친 모델, 오타) 가장 작은 1.3b를 제 이름의 폴더에 받는다.
    """
    if path.name not in PUBLISHED:
        path = Path("resources") / PUBLISHED[0]
    return f'hf download EleutherAI/{path.name} --local-dir {path.as_posix()} --exclude "*.bin"'


def read_config(path: Path) -> dict:
    """config.json을 읽고, 원격 코드를 요구하는 모델을 거절한다."""
    hint = ". 어댑터 폴더는 --peft_root로 적는다" if (path / ADAPTER_CONFIG).is_file() else ""
    config = read_json(path / "config.json", f"모델 폴더가 아니다(config.json이 없다): {path}{hint}")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UsageError(f"{path / 'config.json'}에 model_type이 없다. 모델 폴더가 맞는지 본다")
    if "auto_map" in config:
        raise UsageError(f"원격 코드(auto_map)를 실행하라고 요구하는 모델이다: {path}. 안전하지 않아 읽지 않는다")
    return config


def text_config(config: dict) -> dict:
    """글을 다루는 부분의 설정. Gemma 3 4B처럼 그림도 보는 모델은 `text_config`에 따로 담는다."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def read_safetensors_header(file: Path) -> list[TensorEntry]:
    """safetensors 파일의 헤더를 읽어 tensor 목록을 돌려준다. 가중치는 읽지 않는다.

    Raises:
        UsageError: 헤더가 깨졌거나 지나치게 크다, 또는 파일이 잘렸다.
    """
    broken = UsageError(f"깨졌거나 덜 받아진 파일이다: {file}. 지우고 다시 받는다")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise broken
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise UsageError(f"{file}의 헤더가 {length:,} 바이트다. 정상 모델이 아니므로 읽지 않는다")
            header = json.loads(stream.read(length))
    except OSError:
        raise UsageError(f"가중치 파일이 없다: {file}. 모델을 다시 받는다") from None
    except (ValueError, RecursionError):
        raise broken from None
    if not isinstance(header, dict):
        raise broken
    header.pop("__metadata__", None)
    entries = []
    for name, info in header.items():
        try:
            start, end = info["data_offsets"]
            data = 8 + length  # 값은 헤더의 길이(8바이트)와 헤더 다음부터다
            entry = TensorEntry(name, info["dtype"], tuple(info["shape"]), file, data + start, data + end)
            sides = all(type(side) is int and side >= 0 for side in entry.shape)
            n_bytes = math.prod(entry.shape) * ITEM_BYTES.get(entry.dtype, 1)
            whole = sides and end - start == n_bytes and start >= 0 and entry.end <= size
        except (KeyError, TypeError, ValueError):
            raise broken from None
        if not whole:
            raise broken
        entries.append(entry)
    return entries


def _expected_shards(path: Path) -> dict[str, str]:
    """index에 적힌 tensor -> shard 이름. 파일이 하나인 모델이면 빈 dict다.

    파일 하나와 index가 모두 있으면 transformers는 파일 하나를 읽는다.
    """
    if (path / SINGLE_FILE).exists():
        return {}
    if not (path / INDEX_FILE).exists():
        if list(path.glob("*.bin")) or list(path.glob("*.pt")):
            raise UsageError(f"{path}에는 pickle 가중치(.bin)만 있다. 안전하지 않아 읽지 않는다. safetensors를 받는다")
        raise UsageError(f"{path}에 safetensors 가중치가 없다. 덜 받아졌으면 다시 받는다")
    index = read_json(path / INDEX_FILE, f"{path / INDEX_FILE}을 읽지 못했다")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{path / INDEX_FILE}에 weight_map이 없다. 모델을 다시 받는다")
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise UsageError(f"폴더 밖을 가리키는 이름이 있다: {path / INDEX_FILE}의 {name!r}. "
                             "안전하지 않아 읽지 않는다")
    gone = sorted({name for name in weight_map.values() if not (path / name).is_file()})
    if gone:
        names = ", ".join(gone[:3])
        raise UsageError(f"{path}의 모델이 덜 받아졌다. 없는 파일: {names}(모두 {len(gone)}개). 다시 받는다")
    return weight_map


def find_trained_base(recorded: str, facts: dict) -> str:
    """어댑터가 말하는 기반 모델. 그 자리에도 그 이름으로도 없으면 resources에서 내용이 같은 폴더를 찾는다.

    Args:
        facts: 학습할 때 적어 둔 실행의 조건(manifest.json의 run). 기반 모델의 `model_digest`가 들어 있다.
    """
    found = find_recorded(recorded)
    if Path(found).exists() or looks_like_hub_id(recorded):
        return found
    digest = facts.get("base_model", {}).get("id")
    folders = (file.parent for file in sorted((ROOT / "resources").glob("*/config.json")))
    return next((str(folder) for folder in folders if model_digest(folder) == digest), found)


def model_digest(base_model: str | Path) -> str:
    """기반 모델의 설정, 토크나이저, 가중치를 가려내는 해시. 가중치는 파일마다 크기와 양끝의 1 MiB만 본다."""
    folder, digest = Path(base_model), hashlib.sha256()
    if not folder.is_dir():
        return hashlib.sha256(str(base_model).encode()).hexdigest()
    for file in [folder / "config.json", folder / "tokenizer.json", *sorted(folder.glob("*.safetensors"))]:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(SAMPLE_BYTES))
                stream.seek(max(0, size - SAMPLE_BYTES))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
