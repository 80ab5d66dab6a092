"""대화할 모델: 기반 모델, 그 위의 어댑터들, 템플릿, 가중치의 비트 수를 찾아 올린다."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from utils.chat_settings import CHAT
from utils.console import detail
from utils.data.encoder import head_ids
from utils.decode.decoder import Decoder
from utils.decode.precision import choose_precision, require_room
from utils.errors import UsageError
from utils.model import loader, vram
from utils.model.adapter import (
    PromptInfo,
    can_turn_off,
    find_adapter,
    load_adapter,
    read_adapter_config,
    read_prompt_info,
    tokenizer_folder,
)
from utils.model.folder import (
    ADAPTER_WEIGHTS,
    find_trained_base,
    model_digest,
    read_safetensors_header,
)
from utils.model.merged import has_adapter, has_merged, load_merged_4bit
from utils.model.tokenizer import answer_end_id, end_token_ids, load_tokenizer
from utils.paths import BASE_DEMO, find_input, shown
from utils.prompter import make_prompter
from utils.seals import read_manifest
from utils.talk.answerer import Answerer
from utils.talk.line import Line
from utils.talk.models import BASE, Choice, Models, unique_names


@dataclass(frozen=True)
class Source:
    """대화할 모델이 있는 곳.

    Attributes:
        base_model: 기반 모델의 폴더.
        adapter: 얹을 어댑터의 폴더. 없으면 기반 모델이나 병합한 모델만 쓴다.
        run_dir: 사용자가 적은 학습 폴더. prompt.json과 run.json이 여기에 있다.
        asked: 사용자나 어댑터가 적은 기반 모델의 이름. hub id일 수 있다.
    """

    base_model: str
    adapter: Path | None = None
    run_dir: Path | None = None
    asked: str = ""

    @property
    def name(self) -> str:
        return Path(self.run_dir or self.asked or self.base_model).name

    @property
    def title(self) -> str:
        """페이지의 제목: 기반 모델과, 있으면 그 위의 어댑터."""
        base = Path(self.asked or self.base_model).name
        return f"{base} + {self.name}" if self.run_dir else base


def find_source(base_model: str | None, peft_root: str | None, say: Callable[[str], None],
                cache_dir: str | None = None) -> Source:
    """쓸 모델을 찾고, 가중치를 올리기 전에 온전하고 안전한지 본다. hub id면 받아 온다.

    기반 모델을 손수 적었으면 어댑터가 말하는 이름과 달라도 쓴다. 맞는지는 얹을 때 모양이 정한다.

    Raises:
        UsageError: 모델이나 어댑터가 없거나, 받지 못했거나, 온전하지 않거나, 안전하지 않다.
    """
    adapter = run_dir = None
    trained_on = ""
    if peft_root is not None:
        run_dir = Path(find_input(peft_root))
        adapter = find_adapter(run_dir)
        read_safetensors_header(adapter / ADAPTER_WEIGHTS)
        trained_on = str(read_adapter_config(adapter).get("base_model_name_or_path") or "")
        if not base_model and not trained_on:
            raise UsageError(f"어댑터가 기반 모델을 말하지 않는다: {adapter}. --base_model을 적는다")
        say(f"어댑터: {shown(adapter)}")
    facts = (read_manifest(adapter) or {}).get("run", {}) if adapter else {}
    asked = find_input(base_model) if base_model else find_trained_base(trained_on or str(BASE_DEMO), facts)
    if trained_on and not base_model and Path(asked).exists() and Path(asked) != Path(find_input(trained_on)):
        say(f"어댑터가 말하는 기반 모델({trained_on})이 그 자리에 없어 {shown(asked)}를 쓴다")
    recorded = bool(trained_on) and not base_model
    folder = str(loader.receive_base(asked, cache_dir, recorded))
    if trained_on and base_model and _last(trained_on) != _last(base_model):
        say(f"주의: 기반 모델({base_model})의 이름이 어댑터의 것({trained_on})과 다르다. 배운 기반 모델이 맞는지 "
            "본다")
    if adapter is not None and has_merged(folder, adapter):
        raise UsageError(f"이미 이 어댑터를 합친 모델이다: {asked}. 두 번 얹지 않게 --peft_root를 빼고 실행한다")
    return Source(folder, adapter, run_dir, asked)


def _last(name: str) -> str:
    return Path(name.replace("\\", "/")).name


def find_sources(base_model: str | None, peft_roots: Sequence[str], say: Callable[[str], None],
                 cache_dir: str | None = None) -> list[Source]:
    """어댑터마다의 `Source`. 어댑터를 적지 않았으면 기반 모델 하나다.

    Raises:
        UsageError: `find_source`의 것이거나, 같은 어댑터를 두 번 적었거나, 어댑터들의 기반 모델이 다르다.
    """
    sources = [find_source(base_model, root, say, cache_dir) for root in peft_roots or (None,)]
    first, adapters = sources[0], [source.adapter.resolve() for source in sources if source.adapter]
    for place, adapter in enumerate(adapters):
        if adapter in adapters[:place]:
            raise UsageError(f"같은 어댑터를 두 번 적었다: {shown(adapter)}. 하나만 적는다")
    for source in sources[1:]:
        if model_digest(source.base_model) != model_digest(first.base_model):
            raise UsageError(f"어댑터들의 기반 모델이 다르다: {shown(first.run_dir)}는 {first.asked}, "
                             f"{shown(source.run_dir)}는 {source.asked}. 같은 기반 모델에서 배운 것만 함께 적는다")
    return sources


def load_models(sources: Sequence[Source], cache_dir: str | None, load_4bit: bool | None, load_8bit: bool,
                prompt_template: str | None, say: Callable[[str], None]) -> Models:
    """기반 모델을 한 번 올리고 어댑터를 모두 얹어, 이름으로 고를 수 있게 한다."""
    answerers = load_answerers(sources, cache_dir, load_4bit, load_8bit, prompt_template, say)
    names = unique_names(source.name for source in sources)
    choices = [Choice(name, answerer) for name, answerer in zip(names, answerers, strict=True)]
    if answerers[0].can_compare or not (sources[0].adapter or has_adapter(sources[0].base_model)):
        choices.append(Choice(BASE, answerers[0], tuned=False))
    if len(sources) > 1:
        for name, source in zip(names, sources, strict=True):
            say(f"모델 {name}: {shown(source.adapter)}")
    return Models(choices)


def load_answerers(sources: Sequence[Source], cache_dir: str | None, load_4bit: bool | None, load_8bit: bool,
                   prompt_template: str | None, say: Callable[[str], None]) -> list[Answerer]:
    """기반 모델을 한 번 올리고 어댑터마다 Answerer를 만든다. 고른 것과 이유를 모두 알린다.

    템플릿과 끝 토큰은 어댑터마다 제 prompt.json의 것이고, 모델과 줄은 함께 쓴다.
    """
    device = loader.choose_device()
    say(device.line())
    base_model = sources[0].base_model
    precision = choose_precision(base_model, device, load_4bit, load_8bit)
    say(f"가중치: {precision.reason}")
    if device.device.type == "cuda":
        free = vram.left(device.device)
        require_room(base_model, precision.quantize, free)
        if vram.SPILLS:  # 답이 길어져도 넘치지 않게 한다
            vram.cap(device.device, free)
    tokenizers = [find_tokenizer(source, cache_dir, say) for source in sources]
    prompters = [choose_prompter(source, prompt_template, tokenizer, say)
                 for source, tokenizer in zip(sources, tokenizers, strict=True)]
    model, can_compare = load_tuned(sources, device, precision.quantize, cache_dir, say)
    line = Line(say)
    answerers = []
    for source, tokenizer, prompter, name in zip(sources, tokenizers, prompters, _peft_names(sources), strict=True):
        decoder = Decoder(model, tokenizer, find_ends(source, tokenizer), adapter=name if len(sources) > 1 else None)
        detail(f"계산: {decoder.path}")
        if device.device.type == "cuda" and not decoder.is_fast:
            say("이 모델에는 전용 커널을 쓸 수 없어 더 느리게 답한다. 답은 같다(이유: --verbose True)")
        end_id = answer_end_id(tokenizer, prompter)
        answerers.append(Answerer(decoder, tokenizer, prompter, end_id, say, can_compare, line))
    say(f"대화 길이: 질문과 답을 합쳐 {min(each.context for each in answerers):,}토큰까지 메모리에 들어간다")
    return answerers


class Tuned(NamedTuple):
    """어댑터를 얹은 모델과, 어댑터를 끄면 기반 모델이 되어 비교할 수 있는지."""

    model: object
    can_compare: bool


def load_tuned(sources: Sequence[Source], device: loader.Device, quantize: str | None, cache_dir: str | None,
               say: Callable[[str], None]) -> Tuned:
    """기반 모델을 한 번 올리고 어댑터를 모두 얹는다. 합친 모델의 4비트는 합치기 전으로 되돌려 어댑터를 얹는다."""
    base_model, adapters = sources[0].base_model, [source.adapter for source in sources if source.adapter]
    if quantize == "4bit" and not adapters and has_adapter(base_model):
        model = load_merged_4bit(base_model, device, cache_dir)
        say("병합 모델의 4비트: 병합 전의 가중치를 4비트로 줄이고 어댑터를 얹어, 배운 것이 반올림에 묻히지 않는다")
        return Tuned(model, True)
    can_compare = bool(adapters) and all(map(can_turn_off, adapters))
    if adapters and not can_compare:
        say("주의: 꺼도 기반 모델이 되지 않는 어댑터라 기반 모델과 비교하지 않는다(bias 따위가 남는다)")
    model = loader.load_base(base_model, device, quantize, cache_dir)
    for source, name in zip(sources, _peft_names(sources), strict=True):
        if source.adapter:
            model = load_adapter(model, source.adapter, name)
    return Tuned(model, can_compare)


def find_tokenizer(source: Source, cache_dir: str | None, say: Callable[[str], None]):
    """어댑터를 배운 토크나이저. 어댑터가 제 것을 담고 있지 않으면 기반 모델의 것이다."""
    folder = source.base_model if source.adapter is None else tokenizer_folder(source.adapter, source.base_model)
    if folder == source.adapter:
        say(f"토크나이저: {shown(folder)}(어댑터와 함께 담긴 것)")
    return load_tokenizer(folder, cache_dir)


def _peft_names(sources: Sequence[Source]) -> list[str]:
    """PEFT 안에서의 이름. torch의 모듈 이름이 되므로 폴더의 이름을 쓸 수 없다(점이나 train 따위)."""
    return ["default", *(f"adapter{number}" for number in range(2, len(sources) + 1))]


def find_ends(source: Source, tokenizer) -> set[int]:
    """답을 끝내는 토큰들: 기반 모델의 것과, 학습할 때 적어 둔 것."""
    info = find_prompt_info(source)
    trained = (info.end_token_id, *info.end_token_ids) if info else ()
    return {*end_token_ids(tokenizer, source.base_model), *trained}


def find_prompt_info(source: Source) -> PromptInfo | None:
    """어댑터나 모델에 저장된 템플릿과 끝 토큰."""
    folders = [folder for folder in (source.adapter, source.run_dir, source.base_model) if folder]
    return next(filter(None, map(read_prompt_info, folders)), None)


def choose_prompter(source: Source, prompt_template: str | None, tokenizer, say: Callable[[str], None]):
    """저장된 템플릿을 쓴다. 다른 것을 고르면 알린다."""
    info = find_prompt_info(source)
    # 배운 것과 이름이 같으면 생각과 날짜까지 배울 때의 것이다
    stored = info.template if info and prompt_template in (None, info.template.get("name")) else None
    prompter = make_prompter(stored or prompt_template or "default", tokenizer)
    if info and stored is None and prompter.template != info.template:
        say(f"주의: 모델이 배운 템플릿은 '{info.template.get('name')}'이다. '{prompter.name}'을 쓰면 답이 나빠진다")
    elif info:
        warn_of_tokens(info, prompter, tokenizer, say)
    why = "" if info or prompt_template else " (저장된 것이 없어 기본값)"
    if why and getattr(tokenizer, "chat_template", None):
        why = f" (저장된 것이 없어 기본값. 모델의 대화 템플릿으로 물으려면 --prompt_template {CHAT})"
    say(f"템플릿: {prompter.name}{why}")
    return prompter


def warn_of_tokens(info: PromptInfo, prompter, tokenizer, say: Callable[[str], None]) -> None:
    """배울 때와 같은 템플릿인데 토크나이저가 달라 끝과 글머리의 토큰이 다르면 알린다."""
    end_id = answer_end_id(tokenizer, prompter)
    if info.end_token_id != end_id:
        say(f"주의: 배울 때의 끝 토큰은 {info.end_token_id}번인데 이 템플릿과 토크나이저의 것은 {end_id}번이다")
    head = tuple(head_ids(tokenizer))  # 대화 템플릿은 글머리를 스스로 적는다
    if prompter.name != CHAT and info.head_ids != head:
        say(f"주의: 배울 때 글머리에 붙인 토큰은 {list(info.head_ids)}인데 지금은 {list(head)}이다. 다시 가르친다")
