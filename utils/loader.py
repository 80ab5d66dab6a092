"""장치와 dtype, 토크나이저, 기반 모델, 어댑터를 고르고 올리는 일을 맡는다."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from utils.checkpoint import MANIFEST, damage, newest_valid
from utils.errors import UsageError
from utils.modelfolder import read_json, require_base, text_config

PROMPT_FILE = "prompt.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Device:
    """고른 장치와 계산 dtype, 그리고 고른 까닭."""

    device: torch.device
    dtype: torch.dtype
    reason: str


@dataclass(frozen=True)
class PromptInfo:
    """어댑터나 병합 모델이 스스로를 설명하는 정보. `prompt.json`에 담긴다.

    Attributes:
        template: 학습에 쓴 템플릿 전체.
        end_token: 답의 끝을 뜻하는 토큰의 글자.
        end_token_id: 그 토큰의 번호.
        cutoff_len: 학습한 블록의 길이(토큰).
        end_token_ids: 답을 멈추게 하는 모든 토큰의 번호. 옛 파일에는 없어서 비어 있다.
    """

    template: dict
    end_token: str
    end_token_id: int
    cutoff_len: int
    end_token_ids: tuple[int, ...] = ()


def choose_device() -> Device:
    """장치와 dtype을 한 번 고른다. bf16은 하드웨어가 직접 지원할 때(compute capability 8.0부터)만 쓴다."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        major, minor = torch.cuda.get_device_capability()
        card = f"{torch.cuda.get_device_name()}(compute capability {major}.{minor})"
        if major >= 8:
            return Device(device, torch.bfloat16, f"{card}는 bf16을 직접 계산한다")
        return Device(device, torch.float16, f"{card}는 bf16이 없어 fp16을 쓴다")
    if torch.backends.mps.is_available():
        return Device(torch.device("mps"), torch.float16, "Apple GPU(MPS)는 fp16을 쓴다. bitsandbytes는 쓸 수 없다")
    return Device(torch.device("cpu"), torch.float32, "쓸 수 있는 GPU가 없어 CPU에서 fp32를 쓴다")


def load_config(base_model: str | Path, cache_dir: str | None = None) -> dict:
    """글을 다루는 부분의 설정을 dict로 읽는다.

    구조마다 다른 이름(GPT-2의 `n_layer`)은 흔한 이름(`num_hidden_layers`)으로도 들어 있고, config.json에서 빠진 값은
    transformers의 기본값이다. 이미 양자화된 모델이면 `quantization_config`가 있다.

    Raises:
        UsageError: 설정을 읽을 수 없다.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(base_model), cache_dir=cache_dir, trust_remote_code=False)
        text = config.get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"모델의 설정을 읽지 못했다: {base_model} ({_first_line(error)})") from None
    found = text.to_dict()
    for common, own in text.attribute_map.items():
        found.setdefault(common, found.get(own))
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


def load_tokenizer(model: str | Path, cache_dir: str | None = None):
    """토크나이저를 읽는다. pad 토큰이 없으면 끝 토큰으로 정한다.

    Raises:
        UsageError: 토크나이저가 없거나 끝 토큰을 모른다.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), cache_dir=cache_dir, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"토크나이저를 읽지 못했다: {model} ({_first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise UsageError(f"토크나이저에 끝 토큰(eos_token)이 없다: {model}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_token_id(tokenizer) -> int:
    """답의 끝을 뜻하는 토큰. 설정 파일의 eos가 아니라 토크나이저의 eos를 믿는다.

    polyglot-ko의 config.json은 eos를 0이라 하지만 `<|endoftext|>`는 2다.
    """
    return int(tokenizer.eos_token_id)


def require_known_ids(ids, n_rows: int, tokenizer, where: str) -> None:
    """토큰 번호가 모두 embedding의 행 안에 있는지 본다. 밖의 번호는 CPU에서는 IndexError, 커널에서는 남의 메모리다.

    Args:
        ids: 토큰 번호의 배열이나 목록.
        n_rows: 입력 embedding의 행 수.
        tokenizer: 번호를 글자로 보여 줄 토크나이저.
        where: 번호가 나온 곳. 메시지의 앞에 적힌다.

    Raises:
        UsageError: 밖의 번호가 있다. 그 토큰과 번호와 embedding의 크기를 말한다.
    """
    ids = np.asarray(ids, dtype=np.int64).ravel()
    outside = ids[(ids < 0) | (ids >= n_rows)]
    if len(outside):
        worst = int(outside.max())
        token = tokenizer.convert_ids_to_tokens(worst) if worst >= 0 else None
        raise UsageError(f"{where}에 모델이 모르는 토큰이 있다: {token!r}의 번호는 "
                         f"{worst:,}인데 모델의 embedding은 {n_rows:,}행이다. 이 모델과 함께 나온 토크나이저를 쓴다")


def end_token_ids(tokenizer, folder: str | Path | None) -> tuple[int, ...]:
    """답을 끝내는 토큰들: 토크나이저의 eos, 모델의 두 설정 파일이 말하는 것, 대화 템플릿이 답 뒤에 놓는 것의 차례다.

    대화 모델은 끝이 여럿이다(Gemma의 `<end_of_turn>`은 generation_config.json에만 있다). 설정 파일의 것은 토크나이저의
    특수 토큰일 때만 믿는다. polyglot-ko의 0은 쓰지 않는 자리(`<|unused0|>`)다.

    Args:
        folder: 기반 모델의 폴더. None이거나 폴더가 아니면 설정 파일은 보지 않는다.
    """
    ends = [end_token_id(tokenizer)]
    for name in ("generation_config.json", "config.json") if folder is not None else ():
        file = Path(folder) / name
        content = read_json(file, "") if file.is_file() else {}
        for holder in (content, text_config(content)) if isinstance(content, dict) else ():
            said = holder.get("eos_token_id")
            ends += said if isinstance(said, list) else [said]
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends.append(next((number for number in _after_answer(tokenizer) if number in special), None))
    known = [end for end in ends[1:] if type(end) is int and end in special and "unused" not in special[end]]
    return tuple(dict.fromkeys([ends[0], *known]))


def _after_answer(tokenizer) -> list[int]:
    """대화 템플릿이 답 바로 뒤에 놓는 토큰들. 템플릿이 없거나 쓸 수 없으면 비어 있다."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    answer = "여기까지"
    turns = [{"role": "user", "content": "가"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # 템플릿은 모델과 함께 온 프로그램이라 무슨 오류든 낼 수 있다
        return []
    return tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]


def load_base(base_model: str | Path, device: Device, quantize: str | None = None, cache_dir: str | None = None):
    """기반 모델을 올린다. safetensors만 읽고 원격 코드는 실행하지 않는다.

    Args:
        quantize: None(장치의 dtype 그대로), "4bit"(NF4, 이중 양자화), "8bit".

    Raises:
        UsageError: 모델이 없거나 온전하지 않거나 NaN이 들어 있다.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    require_base(base_model)
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
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            str(base_model), dtype=device.dtype, quantization_config=quantization,
            device_map={"": "cpu" if is_sharded() else device.device}, cache_dir=cache_dir, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True)  # attention은 sdpa, 없는 구조면 eager를 스스로 고른다
    except (OSError, ValueError) as error:
        raise UsageError(f"기반 모델을 읽지 못했다: {base_model} ({_first_line(error)})") from None
    except RuntimeError as error:
        if "mismatched_sizes" not in str(error):
            raise
        raise UsageError(f"config.json과 가중치의 모양이 맞지 않는다: {base_model}. 모델을 다시 받는다") from None
    if loaded["missing_keys"]:
        raise UsageError(f"config.json과 가중치가 맞지 않는다: {base_model}에 {sorted(loaded['missing_keys'])[0]}(모두 "
                         f"{len(loaded['missing_keys'])}개)가 없다. 모델을 다시 받는다")
    keep_nf4_layout(model)
    _refuse_nan(model, base_model)
    return model


def is_sharded() -> bool:
    """모델을 여러 카드에 나누어 담는가(`accelerate launch --use_fsdp`).

    FSDP는 정수 가중치를 나누지 못하므로 4비트를 계산 dtype의 그릇에 담고, 카드 하나에 다 올리지 않도록 RAM에 올린다.
    """
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def keep_nf4_layout(model) -> None:
    """bitsandbytes가 avx512_bf16 CPU에서 4비트 가중치를 제자리에서 바꾸어 놓지 못하게 한다.

    바뀌면 그 뒤의 학습은 죽고, 재개는 정확하지 않고, 병합은 쓰레기가 된다.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def load_adapter(model, adapter: Path):
    """`find_adapter`가 찾은 어댑터를 모델에 얹는다. 병합하지 않는다.

    Raises:
        UsageError: 설정이 잘못되었거나, 이 모델의 어댑터가 아니다.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    advice = "배운 기반 모델이 맞는지, 파일이 온전한지 본다"
    try:
        tuned = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
        # PEFT는 자리를 못 찾은 tensor를 말없이 버린다. 같은 값을 한 번 더 넣어 그 이름을 받는다
        state = load_file(Path(adapter) / ADAPTER_FILES[1])
        found = set_peft_model_state_dict(tuned, state)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"어댑터를 얹지 못했다: {adapter} ({_first_line(error)}). {advice}") from None
    empty = sorted(name for name in found.missing_keys if _learned(name))
    for names, said in ((sorted(found.unexpected_keys), "모델에 놓일 자리가 없다"), (empty, "어댑터에 없다")):
        if names:
            raise UsageError(f"어댑터를 얹지 못했다: {adapter}. {names[0]}(모두 {len(names)}개)가 {said}. {advice}")
    return tuned


def _learned(name: str) -> bool:
    """어댑터가 채워야 하는 자리의 이름인지. 다른 이름은 기반 모델의 가중치다."""
    return ".lora_" in name or ".modules_to_save." in name or ".trainable_tokens_" in name


def find_adapter(peft_root: str | Path) -> Path:
    """어댑터를 찾는 단 하나의 규칙: `peft_root` 안의 완성된 어댑터, 없으면 온전한 `checkpoint-N` 가운데 가장 새것.

    Raises:
        UsageError: 폴더가 없거나 어댑터가 없다.
    """
    root = Path(peft_root)
    if not root.is_dir():
        raise UsageError(f"어댑터 폴더가 없다: {root}")
    if all((root / name).is_file() for name in ADAPTER_FILES):
        found = damage(root, ADAPTER_FILES) if (root / MANIFEST).exists() else None
        if found is None:
            return root
        raise UsageError(f"어댑터가 손상되었다. {root}: {found}. "
                         "체크포인트가 남아 있으면 그 폴더를 --peft_root로 적는다")
    checkpoint = newest_valid(root)
    if checkpoint is not None:
        return checkpoint
    if (root / ADAPTER_FILES[0]).is_file():
        raise UsageError(f"어댑터에 가중치({ADAPTER_FILES[1]})가 없다: {root}")
    raise UsageError(f"어댑터가 없다: {root} (finetune-lora.py의 --output_dir를 적는다)")


def read_adapter_config(adapter: Path) -> dict:
    return read_json(adapter / ADAPTER_FILES[0], f"어댑터 설정이 없다: {adapter / ADAPTER_FILES[0]}")


def read_prompt_info(folder: str | Path) -> PromptInfo | None:
    """폴더에 담긴 템플릿과 끝 토큰을 읽는다. 이 도구가 만든 폴더가 아니면 None이다."""
    file = Path(folder) / PROMPT_FILE
    if not file.is_file():
        return None
    content = read_json(file, "")
    try:
        return PromptInfo(**{**content, "end_token_ids": tuple(content.get("end_token_ids", ()))})
    except (AttributeError, TypeError):
        raise UsageError(f"{file}의 항목이 맞지 않는다") from None


def write_prompt_info(folder: str | Path, info: PromptInfo) -> None:
    text = json.dumps(asdict(info), ensure_ascii=False, indent=2)
    (Path(folder) / PROMPT_FILE).write_text(text + "\n", encoding="utf-8")


def _refuse_nan(model, base_model: str | Path) -> None:
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        values = parameter if state is None else (state.state2.absmax if state.nested else state.absmax)
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise UsageError(f"기반 모델에 NaN이나 inf가 들어 있다: {base_model}의 {name}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
