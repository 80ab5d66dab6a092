"""디스크의 tensor 하나하나가 메모리의 모델 어디에 놓이는지를 적은 표.

이름의 규칙을 다시 적지 않는다. 이름표를 단 빈 tensor(meta)를 transformers가 실제로 읽는 길로 읽혀 놓인 곳을 본다.
"""

from dataclasses import dataclass

import torch

from utils.errors import UsageError, first_line
from utils.model.folder import ModelFolder, TensorEntry
from utils.model.shape import Build


@dataclass(frozen=True)
class DiskMap:
    """모델이 읽는 tensor와 그 자리.

    Attributes:
        entries: 메모리에서의 이름 -> 값과 모양이 그대로인 디스크의 tensor. 묶인 두 행렬은 같은 tensor를 가리킨다.
        built: 메모리에서의 이름 -> 그것을 만드는 디스크의 tensor들의 이름. 합치거나 나누거나 뒤집어 만든다.
        transposed: 가중치를 [in, out]으로 두는 층(Conv1D)의 이름.
    """

    entries: dict[str, TensorEntry]
    built: dict[str, tuple[str, ...]]
    transposed: frozenset[str]

    @property
    def used(self) -> set[str]:
        """모델이 읽는 디스크의 이름들. 나머지는 옛 버전이 함께 저장한 mask 같은 것이어서 가중치가 아니다."""
        built = {source for sources in self.built.values() for source in sources}
        return {entry.name for entry in self.entries.values()} | built

    @property
    def shared(self) -> set[str]:
        """모델의 두 곳이 함께 쓰는 tensor의 디스크의 이름들(입력과 출력이 묶인 embedding)."""
        names = [entry.name for entry in self.entries.values()]
        return {name for name in names if names.count(name) > 1}


class _Labelled(torch.Tensor):
    """어느 tensor에서 왔는지를 계산을 따라 전하는 빈 tensor.

    Attributes:
        sources: 이 값을 만든 디스크의 tensor들의 이름.
        whole: 디스크의 tensor 하나의 값과 모양 그대로인지. 합치거나 나누거나 뒤집으면 거짓이 된다.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        sources = _sources((args, kwargs))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, _Labelled):
                names = [name for tensor in sources for name in tensor.sources]
                part.sources = tuple(dict.fromkeys(names))  # 거듭된 이름을 빼고 차례는 지킨다
                alone = len(sources) == 1 and sources[0].whole
                part.whole = alone and func in _KEEPS and part.shape == sources[0].shape
        return out


# 값을 바꾸지 않는 연산. `x[...]`는 모양까지 같을 때만 그대로다
_KEEPS = (torch.Tensor.__getitem__, torch.Tensor.to, torch.Tensor.detach, torch.Tensor.requires_grad_,
          torch.Tensor.data.__get__, torch.Tensor.contiguous)


def _sources(value) -> list[_Labelled]:
    if isinstance(value, _Labelled):
        return [value] if hasattr(value, "sources") else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [found for part in value for found in _sources(part)]


def _label(entry: TensorEntry, name: str) -> _Labelled:
    tensor = torch.empty(entry.shape, device="meta").as_subclass(_Labelled)
    tensor.sources, tensor.whole = (name,), True
    return tensor


def read(folder: ModelFolder) -> DiskMap:
    """모델 폴더의 표. 가중치는 읽지 않는다.

    Raises:
        UsageError: 설정으로 모델을 만들 수 없거나, 이미 양자화된 모델이다.
    """
    if folder.config.get("quantization_config") is not None:
        raise UsageError(f"이미 양자화된 모델이라 어댑터를 합칠 수 없다: {folder.path}. "
                         "양자화하지 않은 16비트 모델을 --base_model로 적는다")
    labels = {name: _label(entry, name) for name, entry in folder.tensors.items()}
    build = Build.of(folder.path)
    try:
        model = build.load(labels, "meta", torch.float32).model
    except Exception as error:  # 실제로 읽을 때도 같은 곳에서 멈춘다
        raise UsageError(f"config.json으로 모델을 만들 수 없다: {folder.path} ({first_line(error)}). "
                         "모델을 다시 받는다") from None
    from transformers.pytorch_utils import Conv1D

    entries, built = {}, {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, _Labelled) and value.whole:
            entries[name] = folder.tensors[value.sources[0]]
        elif isinstance(value, _Labelled):
            built[name] = value.sources
    transposed = frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))
    return DiskMap(entries, built, transposed)
