"""Ollama의 Modelfile: 템플릿과 멈출 토큰."""

from pathlib import Path

from utils.chat_settings import CHAT
from utils.model.adapter import read_prompt_info
from utils.model.tokenizer import end_token_ids, load_tokenizer
from utils.prompter import Prompter

_QUESTION, _ANSWER, _SYSTEM = "<질문의 자리>", "<답의 자리>", "<지시의 자리>"
_SLOTS = {_QUESTION: "{{ .Prompt }}", _ANSWER: "{{ .Response }}", _SYSTEM: "{{ .System }}"}


def render_modelfile(folder: Path, gguf_name: str, tokenizer=None) -> str:
    """Ollama의 Modelfile. 템플릿과 멈출 토큰이 들어 있다."""
    tokenizer = tokenizer or load_tokenizer(folder)
    info = read_prompt_info(folder)
    if info is not None and info.template.get("name") == CHAT:
        form = _chat_form(tokenizer, {key: value for key, value in info.template.items() if key != "name"})
    else:
        form = _plain_form(Prompter(info.template if info else "default"))
    ends = [tokenizer.convert_ids_to_tokens(end) for end in end_token_ids(tokenizer, folder)]
    if info is not None and info.end_token not in ends:
        ends.insert(0, info.end_token)
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{form}"""', *(f'PARAMETER stop "{end}"' for end in ends),
             "PARAMETER temperature 0.7"]
    return "\n".join(lines) + "\n"


def _plain_form(prompter: Prompter) -> str:
    """틀의 글. 지시(system)가 있으면 배울 때처럼 빈 줄 하나를 두고 질문의 앞에 둔다."""
    asked = _literal(prompter.prompt(_QUESTION).rstrip(" "))
    return asked.replace(_SLOTS[_QUESTION], "{{ if .System }}{{ .System }}\n\n{{ end }}" + _SLOTS[_QUESTION])


def _chat_form(tokenizer, settings: dict) -> str:
    """토크나이저의 대화 템플릿을 Ollama의 템플릿으로. 한 번의 주고받음을 실제로 만들어 자리를 찾는다.

    Args:
        settings: 배울 때 템플릿에 넘긴 값(`enable_thinking`).
    """
    user, system = {"role": "user", "content": _QUESTION}, {"role": "system", "content": _SYSTEM}

    def render(*turns: dict) -> str:
        """답의 자리와, 답의 뒤에 오는 끝까지."""
        asked = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True, **settings)
        told = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": _ANSWER}], tokenize=False,
                                             **settings)
        _, found, rest = told.rpartition(_ANSWER)
        return _literal(asked + _ANSWER + (rest if found else ""))

    plain = render(user)
    try:
        told = render(system, user)
    except Exception:  # 지시를 받지 않는 템플릿은 제 방식으로 거절한다
        return plain
    return plain if _SLOTS[_SYSTEM] not in told else f"{{{{ if .System }}}}{told}{{{{ else }}}}{plain}{{{{ end }}}}"


def _literal(text: str) -> str:
    """Ollama의 템플릿으로 적은 글. 글에 든 중괄호는 글자 그대로 남는다."""
    text = text.replace("{{", '{{ "{{" }}')
    for mark, slot in _SLOTS.items():
        text = text.replace(mark, slot)
    return text
