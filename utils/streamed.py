"""가중치를 올리지 않고 디스크에서 조각으로 읽으며 계산하는 모델을 만든다. 크기와 상관없이 적은 메모리로 검산한다."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils.errors import UsageError
from utils.lora import Update, find_tensor
from utils.modelfolder import ModelFolder, TensorEntry
from utils.shards import read_rows, row_spans

MAX_RESIDENT_BYTES = 32 * 2**20
Rows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Source:
    """가중치를 어디서 읽고 무엇을 얹는지.

    Attributes:
        folder: 가중치가 든 폴더.
        rows: tensor를 받아 [start, stop) 행을 fp32로 주는 함수를 고른다.
        updates: tensor 이름 -> 합치지 않고 얹을 갱신.
    """

    folder: ModelFolder
    rows: Callable[[TensorEntry], Rows]
    updates: dict[str, Update]


class StreamedMatrix(nn.Module):
    """`nn.Linear`나 `Conv1D`를 대신한다. 행렬을 행의 조각으로 읽어 곱하고 바로 버린다."""

    def __init__(self, entry: TensorEntry, rows: Rows, bias: torch.Tensor | None, update: Update | None,
                 input_first: bool, device: torch.device):
        super().__init__()
        self._entry, self._rows, self._bias, self._update = entry, rows, bias, update
        self._input_first, self._device = input_first, device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self._entry.shape[1] if self._input_first else self._entry.shape[0]
        out = torch.zeros(*x.shape[:-1], wide, device=x.device)
        for start, stop in row_spans(self._entry.shape):
            part = self._rows(start, stop).to(self._device)
            if self._input_first:
                out += x[..., start:stop] @ part
            else:
                out[..., start:stop] = x @ part.T
        if self._bias is not None:
            out += self._bias
        if self._update is not None:
            a, b = self._update.a.to(self._device), self._update.b.to(self._device)
            out += (x @ a.T) @ b.T * self._update.scale
        return out


class StreamedEmbedding(nn.Module):
    """`nn.Embedding`을 대신한다. 나온 토큰의 행만 읽는다."""

    def __init__(self, entry: TensorEntry, device: torch.device):
        super().__init__()
        self._entry, self._device = entry, device

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        unique, where = ids.unique(return_inverse=True)
        table = torch.cat([read_rows(self._entry, i, i + 1) for i in unique.tolist()]).float()
        return table.to(self._device)[where]


def build(config_folder: Path, source: Source, device: torch.device) -> nn.Module:
    """큰 행렬은 디스크에 두고 작은 것(norm)만 올린 모델. 계산은 fp32다.

    Raises:
        UsageError: 이 구조는 조각으로 계산할 줄 모른다.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(str(config_folder), attn_implementation="sdpa")
    config.dtype = torch.float32
    config.use_cache = False
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tied = getattr(config, "tie_word_embeddings", False)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D):
            entry = find_tensor(source.folder.tensors, f"{name}.weight")
            if entry is None and tied and name == head:
                entry = find_tensor(source.folder.tensors, f"{embedding}.weight")
            entry = _required(entry, name)
            bias = _small(source.folder, f"{name}.bias", device) if module.bias is not None else None
            replacement = StreamedMatrix(entry, source.rows(entry), bias, source.updates.get(entry.name),
                                         isinstance(module, Conv1D), device)
        elif isinstance(module, nn.Embedding):
            entry = _required(find_tensor(source.folder.tensors, f"{name}.weight"), name)
            replacement = StreamedEmbedding(entry, device)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, leaf, replacement)
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        value = _small(source.folder, name, device)
        if value.shape != parameter.shape:
            raise UsageError(f"{name}의 모양이 구조와 다르다: {list(value.shape)}")
        setattr(model.get_submodule(parent) if parent else model, leaf, nn.Parameter(value, requires_grad=False))
    return model.to(device)


def _required(entry: TensorEntry | None, name: str) -> TensorEntry:
    if entry is None:
        raise UsageError(f"{name}의 가중치를 찾지 못해 합친 것을 검산할 수 없다. 검산을 건너뛰려면 --verify False")
    return entry


def _small(folder: ModelFolder, name: str, device: torch.device) -> torch.Tensor:
    entry = _required(find_tensor(folder.tensors, name), name)
    if entry.end - entry.start > MAX_RESIDENT_BYTES:
        kind = folder.config["model_type"]
        raise UsageError(f"이 구조({kind})는 검산할 줄 모른다({name}). --verify False로 건너뛴다")
    return read_rows(entry, 0, entry.shape[0]).float().to(device)
