"""OpenAI 형식의 요청 본문을 읽는다: 질문의 토큰, 설정, 멈춤 글, 가능도를 달라는 말. 모르는 체하고 넘기는 것은 없다."""

from dataclasses import dataclass

from utils.data.talks import BadTurns, read_turns
from utils.errors import UsageError
from utils.sampling import Sampling
from utils.talk.answerer import Answer, Answerer
from utils.talk.guard import BOUNDS, bounded_sampling

MAX_STOPS = 8
MAX_PROMPTS = 64
MAX_TOP = 20
SETTINGS = {"model", "stream", "stream_options", "stop", "seed", "logprobs", "max_tokens", *BOUNDS} - {"max_new_tokens"}
CHAT_ONLY, TEXT_ONLY = {"messages", "top_logprobs", "max_completion_tokens"}, {"prompt", "echo"}
# 답을 바꾸지 않는 항목. 받고 쓰지 않는다
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
            "prompt_cache_retention", "parallel_tool_calls", "reasoning_effort", "verbosity", "cache_prompt",
            "request_id", "session_id", "chat_id", "priority"}
# 하지 못하는 일 -> 적어도 되는 값. 여기에도 없는 항목은 OpenAI처럼 거절한다. 말없이 다른 답을 하지 않으려는 것이다
NEUTRAL = {"n": (1,), "best_of": (1,), "suffix": ("",), "tools": ([],), "functions": ([],), "logit_bias": ({},),
           "presence_penalty": (0,), "frequency_penalty": (0,), "response_format": ({"type": "text"},),
           "tool_choice": ("none", "auto"), "min_p": (0,), "typical_p": (1,), "min_tokens": (0,), "echo": (False,),
           "ignore_eos": (False,), "chat_template_kwargs": ({},), "grammar": ("",), "modalities": (["text"],),
           "stop_token_ids": ([],), "skip_special_tokens": (True,), "add_generation_prompt": (True,),
           "continue_final_message": (False,)}


@dataclass(frozen=True)
class Asked:
    """읽은 요청 하나.

    Attributes:
        prompts: 질문마다의 토큰. chat이면 하나다.
        heads: 질문마다 `Answer.head`.
        echo: 답 앞에 질문도 돌려준다.
        top: 가능도를 달라고 했으면 자리마다 함께 줄 토큰의 수, 아니면 None.
        read_only: 답을 만들지 않는다(max_tokens 0).
        raw: 이어 쓴 글을 첫머리의 공백까지 그대로 돌려준다. OpenAI와 llama.cpp의 completions가 그렇게 한다.
        stream, usage: 나오는 대로 보낸다, 그 끝에 토큰의 수도 보낸다.
    """

    prompts: list[list[int]]
    heads: list[int]
    settings: Sampling
    stops: list[str]
    echo: bool = False
    top: int | None = None
    read_only: bool = False
    raw: bool = False
    stream: bool = False
    usage: bool = False

    def answers(self, tuned: bool) -> list[Answer]:
        return [Answer(ids, self.settings, tuned, top=self.top, read_only=self.read_only, raw=self.raw, head=head)
                for ids, head in zip(self.prompts, self.heads, strict=True)]


def read(body: object, answerer: Answerer, chat: bool) -> Asked:
    """본문을 읽는다.

    Args:
        body: JSON에서 온 값.
        chat: messages로 묻는 길인지. 아니면 prompt를 이어 쓰는 길이다.

    Raises:
        UsageError: 읽을 수 없거나, 범위를 벗어났거나, 하지 못하는 일이다.
    """
    if not isinstance(body, dict):
        raise UsageError("본문은 JSON 객체여야 한다")
    known = SETTINGS | HARMLESS | (CHAT_ONLY if chat else TEXT_ONLY)
    for name, value in body.items():
        if name not in known and value is not None and value not in NEUTRAL.get(name, ()):
            raise UsageError(f"지원하지 않는 항목이다. 빼고 보낸다. {str(name)[:40]}: {str(value)[:40]}")
    echo, stream = (_flag(body, name) for name in ("echo", "stream"))
    read_only = echo and _max_tokens(body) == 0
    top = _chat_top(body) if chat else _count(body, "logprobs")
    if stream and (echo or top is not None):
        raise UsageError("stream과 echo나 logprobs를 함께 쓸 수 없다. stream을 뺀다")
    options = body.get("stream_options")
    usage = isinstance(options, dict) and bool(options.get("include_usage"))
    texts = [None] if chat else _prompts(body)
    prompts = [_chat_ids(body, answerer)] if chat else [
        answerer.continue_text(each) if isinstance(each, str) else answerer.continue_tokens(each) for each in texts]
    heads = [answerer.added_head(each, ids) for each, ids in zip(texts, prompts, strict=True)]
    return Asked(prompts, heads, _sampling(body, read_only), _stops(body), echo, top, read_only, not chat, stream,
                 usage)


def _flag(body: dict, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise UsageError(f"{name}에는 true나 false를 적는다. 받은 값: {str(value)[:40]}")
    return bool(value)


def _count(body: dict, name: str) -> int | None:
    value = body.get(name)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and 0 <= value <= MAX_TOP):
        raise UsageError(f"{name}에는 0에서 {MAX_TOP}까지의 정수를 적는다. 받은 값: {str(value)[:40]}")
    return value


def _chat_top(body: dict) -> int | None:
    """chat은 logprobs가 true/false이고, 토큰의 수는 top_logprobs에 적는다."""
    asked, top = _flag(body, "logprobs"), _count(body, "top_logprobs")
    if top is not None and not asked:
        raise UsageError("top_logprobs에는 logprobs: true가 함께 있어야 한다")
    return (top or 0) if asked else None


def _max_tokens(body: dict) -> object:
    longest = body.get("max_completion_tokens")
    return body.get("max_tokens") if longest is None else longest


def _sampling(body: dict, read_only: bool) -> Sampling:
    """요청의 설정. 적지 않은 것은 페이지의 기본값과 같다."""
    asked = {**body, "max_new_tokens": 1 if read_only else _max_tokens(body)}
    values = {name: getattr(Sampling(), name) if asked.get(name) is None else asked[name] for name in BOUNDS}
    try:
        return bounded_sampling(seed=body.get("seed"), **values)
    except UsageError as error:  # 요청에 적힌 이름으로 말한다
        length = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
        raise UsageError(str(error).replace("max_new_tokens", length)) from None


def _stops(body: dict) -> list[str]:
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    fits = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not fits or not all(isinstance(text, str) and text for text in stops):
        raise UsageError(f"stop에는 글이나, 글 {MAX_STOPS}개까지의 목록을 적는다")
    return stops


def _chat_ids(body: dict, answerer: Answerer) -> list[int]:
    """messages를 질문의 토큰으로 바꾼다. 차례와 role은 학습 데이터의 것과 똑같이 읽는다."""
    messages = body.get("messages")
    try:
        turns = read_turns([_plain(message) for message in messages] if isinstance(messages, list) else None)
    except BadTurns as error:
        raise UsageError(f"messages{error}") from None
    if turns[-1].role != "user":
        raise UsageError("messages의 마지막은 user의 질문이어야 한다")
    return answerer.ask_talk(turns)


def _plain(message: object) -> object:
    """OpenAI의 별명 하나를 푼다: system의 새 이름 developer. 학습 데이터에서는 읽지 않는 이름이다."""
    if isinstance(message, dict) and message.get("role") == "developer":
        return {**message, "role": "system"}
    return message


def _prompts(body: dict) -> list[str | list[int]]:
    """prompt의 네 꼴(글, 글의 목록, 토큰 번호의 목록, 그런 목록의 목록)을 목록 하나로 읽는다."""
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) and not _is_tokens(prompt) else [prompt]
    if not prompts or not all(isinstance(each, str) or _is_tokens(each) for each in prompts):
        raise UsageError("prompt에는 글이나 토큰 번호의 목록을, 여럿이면 그것들의 목록을 적는다")
    if len(prompts) > MAX_PROMPTS:
        raise UsageError(f"prompt가 {len(prompts)}개다. 한 번에 {MAX_PROMPTS}개까지 보낸다")
    return prompts


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
