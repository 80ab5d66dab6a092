"""OpenAI 형식의 API: `/v1/models`, `/v1/chat/completions`, `/v1/completions`."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from utils.errors import UsageError
from utils.talk import api_request
from utils.talk.answerer import Answerer
from utils.talk.api_reply import Reply, Shape, error_body
from utils.talk.guard import same_secret
from utils.talk.line import Busy
from utils.talk.models import Models, UnknownModel

PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions")


def routes(models: Models, auth: str | None) -> list[Route]:
    """서버에 더할 길들.

    Args:
        auth: `사용자:암호`. 있으면 요청이 이것을 api_key로 보내야 한다.
    """

    async def list_models(request: Request) -> Response:
        cards = [_card(name) for name in models.names]
        return await _wrong_key(request, auth) or JSONResponse({"object": "list", "data": cards})

    async def one_model(request: Request) -> Response:
        return await _wrong_key(request, auth) or _model(models, request.path_params["name"])

    async def chat(request: Request) -> Response:
        return await _wrong_key(request, auth) or await _complete(request, models, chat=True)

    async def completions(request: Request) -> Response:
        return await _wrong_key(request, auth) or await _complete(request, models, chat=False)

    async def nothing(request: Request) -> Response:
        asked = f"{request.method} {request.url.path[:80]}"
        return _error(404, f"없는 경로다: {asked}. 있는 경로: GET {PATHS[0]}, POST {PATHS[1]}, POST {PATHS[2]}",
                      "invalid_request_error", "unknown_url")

    return [Route(PATHS[0], list_models), Route(f"{PATHS[0]}/{{name}}", one_model),
            Route(PATHS[1], chat, methods=["POST"]), Route(PATHS[2], completions, methods=["POST"]),
            Route("/v1/{rest:path}", nothing, methods=["GET", "POST", "PUT", "DELETE", "PATCH"])]


def _card(name: str) -> dict:
    return {"id": name, "object": "model", "created": 0, "owned_by": "local"}


def _model(models: Models, name: str) -> Response:
    try:
        return JSONResponse(_card(models.choose(name).name))
    except UnknownModel as error:
        return _unknown(error)


async def _wrong_key(request: Request, auth: str | None) -> Response | None:
    """API 키가 틀렸을 때의 응답. 맞으면 None이다."""
    given = request.headers.get("authorization", "").encode("latin-1").decode("utf-8", "replace")
    if auth is None or same_secret(given, f"Bearer {auth}"):
        return None
    await asyncio.sleep(1)
    return _error(401, "api_key에 --auth로 정한 사용자:암호를 적는다", "authentication_error")


async def _complete(request: Request, models: Models, chat: bool) -> Response:
    try:
        body = await _read_json(request)
        choice = models.choose(body.get("model") if isinstance(body, dict) else None)
        answerer = choice.answerer
        asked = api_request.read(body, answerer, chat)
        replies = [Reply(index, answer) for index, answer in enumerate(asked.answers(choice.tuned))]
        answerer.submit(*(reply.answer for reply in replies))
    except Busy as error:
        return _error(429, str(error), "rate_limit_error")
    except UnknownModel as error:
        return _unknown(error)
    except UsageError as error:
        return _error(400, str(error), "invalid_request_error")
    shape = Shape(chat, choice.name, asked, answerer.tokenizer)
    if asked.stream:
        return StreamingResponse(_events(request, answerer, replies, shape, asked), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-cache"})
    async with aclosing(_deltas(request, answerer, replies, asked.stops)) as deltas:
        async for _ in deltas:
            pass
    problem = _problem(replies)
    return _error(500, problem, "server_error") if problem else JSONResponse(shape.whole(replies))


async def _read_json(request: Request) -> object:
    try:
        body = await request.json()
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # 짝 없는 surrogate는 글자가 될 수 없다
    except (ValueError, RecursionError):
        raise UsageError("본문이 올바른 JSON이 아니거나 글자가 될 수 없는 값이 들어 있다") from None
    return body


async def _deltas(request: Request, answerer: Answerer, replies: list[Reply],
                  stops: list[str]) -> AsyncIterator[tuple[Reply, str]]:
    """새로 나온 글. `stops`의 글이 나오면 그 앞에서 끝내고, 요청한 쪽이 떠나면 모두 멈춘다."""
    async with aclosing(answerer.follow(*(reply.answer for reply in replies))) as changes:
        async for _ in changes:
            if await request.is_disconnected():
                return
            for reply in replies:
                answer = reply.answer
                text, reply.cut = _before_stop(answer.text, stops, bool(answer.finish_reason))
                if reply.cut:
                    answer.stop.set()
                if len(text) > len(reply.text):
                    delta, reply.text = text[len(reply.text):], text
                    yield reply, delta


async def _events(request: Request, answerer: Answerer, replies: list[Reply], shape: Shape,
                  asked: api_request.Asked) -> AsyncIterator[str]:
    for reply in replies:
        yield shape.event(reply.index, "", first=True)
    async with aclosing(_deltas(request, answerer, replies, asked.stops)) as deltas:
        async for reply, delta in deltas:
            yield shape.event(reply.index, delta)
    problem = _problem(replies)
    if problem:
        yield f"data: {json.dumps(error_body(problem, 'server_error'), ensure_ascii=False)}\n\n"
    else:
        for reply in replies:
            yield shape.event(reply.index, "", finish=reply.finish)
        if asked.usage:
            yield shape.usage_event(replies)
    yield "data: [DONE]\n\n"


def _problem(replies: list[Reply]) -> str:
    """답 가운데 하나라도 만들지 못했으면 그 이유."""
    return next((reply.answer.error for reply in replies if reply.answer.error), "")


def _before_stop(text: str, stops: list[str], done: bool) -> tuple[str, bool]:
    """(내보내도 되는 글, 멈춤 글이 나왔는가). 멈춤 글의 앞부분일지 모르는 끝은 아직 내보내지 않는다."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return text[: min(found)], True
    if not done:
        for length in range(min(len(text), max(map(len, stops), default=0)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in stops):
                return text[:-length], False
    return text, False


def _unknown(error: UnknownModel) -> Response:
    return _error(404, str(error), "invalid_request_error", "model_not_found")


def _error(status: int, message: str, kind: str, code: str | None = None) -> Response:
    return JSONResponse(error_body(message, kind, code), status_code=status)
