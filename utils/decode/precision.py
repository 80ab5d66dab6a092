"""모델의 가중치를 몇 비트로 올릴지 고른다."""

import math
from typing import NamedTuple

import psutil
import torch

from utils.engine.families import describe
from utils.engine.family import Family
from utils.errors import UsageError
from utils.model.folder import open_model_folder
from utils.model.loader import Device

SPARE = 0.6e9  # 가중치 말고 답을 만드는 데 드는 바이트: KV cache, 버퍼, CUDA context


class Precision(NamedTuple):
    """`load_base`에 줄 quantize("4bit", "8bit", None)와 그것을 고른 이유."""

    quantize: str | None
    reason: str


def choose_precision(base_model: str, device: Device, load_4bit: bool | None, load_8bit: bool) -> Precision:
    """플래그가 없으면 남은 메모리에 들어가는 가장 빠른 것을 고른다.

    전용 커널이 아는 구조는 GPU에서 NF4를 바로 읽으므로 4비트가 가장 빠르다(H100에서 polyglot 1.3b: 1,390 대 797
    토큰/초). 학습도 같은 4비트에서 했다. 나머지는 풀어 쓰는 일이 없는 16비트가 빠르고, 들어가지 않을 때만 4비트로
    줄인다.

    Raises:
        UsageError: 두 플래그를 함께 주었다.
    """
    if load_4bit and load_8bit:
        raise UsageError("--load_4bit와 --load_8bit 가운데 하나만 쓴다")
    if load_4bit:
        return Precision("4bit", "--load_4bit")
    if load_8bit:
        return Precision("8bit", "--load_8bit")
    kind = device.device.type
    width = device.dtype.itemsize
    name = f"{width * 8}비트({device.dtype_name})"
    folder = open_model_folder(base_model)
    if load_4bit is None and kind == "cuda" and isinstance(describe(folder.config), Family):
        return Precision("4bit", "4비트(NF4). 전용 커널이 바로 읽고, 읽을 가중치가 적어 가장 빠르다. "
                                 "16비트는 --load_4bit False")
    values = sum(math.prod(entry.shape) for entry in folder.tensors.values())
    need = values * width + SPARE
    free = torch.cuda.mem_get_info(device.device)[0] if kind == "cuda" else psutil.virtual_memory().available
    room = f"남은 {'VRAM' if kind == 'cuda' else 'RAM'} {free / 1e9:.1f} GB"
    if need <= free or kind == "mps":
        return Precision(None, f"{name}. {need / 1e9:.1f} GB가 {room}에 들어간다")
    return Precision("4bit", f"4비트(NF4). {name}에 드는 {need / 1e9:.1f} GB가 {room}에 들어가지 않는다")
