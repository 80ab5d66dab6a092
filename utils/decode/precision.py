"""모델의 가중치를 몇 비트로 올릴지 고른다."""

import math
from typing import NamedTuple

import psutil

from utils.engine.families import describe
from utils.engine.family import Family
from utils.errors import UsageError
from utils.model import vram
from utils.model.folder import ModelFolder, open_model_folder
from utils.model.loader import Device
from utils.model.nf4 import SCALE_BYTES

SPARE = 0.6e9  # 가중치 말고 답을 만드는 데 드는 바이트: KV cache, 버퍼, CUDA context
LEAST = 0.3e9  # 그 가운데 짧은 답에도 드는 것. CUDA context는 이미 잡혀 있다
VALUE_BYTES = {"4bit": 1 / 2 + SCALE_BYTES, "8bit": 1.0, None: 2.0}  # 선형층의 값 하나의 바이트


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
    free = vram.left(device.device) if kind == "cuda" else psutil.virtual_memory().available
    room = f"남은 {'VRAM' if kind == 'cuda' else 'RAM'} {free / 1e9:.1f} GB"
    if need <= free or kind == "mps":
        return Precision(None, f"{name}. {need / 1e9:.1f} GB가 {room}에 들어간다")
    return Precision("4bit", f"4비트(NF4). {name}에 드는 {need / 1e9:.1f} GB가 {room}에 들어가지 않는다")


def require_room(base_model: str, quantize: str | None, free: float) -> None:
    """가중치가 VRAM에 들어가는지 올리기 전에 본다. 넘치면 다 올려 갈 때에야 죽는다.

    Args:
        quantize: `load_base`의 것.
        free: 쓸 수 있는 VRAM(바이트).

    Raises:
        UsageError: 들어가지 않는다.
    """
    need = weight_bytes(open_model_folder(base_model), quantize) + LEAST
    if need > free:
        how = {"4bit": "4비트로 줄여도", "8bit": "8비트로는", None: "16비트로는"}[quantize]
        advice = "" if quantize == "4bit" else "--load_4bit True를 적거나, "
        raise UsageError(f"이 모델은 {how} VRAM이 {need / 1e9:.1f} GB 드는데 {free / 1e9:.1f} GB만 비어 있다. {advice}"
                         "카드를 쓰는 다른 프로그램을 닫거나 더 작은 모델을 쓴다")


def weight_bytes(folder: ModelFolder, quantize: str | None) -> float:
    """올린 가중치의 바이트. 구조를 모르면 모든 값을 줄인 것으로 보아 실제보다 작다."""
    family = describe(folder.config)
    if isinstance(family, Family):
        linear = family.layers * sum(shape.rows * shape.columns for shape in family.linears().values())
        rest = family.vocab * family.hidden * (1 if family.tied else 2)
    else:
        linear, rest = sum(math.prod(entry.shape) for entry in folder.tensors.values()), 0
    return linear * VALUE_BYTES[quantize] + 2 * rest
