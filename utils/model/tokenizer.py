"""토크나이저: 읽기와, 답의 끝을 뜻하는 토큰들."""

from pathlib import Path

from utils import hub
from utils.chat import ChatPrompter
from utils.chat_settings import CHAT
from utils.errors import UsageError, first_line
from utils.files import read_json
from utils.model.folder import text_config


def load_tokenizer(model: str | Path, cache_dir: str | None = None):
    """토크나이저를 읽는다. pad 토큰이 없으면 끝 토큰으로 정한다.

    Raises:
        UsageError: 토크나이저가 없거나 받지 못했거나, 끝 토큰을 모른다.
    """
    from transformers import AutoTokenizer

    folder = hub.folder(model, cache_dir, hub.SETTINGS_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"토크나이저를 읽지 못했다: {model} ({first_line(error)}). 그 파일들을 다시 받는다") from None
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # transformers는 파일이 없으면 낱말이 없는 것을 만든다
        raise UsageError(f"모델 폴더에 토크나이저(tokenizer.json이나 tokenizer.model)가 없다: {model}. 다시 받는다")
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


def answer_end_id(tokenizer, prompter) -> int:
    """이 템플릿으로 배운 답이 끝나는 토큰. 대화 템플릿이면 템플릿이 답 뒤에 놓는 것, 아니면 토크나이저의 eos다."""
    tokens = prompter.end_tokens if prompter.name == CHAT else []
    return int(tokenizer.convert_tokens_to_ids(tokens[0])) if tokens else end_token_id(tokenizer)


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
    if getattr(tokenizer, "chat_template", None):
        ends += map(tokenizer.convert_tokens_to_ids, ChatPrompter(tokenizer).end_tokens)
    written = [end for end in ends[1:] if type(end) is int and end in special]  # 설정이 토크나이저에 없는 번호도 적는다
    known = [end for end in written if "unused" not in special[end]]
    return tuple(dict.fromkeys([ends[0], *known]))
