"""장치와 dtype, 설정, 기반 모델: 한 번 고르고, 검사하고, 올린다."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from utils import hub
from utils.errors import UsageError, first_line
from utils.model.configs import auto_config
from utils.model.folder import PUBLISHED, download_command, open_model_folder
from utils.paths import ROOT, looks_like_hub_id
from utils.process import is_sharded, local_rank, n_local_processes


@dataclass(frozen=True)
class Device:
    """고른 장치와 계산 dtype, 그리고 고른 이유."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    @property
    def dtype_name(self) -> str:
        """bfloat16처럼 적은 dtype."""
        return str(self.dtype).removeprefix("torch.")

    def line(self) -> str:
        """고른 것과 이유 한 줄."""
        return f"장치: {self.device} / {self.dtype_name}. {self.reason}"


def choose_device() -> Device:
    """장치와 dtype을 한 번 고른다. bf16은 하드웨어가 직접 지원할 때(compute capability 8.0부터)만 쓴다."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        major, minor = torch.cuda.get_device_capability()
        card = f"{torch.cuda.get_device_name()}(compute capability {major}.{minor})"
        if major >= 8:
            return Device(device, torch.bfloat16, f"bf16을 직접 계산하는 {card}")
        return Device(device, torch.float16, f"bf16이 없어 fp16을 쓰는 {card}")
    if torch.backends.mps.is_available():
        return Device(torch.device("mps"), torch.float16, "Apple GPU(MPS)는 fp16을 쓴다. bitsandbytes는 쓸 수 없다")
    return Device(torch.device("cpu"), torch.float32, "쓸 수 있는 GPU가 없어 CPU에서 fp32를 쓴다")


def load_config(base_model: str | Path, cache_dir: str | None = None) -> dict:
    """글을 다루는 부분의 설정을 dict로 읽는다.

    구조마다 다른 이름(GPT-2의 `n_layer`)은 흔한 이름(`num_hidden_layers`)으로도 들어 있고, config.json에서 빠진 값은
    transformers의 기본값이다. 이미 양자화된 모델이면 `quantization_config`가 있다.

    Raises:
        UsageError: 설정을 받거나 읽을 수 없다.
    """
    folder = hub.folder(base_model, cache_dir, hub.SETTINGS_FILES)
    try:
        config = auto_config().from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"모델의 설정을 읽지 못했다: {base_model} ({first_line(error)})") from None
    found = text.to_dict()
    for common, own in text.attribute_map.items():
        found.setdefault(common, found.get(own))
    found.setdefault("max_position_embeddings", found.get("max_seq_len"))  # MPT와 DBRX의 문맥 길이
    quantized = getattr(config, "quantization_config", None)
    return found if quantized is None else {**found, "quantization_config": quantized}


def require_trainable(base_model: str | Path, config: dict) -> None:
    """이 도구의 세 단계를 모두 지날 수 있는 기반 모델인지 본다.

    이미 양자화된 모델 위에서 배운 어댑터는 합칠 16비트 가중치가 없어, 학습이 끝난 뒤에야 막힌다.

    Args:
        config: `load_config`가 읽은 설정.

    Raises:
        UsageError: 이미 양자화되었다.
    """
    quantized = config.get("quantization_config")
    if quantized is not None:
        kind = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        kind = getattr(kind, "value", kind) or "알 수 없는 방식"
        raise UsageError(f"이미 양자화된 모델({kind})에서는 배우지 않는다: {base_model}. 배운 것을 합칠 16비트 "
                         "가중치가 없다. 양자화하기 전의 모델을 --base_model로 적는다(4비트로 줄이는 일은 학습이 한다)")


def load_base(base_model: str | Path, device: Device, quantize: str | None = None, cache_dir: str | None = None):
    """기반 모델을 올린다. safetensors만 읽고 원격 코드는 실행하지 않는다.

    Args:
        quantize: None(장치의 dtype 그대로), "4bit"(NF4, 이중 양자화), "8bit".

    Raises:
        UsageError: 모델이 없거나 온전하지 않거나 NaN이 들어 있다.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    require_base(base_model)
    hub.folder(base_model, cache_dir)
    if quantize and device.device.type == "mps":
        raise UsageError("Apple GPU에서는 4비트와 8비트를 쓸 수 없다. --load_4bit와 --load_8bit를 빼고 실행한다")
    settings = {
        "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                 "bnb_4bit_compute_dtype": device.dtype,
                 "bnb_4bit_quant_storage": device.dtype if is_sharded() else torch.uint8},
        "8bit": {"load_in_8bit": True},
    }
    quantization = BitsAndBytesConfig(**settings[quantize]) if quantize else None
    if is_sharded():  # RAM에서 양자화한다. torchrun은 프로세스마다 스레드를 하나만 주어 몇 분이 걸린다
        torch.set_num_threads(max(1, os.cpu_count() // n_local_processes()))
    try:
        with _no_warm_up():  # attention은 transformers가 고른다: sdpa, 없는 구조면 eager
            model, loaded = AutoModelForCausalLM.from_pretrained(
                str(base_model), dtype=device.dtype, quantization_config=quantization,
                device_map={"": "cpu" if is_sharded() else device.device}, cache_dir=cache_dir, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"기반 모델을 읽지 못했다: {base_model} ({first_line(error)})") from None
    except RuntimeError as error:
        if "conversion of the weights" in str(error):  # transformers는 양자화하다 난 오류를 모아 이렇게만 말한다
            raise UsageError(f"기반 모델을 양자화하지 못했다: {base_model}. 대개 VRAM이 모자라서다. 카드를 쓰는 다른 "
                             "프로그램을 닫거나 더 작은 모델을 쓴다") from None
        if "mismatched_sizes" not in str(error):
            raise
        raise UsageError(f"config.json과 가중치의 모양이 맞지 않는다: {base_model}. 모델을 다시 받는다") from None
    if loaded["missing_keys"]:
        raise UsageError(f"config.json과 가중치가 맞지 않는다: {base_model}에 {sorted(loaded['missing_keys'])[0]}(모두 "
                         f"{len(loaded['missing_keys'])}개)가 없다. 모델을 다시 받는다")
    keep_nf4_layout(model)
    _refuse_nan(model, base_model)
    return model


@contextlib.contextmanager
def _no_warm_up() -> Iterator[None]:
    """transformers가 가중치만큼의 VRAM을 한 덩어리로 미리 잡지 않게 한다.

    그 덩어리에는 양자화하기 전의 값이 지나간 틈이 남는다. 학습의 버퍼는 틈에 들어가지 못해 VRAM이 0.1~0.3 GB 더 든다.
    """
    from transformers import modeling_utils

    warm_up = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_, **__: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = warm_up


def keep_nf4_layout(model) -> None:
    """bitsandbytes가 avx512_bf16 CPU에서 4비트 가중치를 제자리에서 바꾸어 놓지 못하게 한다.

    바뀌면 그 뒤의 학습은 죽고, 재개는 정확하지 않고, 병합은 쓰레기가 된다.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def inexact_widths(model) -> list[int]:
    """이 CPU에서 4비트가 바르게 풀리지 않는 층의 폭. GPU와 64의 배수인 폭에서는 비어 있다.

    bitsandbytes의 CPU 커널은 64개짜리 블록이 두 행에 걸치면 앞 행의 배율을 쓴다. 공개된 모델의 폭은 모두 64의 배수다.
    """
    return sorted({module.in_features for module in model.modules() if type(module).__name__ == "Linear4bit"
                   and module.weight.device.type == "cpu" and module.in_features % module.weight.blocksize})


def _refuse_nan(model, base_model: str | Path) -> None:
    # NaN과 inf는 최솟값이나 최댓값에 드러난다. isfinite는 같은 크기의 중간값 셋을 만들어, 어휘가 15만인 embedding에서
    # 1.5 GB를 더 쓴다
    ends = {name: torch.stack([end.float() for values in scales for end in torch.aminmax(values)])
            for name, parameter in model.named_parameters() if (scales := _scales(parameter))}
    if not torch.cat([*ends.values()]).isfinite().all():  # GPU를 한 번만 기다린다
        name = next(name for name, values in ends.items() if not values.isfinite().all())
        raise UsageError(f"기반 모델에 NaN이나 inf가 들어 있다: {base_model}의 {name}")


def _scales(parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """NaN이 하나라도 있으면 NaN이 되는 값들. 4비트 가중치에서는 블록의 배율과, 배율을 다시 줄일 때 뺀 평균이다."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return (state.offset, state.state2.absmax) if state.nested else (state.absmax,)
    return (parameter,) if parameter.is_floating_point() else ()


def receive_base(asked: str, cache_dir: str | None, recorded: bool, shapes: bool = True) -> Path:
    """기반 모델의 온전한 폴더. hub id면 받아 온다.

    Args:
        recorded: 사용자가 적은 것이 아니라 어댑터가 말하는 것인지. 쓸 수 없으면 손수 적으라고 한다.
        shapes: `require_base`의 것.

    Raises:
        UsageError: 폴더가 없거나, 받지 못했거나, 온전하지 않다.
    """
    try:
        if require_base(asked, shapes) is not None:
            return Path(asked)
        folder = hub.folder(asked, cache_dir)
        require_base(folder, shapes)
        return folder
    except UsageError as error:
        if not recorded:
            raise
        raise UsageError(f"어댑터가 말하는 기반 모델을 쓸 수 없다({error}). 있는 곳을 --base_model로 적는다") from None


def require_base(base_model: str | Path, shapes: bool = True) -> dict | None:
    """기반 모델이 로컬 폴더면 온전한지 검사해 config를 돌려준다. hub id면 None이다.

    Args:
        shapes: 설정과 가중치의 모양이 맞는지도 본다. transformers를 불러온다.

    Raises:
        UsageError: 폴더가 없거나 온전하지 않다. 받는 명령을 함께 말한다.
    """
    path = Path(base_model)
    if path.is_dir():
        folder = open_model_folder(path)
        if shapes:
            from utils.model.shape import require_shapes

            require_shapes(folder)
        return folder.config
    if path.is_file():
        raise UsageError(f"모델의 폴더가 아니라 파일이다: {base_model}. config.json과 safetensors가 든 폴더를 적는다"
                         f"{'(GGUF는 읽지 않는다)' if path.suffix == '.gguf' else f': {path.parent}'}")
    if looks_like_hub_id(base_model):
        return None
    command = download_command(path)
    if path.name in PUBLISHED:
        raise UsageError(f"기반 모델이 없다: {base_model}. 받는 명령: {command}")
    here = sorted(each.parent.name for each in (ROOT / "resources").glob("*/config.json"))
    raise UsageError(f"기반 모델이 없다: {base_model}. resources에 있는 것: {', '.join(here)}. "
                     f"polyglot-ko를 받는 명령: {command}")
