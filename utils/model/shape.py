"""가중치를 하나도 읽지 않고, config.json이 말하는 모델과 safetensors의 모양이 맞는지 본다."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from utils.errors import UsageError, first_line
from utils.model.configs import auto_config
from utils.model.folder import ModelFolder, text_config

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class Loaded(NamedTuple):
    """받아들인 모델과, 어긋난 것을 transformers가 알린 것(`missing_keys`, `mismatched_keys` 따위)."""

    model: nn.Module
    found: dict[str, set]


def require_shapes(folder: ModelFolder) -> None:
    """헤더에 적힌 모양만 가진 빈 tensor(meta)를 transformers가 실제로 읽는 길로 읽혀 본다.

    이름을 바꾸고, 묶인 출력 행렬을 나누고, 전문가를 합치는 일까지 transformers가 그대로 하므로 온전한 모델은 거절하지
    않는다. 이미 양자화된 모델은 모양이 파일마다 달라 보지 않는다.

    Raises:
        UsageError: 설정으로 모델을 만들 수 없거나, tensor가 모자라거나, 모양이 다르다.
    """
    if folder.config.get("quantization_config") is not None:
        return
    texts = (folder.config, text_config(folder.config))
    counts = [text[key] for text in texts for key in LAYER_COUNTS if key in text]
    n_layers = max((count for count in counts if isinstance(count, int | float)), default=0)
    if n_layers > len(folder.tensors):  # 빈 모델도 층마다 메모리가 든다. 층에는 적어도 tensor 하나가 있다
        raise UsageError(f"config.json과 가중치가 맞지 않는다: {folder.path}에 층이 {n_layers:,}개라는데 "
                         f"tensor는 {len(folder.tensors):,}개다. 모델을 다시 받는다")
    build = Build.of(folder.path)
    empty = {name: torch.empty(entry.shape, dtype=torch.float16, device="meta")
             for name, entry in folder.tensors.items()}
    try:
        _, found = build.load(empty, "meta", torch.float16)
    except Exception:  # 빈 tensor로는 해 볼 수 없는 구조다. 맞지 않으면 실제로 읽을 때 드러난다
        return
    for name, written, expected in sorted(found["mismatched_keys"]):
        raise UsageError(f"config.json과 가중치의 모양이 맞지 않는다: {folder.path}의 {name}. 가중치는 "
                         f"{_shown(written)}, 설정은 {_shown(expected)}다. 모델을 다시 받는다")
    missing = sorted(found["missing_keys"])
    if missing:
        raise UsageError(f"config.json과 가중치가 맞지 않는다: {folder.path}에 {missing[0]}(모두 {len(missing)}개)이 "
                         "없다. 모델을 다시 받는다")


@dataclass(frozen=True)
class Build:
    """모델 폴더의 설정과, transformers가 그 설정에 고르는 class."""

    config: object
    kind: type[nn.Module]

    @classmethod
    def of(cls, path: Path) -> "Build":
        """폴더의 config.json이 말하는 것.

        Raises:
            UsageError: 설정으로 모델을 만들 수 없다.
        """
        try:
            config = auto_config().from_pretrained(str(path), trust_remote_code=False)
            return cls(config, type(empty_model(config)))
        except UsageError:
            raise
        except Exception as error:  # 설정의 어느 값이 어떻게 잘못되었든, 실제로 읽을 때도 같은 곳에서 멈춘다
            raise UsageError(f"config.json으로 모델을 만들 수 없다: {path} ({first_line(error)}). "
                             "모델을 다시 받는다") from None

    def load(self, state: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> Loaded:
        """`state`를 디스크에서 읽은 것처럼 받아들인 모델. 이름을 바꾸고 합치고 나누는 일은 transformers가 한다."""
        with quiet_transformers():
            return Loaded(*self.kind.from_pretrained(
                None, config=self.config, state_dict=state, device_map={"": device}, dtype=dtype,
                output_loading_info=True, ignore_mismatched_sizes=True))


def empty_model(config):
    """설정만으로 만든, 가중치가 없는(meta) causal LM.

    Args:
        config: `AutoConfig`가 읽은 설정.

    Raises:
        UsageError: transformers에 이 구조의 causal LM이 없다.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise UsageError(f"글을 잇는 모델(causal LM)이 아니다: model_type {config.model_type}. 그림이나 소리를 함께 "
                         "다루거나 글을 바꾸는 모델은 다루지 않는다. 글만 다루는 모델을 적는다")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """해 보기만 하는 것이므로 막대도 경고도 보이지 않게 한다."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _shown(shape) -> str:
    return " x ".join(map(str, shape))
