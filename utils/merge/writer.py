"""어댑터를 기반 모델에 합쳐 모델 폴더 하나를 쓴다. 쓸 것을 정하고, 차례대로 쓰고, 다 된 것에만 이름을 준다."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from utils.errors import UsageError
from utils.files import file_sha256, read_json
from utils.merge.job import Job
from utils.model import lora, nf4, shards
from utils.model.adapter import PROMPT_FILE, read_prompt_info
from utils.model.folder import ADAPTER_FILES, TensorEntry, model_digest, text_config
from utils.model.merged import ADAPTER_FOLDER, MERGE_REPORT
from utils.model.shards import Planned
from utils.model.tokenizer import end_token_id, end_token_ids, load_tokenizer
from utils.paths import portable
from utils.seals import write_manifest

_CARD = """---
base_model: {base}
language: ko
library_name: transformers
pipeline_tag: text-generation
tags: [lora, merged]
---
# {name}

`{base}`에 LoRA 어댑터를 합친 모델이다. 라이선스와 알려진 한계는 기반 모델의 것을 따른다.

| 항목 | 값 |
|---|---|
| 구조 | {kind} |
| rank, alpha | {rank}, {alpha} |
| 배운 층 | {targets} |
| 합친 바탕 | {onto} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

- 끝 토큰은 토크나이저의 것이 맨 앞이고, 기반 모델의 설정이 말하는 다른 끝이 뒤따른다. 설정 파일에도 그렇게 적혀 있다.
- `prompt.json`에 학습에 쓴 템플릿이 있다. 다른 형식으로 물으면 답이 나빠진다.
- `adapter/`는 4비트로 띄울 때 쓴다. 합친 가중치를 그대로 4비트로 줄이면 배운 것의 일부가 반올림에 묻힌다.
  `python generate.py --load_4bit True --base_model {name}`은 어댑터를 뺀 가중치를 4비트로 올리고 어댑터를 얹는다.
- `merge-report.json`은 합친 뒤 다시 읽어 비교한 결과이고, `manifest.json`은 파일마다의 크기와 sha256이다.
"""
_ONTO = {"original": "기반 모델의 원래 가중치", "quantized": "NF4를 다녀온 가중치"}

# 구조마다 다른 이름의 어휘 파일은 토크나이저가 말한다
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja")
PROCESSOR_FILES = ("chat_template.json", "processor_config.json", "preprocessor_config.json")  # 그림도 보는 모델의 입력
MORE_TEMPLATES = "additional_chat_templates"  # 대화 템플릿이 여럿인 토크나이저의 나머지
_LARGEST = {"F16": (2, 0x7C00), "BF16": (2, 0x7F80), "F32": (4, 0x7F800000)}  # 바이트의 수, 양의 무한대의 비트
SPARE_BYTES = 64 * 2**20  # 가중치 곁의 파일(설정, 토크나이저, 어댑터)
SMALLEST_SHARD = 1000  # 바이트
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """'1GB', '500MB', '1GiB'를 바이트로 바꾼다.

    accelerate의 `convert_file_size_to_int`는 쓰지 않는다: '1.5gb'를 비트로 읽어 8로 나누고 '4096'과 TB를 모른다.

    Raises:
        UsageError: 크기로 읽을 수 없거나, 파일이 수없이 나뉠 만큼 작다.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match[2].upper())
    size = 0 if unit is None else float(match[1]) * unit
    if size < SMALLEST_SHARD:
        raise UsageError(f"max_shard_size를 읽을 수 없다: '{text}'. 1GB나 500MB처럼 단위를 붙여 1KB 이상으로 적는다")
    return int(size)


def check_target(output_dir: str, job: Job, extra_bytes: int) -> None:
    """쓸 폴더가 비었고, 남의 폴더가 아니고, 디스크에 여유 공간이 있는지 본다.

    Args:
        extra_bytes: 가중치 말고 더 쓸 바이트(GGUF).

    Raises:
        UsageError: 기반 모델이나 어댑터의 폴더거나, 비어 있지 않거나, 디스크의 여유 공간이 모자란다.
    """
    output = Path(output_dir).resolve()
    for owner, folder in (("기반 모델", job.base.path), ("어댑터", job.adapter), ("어댑터", job.root)):
        if output == folder.resolve() or output.is_relative_to(folder.resolve()):
            raise UsageError(f"output_dir이 {owner}의 폴더거나 그 안이다: {output_dir}. 다른 곳을 적는다")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "비어 있지 않다" if output.is_dir() else "폴더가 아니라 파일이다"
        raise UsageError(f"output_dir이 {what}: {output_dir}. 새 폴더를 적거나 먼저 지운다")
    placeless = sorted(quantised_built(job)) if job.onto == "quantized" else []
    if placeless:
        raise UsageError(f"이 모델의 {placeless[0]}(모두 {len(placeless)}개)는 파일의 tensor 여럿을 합치거나 나누어 "
                         "만들므로 NF4를 다녀온 값을 적을 수 없다. --merge_onto original로 합친다")
    parent = next(folder for folder in output.parents if folder.is_dir())
    needed = sum(tensor.n_bytes for tensor in plan(job, {})) + extra_bytes + SPARE_BYTES
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UsageError(f"디스크에 {needed / 1e9:.2f} GB가 필요한데 {free / 1e9:.2f} GB만 남았다: {parent}")


def quantised_entries(job: Job) -> dict[str, bool]:
    """4비트로 올릴 때 NF4를 다녀오는 디스크의 tensor의 이름 -> [in, out]으로 놓였는지."""
    found = {name: job.disk.entries.get(f"{name}.weight") for name in nf4.quantised_modules(job.base.path)}
    return {entry.name: name in job.disk.transposed for name, entry in found.items() if entry is not None}


def quantised_built(job: Job) -> frozenset[str]:
    """4비트로 올릴 때 NF4를 다녀오는데, 파일의 tensor 여럿을 합치거나 나누어 만들어 파일에 제 자리가 없는 가중치."""
    return frozenset(f"{name}.weight" for name in nf4.quantised_modules(job.base.path)) & job.disk.built.keys()


def plan(job: Job, quantised: dict[str, bool]) -> list[Planned]:
    """쓸 tensor들. 기반 모델의 차례 그대로다.

    갱신이 없는 16비트 tensor는 바이트 그대로 옮긴다. 32비트 모델은 fp16으로 적는다.
    모델이 읽지 않는 tensor(옛 GPT-NeoX의 mask)는 가중치가 아니므로 값을 따지지도 고치지도 않는다.
    """
    used = job.disk.used
    sizes: dict[str, int] = {}  # dtype -> 바이트
    for entry in job.base.tensors.values():
        if entry.name in used:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.start
    halve = max(sizes, key=lambda dtype: sizes[dtype]) == "F32"  # 16비트 모델에 섞인 fp32(norm, router)는 그대로 둔다
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
    """바이트 그대로. 값이 유한한지만 본다."""
    for chunk in shards.raw_chunks(entry):
        require_finite(chunk, entry.dtype, entry)
        yield chunk


def _merged(job: Job, entry: TensorEntry, update: lora.Update | None, dtype: str,
            quantised: dict[str, bool]) -> Iterator[memoryview]:
    """W + scale B A를 fp32 [행의 조각, in]로 더하고 `dtype`으로 한 번만 반올림한다.

    16비트에서 더하면 갱신이 먼저 반올림되고 합이 또 반올림되어, W의 눈금보다 작은 갱신이 사라진다.
    """
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
    kind, largest = _LARGEST[dtype]  # 값 하나의 바이트, +inf의 비트를 정수로 읽은 것
    sign = 2 ** (8 * kind - 1)
    bits = np.frombuffer(chunk, f"i{kind}")
    # 부호 있는 정수의 최댓값은 양수 쪽을, 부호 없는 정수의 최댓값은 부호 비트가 켜진 음수 쪽을 본다
    if not bits.size:
        return
    positive, negative = bits.max(), bits.view(f"u{kind}").max()
    if positive >= largest or negative >= largest + sign:
        raise UsageError(f"{entry.name}에 NaN이나 inf가 있거나 16비트에 담기지 않는다: {entry.file}")


def write_model(folder: Path, job: Job, max_bytes: int, say: Callable[[str], None]) -> dict:
    """가중치와 그 곁의 파일을 모두 쓴다. shard마다의 크기와 sha256을 돌려준다."""
    quantised = quantised_entries(job) if job.onto == "quantized" else {}
    hashed = shards.write_model(folder, plan(job, quantised), max_bytes, say)
    write_companions(folder, job)
    return hashed


def write_companions(folder: Path, job: Job) -> None:
    """설정, 토크나이저, 템플릿, 어댑터, 모델 카드를 쓴다. 끝 토큰은 토크나이저의 것으로 바로잡는다."""
    source = job.tokenizer_folder
    tokenizer = load_tokenizer(source)
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
    for name in {*TOKENIZER_FILES, *getattr(tokenizer, "vocab_files_names", {}).values()}:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for name in PROCESSOR_FILES:
        if (job.base.path / name).is_file():
            shutil.copyfile(job.base.path / name, folder / name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, folder / MORE_TEMPLATES)
    prompt = next((place for place in (job.adapter, job.root) if read_prompt_info(place)), None)
    if prompt is not None:
        shutil.copyfile(prompt / PROMPT_FILE, folder / PROMPT_FILE)
    (folder / ADAPTER_FOLDER).mkdir()
    for name in ADAPTER_FILES:
        shutil.copyfile(job.adapter / name, folder / ADAPTER_FOLDER / name)
    (folder / "README.md").write_text(render(job, folder), encoding="utf-8")


def finish(folder: Path, job: Job, hashed: dict, proof: dict | None) -> None:
    """merge-report.json을 쓰고, 모든 파일의 크기와 sha256을 담은 manifest.json을 맨 끝에 쓴다."""
    _write_json(folder / MERGE_REPORT, {
        "base_model": str(job.base.path), "base_digest": model_digest(job.base.path), "adapter": str(job.adapter),
        "merge_onto": job.onto, "updated_tensors": len(job.updates), "proof": proof})
    files = dict(hashed)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in files:
            files[name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    write_manifest(folder, {"run": {}, "files": files})


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict:
    return read_json(file, "") if file.is_file() else {}


def render(job: Job, output: Path) -> str:
    """합친 폴더의 모델 카드(README.md)."""
    targets = sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in job.updates})
    base = str(job.config.get("base_model_name_or_path") or job.base.path)
    return _CARD.format(base=portable(base), name=output.name,
                        kind=job.base.config["model_type"], rank=job.config["r"], alpha=job.config["lora_alpha"],
                        targets=", ".join(targets), onto=_ONTO[job.onto])
