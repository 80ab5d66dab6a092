"""가중치를 올리지 않고 디스크에서 조각으로 읽으며 계산하는 모델. 크기와 상관없이 적은 메모리로 검산한다."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UsageError
from utils.model import nf4
from utils.model.configs import auto_config
from utils.model.diskmap import DiskMap
from utils.model.folder import ModelFolder, TensorEntry
from utils.model.lora import Update
from utils.model.shape import Build
from utils.model.shards import DTYPES, read_rows, read_whole, row_spans

Rows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Source:
    """가중치를 어디서 읽고 무엇을 얹는지.

    Attributes:
        folder: 가중치가 든 폴더.
        disk: 그 tensor들이 메모리의 어디에 놓이는지.
        rows: tensor를 받아 [start, stop) 행을 fp32로 주는 함수를 고른다.
        updates: 디스크의 tensor 이름 -> 합치지 않고 얹을 갱신.
        dtype: 다른 tensor를 합쳐 만드는 가중치(전문가들)를 올리는 dtype.
        rounded: 그런 가중치 가운데 NF4를 다녀온 값으로 둘 것.
    """

    folder: ModelFolder
    disk: DiskMap
    rows: Callable[[TensorEntry], Rows]
    updates: dict[str, Update]
    dtype: torch.dtype = torch.float32
    rounded: frozenset[str] = frozenset()


class StreamedWeight(torch.Tensor):
    """디스크에 있는 가중치. 층은 제 `forward`를 그대로 계산하고, 가중치를 쓰는 순간에만 여기서 읽는다.

    `F.linear`에는 행의 조각을, `F.embedding`에는 나온 토큰의 행만 읽어 준다. 다른 계산에는 온전한 행렬을 읽어 준다.
    """

    @classmethod
    def make(cls, entry: TensorEntry, rows: Rows, update: Update | None, device: torch.device) -> "StreamedWeight":
        weight = torch.empty(entry.shape, device="meta").as_subclass(cls)
        weight.entry = entry
        weight.read = rows
        weight.update = update
        weight.place = device
        return weight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:  # 부를 때마다 새로 만들어지는 함수라 is로는 같지 않다
            return args[0].place
        if func is F.linear and isinstance(args[1], cls):
            return args[1].multiply(*args[:1], *args[2:], **kwargs)
        if func is F.embedding and isinstance(args[1], cls):
            return args[1].look_up(args[0])
        if getattr(func, "__name__", "") == "__get__" or func in _SHAPES:  # 속성과 모양은 값을 읽지 않고 답한다
            found = super().__torch_function__(func, types, args, kwargs)
            return func(args[0].whole()) if isinstance(found, torch.Tensor) else found  # `.T`처럼 값이 든 속성
        def read(part):
            return part.whole() if isinstance(part, cls) else part

        return func(*map(read, args), **{name: read(part) for name, part in kwargs.items()})

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out]. 합치지 않고 y = x W^T + b + scale (x A^T) B^T로 더해 B A를 만들지 않는다."""
        rows, _ = self.entry.shape
        out = torch.empty(*x.shape[:-1], rows, device=x.device)
        for start, stop in row_spans(self.entry.shape):
            part = self.read(start, stop).to(x.device)  # [stop - start, in]
            out[..., start:stop] = x @ part.T
        if bias is not None:
            out += bias
        if self.update is not None:
            # B A는 [out, in]이라 W만큼 크다. 좁은 쪽을 먼저 지나면 [..., r]만 생긴다
            a, b = self.update.a.to(x.device), self.update.b.to(x.device)
            out += (x @ a.T) @ b.T * self.update.scale
        return out

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> [..., 폭]. 나온 토큰마다 한 행씩만 읽는다. embedding에는 얹을 갱신이 없다."""
        unique, where = ids.unique(return_inverse=True)  # where [...]: 토큰마다 unique의 몇 번째인지
        rows = torch.cat([self.read(i, i + 1) for i in unique.tolist()])  # [나온 토큰의 종류, 폭]
        return rows.to(self.place)[where]

    def whole(self) -> torch.Tensor:
        """갱신까지 더한 온전한 행렬 [out, in], fp32."""
        values = torch.cat([self.read(start, stop) for start, stop in row_spans(self.entry.shape)])
        if self.update is not None:
            values += self.update.rows(0, self.entry.shape[0])
        return values.to(self.place)


_SHAPES = (torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point)


def build(source: Source, device: torch.device) -> nn.Module:
    """행렬은 디스크에 두고 벡터(norm, bias)와 합쳐 만드는 가중치만 올린 모델. 계산은 fp32다.

    Raises:
        UsageError: 모델의 가중치가 폴더에 없다.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = auto_config().from_pretrained(str(source.folder.path))
    config.dtype = torch.float32
    config.use_cache = False
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    disk = source.disk
    resident = _built(source)
    for name in model.state_dict():
        entry = disk.entries.get(name)
        if entry is not None and entry.dtype not in DTYPES:  # 정수 표(토큰 -> 전문가)는 값 그대로 쓴다
            value = read_whole(entry)
        elif entry is not None and len(entry.shape) > 1:
            value = StreamedWeight.make(entry, source.rows(entry), source.updates.get(entry.name), device)
        elif entry is not None:
            value = read_whole(entry).to(source.dtype).float()
        elif name in resident:
            value = resident[name]
        else:
            raise UsageError(f"{name}의 가중치를 찾지 못해 합친 것을 검산할 수 없다. 검산을 건너뛰려면 --verify False")
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        (module._buffers if leaf in module._buffers else module._parameters)[leaf] = value
    for module in model.modules():  # 계산하면서 만드는 값(rotary의 주파수)과 벡터를 장치에 올린다
        for kept in (module._buffers, module._parameters):
            for leaf, value in kept.items():
                if value is not None and not isinstance(value, StreamedWeight):
                    kept[leaf] = value.to(device)
    return model


def _built(source: Source) -> dict[str, torch.Tensor]:
    """합치거나 나누어 만드는 가중치를 transformers가 만든 값으로. 다른 tensor는 자리만 있는 값 하나로 대신한다."""
    needed = {name for sources in source.disk.built.values() for name in sources}
    if not needed:
        return {}
    used = {name: entry for name, entry in source.folder.tensors.items() if name in source.disk.used}
    state = {name: torch.zeros(()).expand(entry.shape) for name, entry in used.items()}  # 값 하나를 되풀이해 가리킨다
    state |= {name: read_whole(used[name]).to(source.dtype).float() for name in needed}
    loaded = Build.of(source.folder.path).load(state, "cpu", torch.float32).model.state_dict()
    built = {name: loaded[name] for name in source.disk.built}
    for name in built.keys() & source.rounded:
        built[name] = nf4.round_trip(built[name], source.dtype).float()
    return built


def read_plain(entry: TensorEntry) -> Rows:
    """파일에 적힌 값 그대로를 fp32로 읽는 함수. (start, stop) -> [stop - start, 폭]."""
    return lambda start, stop: read_rows(entry, start, stop).float()
