"""OpenAI 형식의 API: `/v1/models`, `/v1/chat/completions`, `/v1/completions`."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from utils.data.talks import BadTurns, read_turns
from utils.errors import UsageError
from utils.sampling import Sampling
from utils.talk.answerer import Answer, Answerer, Busy
from utils.talk.guard import BOUNDS, MAX_CHARS, bounded_sampling, same_secret

MAX_STOPS = 4


def routes(answerer: Answerer, model_name: str, auth: str | None) -> list[Route]:
    """서버에 더할 길들.

    Args:
        auth: `사용자:암호`. 있으면 요청이 이것을 api_key로 보내야 한다.
    """

    async def models(request: Request) -> Response:
        card = {"id": model_name, "object": "model", "created": 0, "owned_by": "local"}
        return await _wrong_key(request, auth) or JSONResponse({"object": "list", "data": [card]})

    async def chat(request: Request) -> Response:
        return await _wrong_key(request, auth) or await _complete(request, answerer, model_name, chat=True)

    async def completions(request: Request) -> Response:
        return await _wrong_key(request, auth) or await _complete(request, answerer, model_name, chat=False)

    return [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"])]


async def _wrong_key(request: Request, auth: str | None) -> Response | None:
    """API 키가 틀렸을 때의 응답. 맞으면 None이다."""
    given = request.headers.get("authorization", "").encode("latin-1").decode("utf-8", "replace")
    if auth is None or same_secret(given, f"Bearer {auth}"):
        return None
    await asyncio.sleep(1)
    return _error(401, "api_key에 --auth로 정한 사용자:암호를 적는다", "authentication_error")


async def _complete(request: Request, answerer: Answerer, model_name: str, chat: bool) -> Response:
    try:
        body = await _read_body(request)
        input_ids = _chat_ids(body, answerer) if chat else _text_ids(body, answerer)
        answer = Answer(input_ids, _sampling(body))
        stops = _stops(body)
        answerer.submit(answer)
    except Busy as error:
        return _error(429, str(error), "rate_limit_error")
    except UsageError as error:
        return _error(400, str(error), "invalid_request_error")
    shape = _Shape(chat, model_name, len(input_ids))
    if body.get("stream"):
        options = body.get("stream_options")
        usage = isinstance(options, dict) and bool(options.get("include_usage"))
        return StreamingResponse(_events(request, answerer, answer, stops, shape, usage),
                                 media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    text = ""
    async with aclosing(_deltas(request, answerer, answer, stops)) as deltas:
        async for delta in deltas:
            text += delta
    if answer.error:
        return _error(500, answer.error, "server_error")
    return JSONResponse(shape.whole(text, answer))


async def _deltas(request: Request, answerer: Answerer, answer: Answer, stops: list[str]) -> AsyncIterator[str]:
    """새로 나온 글. `stops`의 글이 나오면 그 앞에서 끝내고, 요청한 쪽이 떠나면 멈춘다."""
    sent = 0
    async with aclosing(answerer.follow(answer)) as changes:
        async for _ in changes:
            if await request.is_disconnected():
                return
            text, stopped = _before_stop(answer.text, stops, bool(answer.finish_reason))
            if len(text) > sent:
                yield text[sent:]
                sent = len(text)
            if stopped:
                answer.finish_reason = "stop"  # 끝까지 다 만든 뒤에야 보았어도 그 글에서 멈춘 것이다
                return


async def _events(request: Request, answerer: Answerer, answer: Answer, stops: list[str], shape: "_Shape",
                  usage: bool) -> AsyncIterator[str]:
    yield shape.event("", first=True)
    async with aclosing(_deltas(request, answerer, answer, stops)) as deltas:
        async for delta in deltas:
            yield shape.event(delta)
    if answer.error:
        yield f"data: {json.dumps(_error_body(answer.error, 'server_error'), ensure_ascii=False)}\n\n"
    else:
        yield shape.event("", finish=_finish(answer))
        if usage:
            yield shape.event(None, answer=answer)
    yield "data: [DONE]\n\n"


class _Shape:
    """OpenAI 형식의 응답을 만든다."""

    def __init__(self, chat: bool, model_name: str, n_prompt: int):
        self._chat = chat
        self._n_prompt = n_prompt
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
                      "model": model_name}

    def whole(self, text: str, answer: Answer) -> dict:
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {**self._head, "object": "chat.completion" if self._chat else "text_completion",
                "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": _finish(answer)}],
                "usage": self._usage(answer)}

    def event(self, delta: str | None, first: bool = False, finish: str | None = None,
              answer: Answer | None = None) -> str:
        """스트림의 한 조각. `delta`가 None이면 사용량만 담는다."""
        content = {"text": delta}
        if self._chat:
            content = {"delta": {"role": "assistant", "content": ""} if first else {"content": delta} if delta else {}}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        body = {**self._head, "object": "chat.completion.chunk" if self._chat else "text_completion",
                "choices": [] if delta is None else [choice]}
        if answer is not None:
            body["usage"] = self._usage(answer)
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def _usage(self, answer: Answer) -> dict:
        made = len(answer.ids)
        return {"prompt_tokens": self._n_prompt, "completion_tokens": made, "total_tokens": self._n_prompt + made}


def _finish(answer: Answer) -> str:
    return "length" if answer.finish_reason == "length" else "stop"


async def _read_body(request: Request) -> dict:
    try:
        body = await request.json()
    except ValueError:
        raise UsageError("본문이 올바른 JSON이 아니다") from None
    if not isinstance(body, dict):
        raise UsageError("본문은 JSON 객체여야 한다")
    if body.get("n", 1) != 1 or body.get("best_of", 1) not in (1, None):
        raise UsageError("한 번에 답 하나만 만든다(n=1)")
    return body


def _chat_ids(body: dict, answerer: Answerer) -> list[int]:
    """messages를 질문의 토큰으로 바꾼다. 차례와 role은 학습 데이터의 것과 똑같이 읽는다."""
    messages = body.get("messages")
    try:
        turns = read_turns([_plain(message) for message in messages] if isinstance(messages, list) else None)
    except BadTurns as error:
        raise UsageError(f"messages{error}") from None
    if turns[-1].role != "user":
        raise UsageError("messages의 마지막은 user의 질문이어야 한다")
    total = sum(len(turn.text) for turn in turns)
    if total > MAX_CHARS:
        raise UsageError(f"messages가 너무 길다: {total:,}글자. {MAX_CHARS:,}글자까지 받는다")
    return answerer.ask_talk(turns)


def _plain(message: object) -> object:
    """OpenAI의 두 별명을 푼다: 글 조각의 목록으로 된 content와, system의 새 이름 developer."""
    if not isinstance(message, dict):
        return message
    content, role = message.get("content"), message.get("role")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text"
                                         and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    return {**message, "content": content, "role": "system" if role == "developer" else role}


def _text_ids(body: dict, answerer: Answerer) -> list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise UsageError("prompt에는 글 하나를 적는다")
    if len(prompt) > MAX_CHARS:
        raise UsageError(f"prompt가 너무 길다: {len(prompt):,}글자. {MAX_CHARS:,}글자까지 받는다")
    return answerer.continue_text(prompt)


def _sampling(body: dict) -> Sampling:
    """요청의 설정. 적지 않은 것은 페이지의 기본값과 같다."""
    asked = dict(body)
    asked["max_new_tokens"] = body.get("max_completion_tokens", body.get("max_tokens"))
    values = {name: getattr(Sampling(), name) if asked.get(name) is None else asked[name] for name in BOUNDS}
    return bounded_sampling(seed=body.get("seed"), **values)


def _stops(body: dict) -> list[str]:
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise UsageError(f"stop에는 글을 {MAX_STOPS}개까지 적는다")
    return stops


def _before_stop(text: str, stops: list[str], done: bool) -> tuple[str, bool]:
    """(내보내도 되는 글, 멈춤 글이 나왔는가). 멈춤 글의 앞토막일지 모르는 끝은 아직 내보내지 않는다."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return text[: min(found)], True
    if not done:
        for length in range(min(len(text), max(map(len, stops), default=0)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in stops):
                return text[:-length], False
    return text, False


def _error(status: int, message: str, kind: str) -> Response:
    return JSONResponse(_error_body(message, kind), status_code=status)


def _error_body(message: str, kind: str) -> dict:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
