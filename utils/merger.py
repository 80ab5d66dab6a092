"""어댑터를 기반 모델에 합쳐 모델 폴더 하나를 쓴다. 쓸 것을 정하고, 차례대로 쓰고, 다 된 것에만 이름을 준다."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from utils import checkpoint, diskmap, lora, modelcard, nf4, shards
from utils.errors import UsageError
from utils.loader import PROMPT_FILE, end_token_id, end_token_ids, find_adapter, load_tokenizer, read_prompt_info
from utils.modelfolder import (
    ModelFolder,
    TensorEntry,
    open_model_folder,
    read_json,
    require_base,
    text_config,
)
from utils.paths import find_input
from utils.rundir import model_digest
from utils.shards import Planned

ADAPTER_FOLDER = "adapter"
REPORT_FILE = "merge-report.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja")
_LARGEST = {"F16": (2, 0x7C00), "BF16": (2, 0x7F80), "F32": (4, 0x7F800000)}  # 바이트의 수, 양의 무한대의 비트
SPARE_BYTES = 64 * 2**20
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Job:
    """합칠 것들. 검사를 모두 통과했다.

    Attributes:
        root: 사용자가 적은 어댑터 폴더. prompt.json과 run.json이 여기에 있다.
        adapter: 실제로 쓸 어댑터 폴더(root 자신이나 그 안의 체크포인트).
        disk: 기반 모델의 tensor들이 메모리의 어디에 놓이는지.
        updates: 디스크의 기반 모델의 tensor 이름 -> 갱신.
        onto: original(기반 모델의 원래 가중치)이나 quantized(NF4를 다녀온 가중치)에 합친다.
        trained_dtype: 학습할 때 기반 모델을 올린 dtype.
        warnings: 합치기 전에 알릴 것들.
    """

    root: Path
    adapter: Path
    config: dict
    base: ModelFolder
    disk: diskmap.DiskMap
    updates: dict[str, lora.Update]
    onto: str
    trained_dtype: torch.dtype
    warnings: tuple[str, ...] = ()

    def base_rows(self, entry: TensorEntry, quantised: dict[str, bool]) -> Callable[[int, int], torch.Tensor]:
        """`quantised`의 것은 NF4를 다녀온 값, 다른 것은 원래 값의 [start, stop) 행을 fp32로 주는 함수."""
        if entry.name in quantised:
            return nf4.NF4Rows(entry, self.trained_dtype, quantised[entry.name]).rows
        return lambda start, stop: shards.read_rows(entry, start, stop).float()


def parse_size(text: str) -> int:
    """'1GB', '500MB', '1GiB'를 바이트로 바꾼다."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise UsageError(f"max_shard_size를 읽을 수 없다: '{text}'. 1GB나 500MB처럼 적는다")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def open_job(peft_root: str, base_model: str | None, cache_dir: str | None, onto: str) -> Job:
    """어댑터와 기반 모델을 찾아 서로 맞는지 본다. 디스크에 쓰는 것은 없다.

    Raises:
        UsageError: 어댑터나 기반 모델이 없거나, 손상되었거나, 서로 맞지 않는다.
    """
    root = Path(peft_root)
    adapter = find_adapter(root)
    config = lora.read_config(adapter)
    updates = lora.read_updates(adapter, config)
    facts = (checkpoint.read_manifest(adapter) or {}).get("run", {})
    folder, warning = find_base(base_model, config, facts, cache_dir)
    base = open_model_folder(folder)
    disk = diskmap.read(base)
    dtype = getattr(torch, str(facts.get("dtype", {}).get("shown", "float32")), torch.float32)
    return Job(root, adapter, config, base, disk, lora.match_base(updates, adapter, base, disk), onto, dtype,
               (warning,) if warning else ())


def find_base(base_model: str | None, config: dict, facts: dict, cache_dir: str | None) -> tuple[Path, str | None]:
    """기반 모델의 폴더와 알릴 것. 적지 않았으면 어댑터가 말하는 것이고, hub id면 받아 온다.

    맞는지는 모양이 정한다. 사용자가 손수 적은 것의 이름이나 설정이 다르면 알리기만 한다.

    Raises:
        UsageError: 폴더가 없거나 받지 못했다.
    """
    trained_on = str(config.get("base_model_name_or_path") or "")
    if base_model is None and not trained_on:
        raise UsageError("어댑터가 기반 모델을 말하지 않는다. --base_model을 적는다")
    asked = find_input(base_model or trained_on)
    try:
        require_base(asked, shapes=False)  # 이름과 모양은 diskmap과 match_base가 본다
    except UsageError as error:
        if base_model is not None:
            raise
        raise UsageError(f"어댑터가 말하는 기반 모델을 쓸 수 없다({error}). 있는 곳을 --base_model로 적는다") from None
    if not Path(asked).is_dir():
        asked = _download(asked, cache_dir)
    expected = facts.get("base_model", {}).get("id")
    from_folder = expected not in (None, hashlib.sha256(trained_on.encode()).hexdigest())
    name, given = (Path(text.replace("\\", "/")).name for text in (trained_on, base_model or trained_on))
    differs = expected != model_digest(asked) if from_folder else bool(name) and name != given
    warning = (f"기반 모델 {asked}는 어댑터가 말하는 {trained_on}과 이름이나 설정이 다르다. 모양이 맞으면 합친다. "
               "배운 기반 모델이 맞는지 본다")
    return Path(asked), warning if differs else None


def _download(hub_id: str, cache_dir: str | None) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(hub_id, cache_dir=cache_dir,
                                 allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    except Exception as error:  # 연결, 권한, 이름 가운데 무엇이 잘못되었든 할 일은 같다
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"기반 모델 {hub_id}을 받지 못했다({type(error).__name__}: {reason}). 받아 둔 폴더를 "
                         f"--base_model로 적거나, 인터넷에 이어진 곳에서 받는다: hf download {hub_id}") from None


def check_target(output_dir: str, job: Job, extra_bytes: int) -> None:
    """쓸 자리가 비었고, 남의 폴더가 아니고, 디스크에 자리가 있는지 본다.

    Args:
        extra_bytes: 가중치 말고 더 쓸 바이트(GGUF).
    """
    output = Path(output_dir).resolve()
    for owner, folder in (("기반 모델", job.base.path), ("어댑터", job.adapter), ("어댑터", job.root)):
        if output == folder.resolve() or output.is_relative_to(folder.resolve()):
            raise UsageError(f"output_dir이 {owner}의 폴더거나 그 안이다: {output_dir}. 다른 곳을 적는다")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"output_dir이 비어 있지 않다: {output_dir}. 새 폴더를 적거나 먼저 지운다")
    parent = next(folder for folder in output.parents if folder.is_dir())
    needed = sum(tensor.n_bytes for tensor in plan(job, {})) + extra_bytes + SPARE_BYTES
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UsageError(f"디스크에 {needed / 1e9:.2f} GB가 필요한데 {free / 1e9:.2f} GB만 남았다: {parent}")


def quantised_entries(job: Job) -> dict[str, bool]:
    """4비트로 올릴 때 NF4를 다녀오는 디스크의 tensor의 이름 -> [in, out]으로 놓였는지."""
    found = {name: job.disk.entries.get(f"{name}.weight") for name in nf4.quantised_modules(job.base.path)}
    return {entry.name: name in job.disk.transposed for name, entry in found.items() if entry is not None}


def plan(job: Job, quantised: dict[str, bool]) -> list[Planned]:
    """쓸 tensor들. 기반 모델의 차례 그대로다.

    갱신이 없는 16비트 tensor는 바이트 그대로 옮긴다. 32비트 모델은 fp16으로 적는다.
    모델이 읽지 않는 tensor(옛 GPT-NeoX의 mask)는 가중치가 아니므로 값을 따지지도 고치지도 않는다.
    """
    used = job.disk.used
    sizes: dict[str, int] = {}
    for entry in job.base.tensors.values():
        if entry.name in used:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.start
    halve = max(sizes, key=lambda dtype: sizes[dtype]) == "F32"
    planned = []
    for entry in sorted(job.base.tensors.values(), key=lambda entry: (entry.file.name, entry.start)):
        if entry.name not in used:
            planned.append(Planned(entry.name, entry.dtype, entry.shape, partial(shards.raw_chunks, entry)))
            continue
        dtype = "F16" if halve and entry.dtype == "F32" else entry.dtype
        update = job.updates.get(entry.name)
        plain = update is None and entry.name not in quantised and dtype == entry.dtype
        chunks = partial(_copied, entry) if plain else partial(_merged, job, entry, update, dtype, quantised)
        planned.append(Planned(entry.name, dtype, entry.shape, chunks))
    return planned


def _copied(entry: TensorEntry) -> Iterator[memoryview]:
    for chunk in shards.raw_chunks(entry):
        require_finite(chunk, entry.dtype, entry)
        yield chunk


def _merged(job: Job, entry: TensorEntry, update: lora.Update | None, dtype: str,
            quantised: dict[str, bool]) -> Iterator[memoryview]:
    """fp32로 더하고 `dtype`으로 한 번만 반올림한다."""
    rows = job.base_rows(entry, quantised)
    for start, stop in shards.row_spans(entry.shape):
        values = rows(start, stop)
        if update is not None:
            values += update.rows(start, stop)
        chunk = shards.to_bytes(values.to(shards.DTYPES[dtype]))
        require_finite(chunk, dtype, entry)
        yield chunk


def require_finite(chunk: memoryview, dtype: str, entry: TensorEntry) -> None:
    """NaN과 inf가 없는지 본다. 둘은 지수의 비트가 모두 1이라, 비트를 정수로 읽으면 같은 부호의 수 가운데 가장 크다."""
    if dtype not in _LARGEST:
        return
    kind, largest = _LARGEST[dtype]
    bits = np.frombuffer(chunk, f"i{kind}")
    if bits.size and (bits.max() >= largest or bits.view(f"u{kind}").max() >= largest + 2 ** (8 * kind - 1)):
        raise UsageError(f"{entry.name}에 NaN이나 inf가 있거나 16비트에 담기지 않는다: {entry.file}")


def write_model(folder: Path, job: Job, max_bytes: int, say: Callable[[str], None]) -> dict:
    """가중치와 그 곁의 파일을 모두 쓴다. shard마다의 크기와 sha256을 돌려준다."""
    quantised = quantised_entries(job) if job.onto == "quantized" else {}
    hashed = shards.write_model(folder, plan(job, quantised), max_bytes, say)
    write_companions(folder, job)
    return hashed


def write_companions(folder: Path, job: Job) -> None:
    """설정, 토크나이저, 템플릿, 어댑터, 모델 카드를 쓴다. 끝 토큰은 토크나이저의 것으로 바로잡는다."""
    tokenizer = load_tokenizer(job.base.path)
    ends = list(end_token_ids(tokenizer, job.base.path))
    ends = ends if len(ends) > 1 else ends[0]
    dtypes = {tensor.dtype for tensor in plan(job, {})}
    dtype = "bfloat16" if "BF16" in dtypes else "float16"
    config = {key: value for key, value in job.base.config.items() if key not in ("torch_dtype", "_name_or_path")}
    config |= {"dtype": dtype, "eos_token_id": ends}
    if text_config(config) is not config:
        config["text_config"] = {**config["text_config"], "dtype": dtype, "eos_token_id": ends}
        config["text_config"].pop("torch_dtype", None)
    _write_json(folder / "config.json", config)
    generation = _read_json(job.base.path / "generation_config.json")
    pad = generation.get("pad_token_id", end_token_id(tokenizer))
    _write_json(folder / "generation_config.json", {**generation, "eos_token_id": ends, "pad_token_id": pad})
    for name in TOKENIZER_FILES:
        if (job.base.path / name).is_file():
            shutil.copyfile(job.base.path / name, folder / name)
    prompt = next((place for place in (job.adapter, job.root) if read_prompt_info(place)), None)
    if prompt is not None:
        shutil.copyfile(prompt / PROMPT_FILE, folder / PROMPT_FILE)
    (folder / ADAPTER_FOLDER).mkdir()
    for name in (lora.CONFIG_FILE, lora.WEIGHTS_FILE):
        shutil.copyfile(job.adapter / name, folder / ADAPTER_FOLDER / name)
    (folder / "README.md").write_text(modelcard.render(job, folder), encoding="utf-8")


def finish(folder: Path, job: Job, hashed: dict, proof: dict | None) -> None:
    """merge-report.json을 쓰고, 모든 파일의 크기와 sha256을 담은 manifest.json을 맨 끝에 쓴다."""
    _write_json(folder / REPORT_FILE, {
        "base_model": str(job.base.path), "base_digest": model_digest(job.base.path), "adapter": str(job.adapter),
        "merge_onto": job.onto, "updated_tensors": len(job.updates), "proof": proof})
    files = dict(hashed)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in files:
            files[name] = {"size": file.stat().st_size, "sha256": checkpoint.file_sha256(file)}
    checkpoint.write_manifest(folder, {"run": {}, "files": files})


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict:
    return read_json(file, "") if file.is_file() else {}
