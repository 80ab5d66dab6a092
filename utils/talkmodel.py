"""대화할 모델 하나를 찾고 올린다: 기반 모델, 어댑터, 템플릿, 가중치의 비트 수."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils import loader, served
from utils.answerer import Answerer
from utils.decoder import Decoder
from utils.errors import UsageError
from utils.modelfolder import read_safetensors_header, require_base
from utils.paths import BASE_DEMO, find_input, shown
from utils.precision import choose_precision
from utils.prompter import make_prompter


@dataclass(frozen=True)
class Source:
    """대화할 모델이 있는 곳.

    Attributes:
        adapter: 얹을 어댑터의 폴더. 없으면 기반 모델이나 병합한 모델만 쓴다.
        run_dir: 사용자가 적은 학습 폴더. prompt.json과 run.json이 여기에 있다.
    """

    base_model: str
    adapter: Path | None = None
    run_dir: Path | None = None

    @property
    def name(self) -> str:
        return Path(self.run_dir or self.base_model).name


def find_source(base_model: str | None, peft_root: str | None, say: Callable[[str], None]) -> Source:
    """쓸 모델을 찾고, 가중치를 올리기 전에 온전하고 안전한지 본다.

    Raises:
        UsageError: 모델이나 어댑터가 없거나, 온전하지 않거나, 안전하지 않다.
    """
    adapter = run_dir = None
    if peft_root is not None:
        run_dir = Path(find_input(peft_root))
        adapter = loader.find_adapter(run_dir)
        read_safetensors_header(adapter / loader.ADAPTER_FILES[1])
        base_model = base_model or loader.read_adapter_config(adapter).get("base_model_name_or_path")
        say(f"어댑터: {shown(adapter)}")
    base_model = find_input(base_model or str(BASE_DEMO))
    require_base(base_model)
    if adapter is not None and served.has_merged(base_model, adapter):
        raise UsageError(f"이미 이 어댑터를 합친 모델이다: {base_model}. 두 번 얹지 않게 --peft_root를 빼고 실행한다")
    return Source(base_model, adapter, run_dir)


def load_answerer(source: Source, cache_dir: str | None, load_4bit: bool | None, load_8bit: bool,
                  prompt_template: str | None, say: Callable[[str], None]) -> Answerer:
    """모델을 올린다. 고른 것과 까닭을 모두 알린다."""
    device = loader.choose_device()
    say(f"장치: {device.device} / {str(device.dtype).removeprefix('torch.')}. {device.reason}")
    quantize, reason = choose_precision(source.base_model, device, load_4bit, load_8bit)
    say(f"가중치: {reason}")
    tokenizer = loader.load_tokenizer(source.base_model, cache_dir)
    end_id = loader.end_token_id(tokenizer)
    prompter = choose_prompter(source, prompt_template, tokenizer, say)
    can_compare = source.adapter is not None
    if quantize == "4bit" and not can_compare and served.has_adapter(source.base_model):
        model = served.load_merged_4bit(source.base_model, device, cache_dir)
        can_compare = True
        say("병합 모델의 4비트: 병합 전의 가중치를 4비트로 줄이고 어댑터를 얹어, 배운 것이 반올림에 묻히지 않는다")
    else:
        model = loader.load_base(source.base_model, device, quantize, cache_dir)
        if source.adapter:
            model = loader.load_adapter(model, source.adapter)
    decoder = Decoder(model, tokenizer, end_id)
    say(f"계산: {decoder.path}")
    say(f"대화 길이: 질문과 답을 합쳐 {decoder.context:,}토큰까지 메모리에 들어간다")
    return Answerer(decoder, tokenizer, prompter, end_id, say, can_compare)


def choose_prompter(source: Source, prompt_template: str | None, tokenizer, say: Callable[[str], None]):
    """저장된 템플릿을 쓴다. 다른 것을 고르면 알린다."""
    folders = [folder for folder in (source.adapter, source.run_dir, source.base_model) if folder]
    info = next(filter(None, map(loader.read_prompt_info, folders)), None)
    prompter = make_prompter(prompt_template or (info.template if info else "default"), tokenizer)
    if info and prompter.template != info.template:
        say(f"주의: 모델이 배운 템플릿은 '{info.template.get('name')}'이다. '{prompter.name}'을 쓰면 답이 나빠진다")
    if info and info.end_token_id != tokenizer.eos_token_id:
        say(f"주의: 배울 때의 끝 토큰은 {info.end_token_id}번인데 토크나이저의 것은 {tokenizer.eos_token_id}번이다")
    say(f"템플릿: {prompter.name}{'' if info or prompt_template else ' (저장된 것이 없어 기본값)'}")
    return prompter
