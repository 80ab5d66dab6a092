"""페이지를 낯선 사람에게서 지키는 규칙: 누가 올 수 있는가, 무엇을 얼마나 보낼 수 있는가."""

import asyncio
import hmac
import io
import ipaddress
import json
import math
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from utils.console import printable
from utils.errors import UsageError
from utils.sampling import Sampling
from utils.talk.exposure import LOOPBACK, is_loopback

MAX_CHARS = 8000
MAX_BODY = 256 * 1024
# 이름: (최소, 최대, 정수인가). 슬라이더와 서버의 검사가 함께 쓴다
BOUNDS = {
    "temperature": (0.0, 2.0, False),
    "top_p": (0.01, 1.0, False),
    "top_k": (0, 200, True),
    "max_new_tokens": (1, 2048, True),
    "repetition_penalty": (0.5, 2.0, False),
    "no_repeat_ngram_size": (0, 10, True),
}
# 페이지가 실제로 쓰는 길. 파일 읽기와 올리기, 문서, 감시 같은 나머지는 없는 길이다
PAGE_PATHS = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/login", "/logout",
              "/login_check")
PAGE_FOLDERS = ("/assets/", "/static/")
QUEUE_PATHS = ("/queue/join", "/queue/data", "/cancel", "/reset", "/startup-events", "/theme.css", "/login_check",
               "/app_id")
CONTENT_POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
                  "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
                  "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'")
HEADERS = [(b"content-security-policy", CONTENT_POLICY.encode()), (b"x-content-type-options", b"nosniff"),
           (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY")]


def same_secret(given: str, expected: str) -> bool:
    """걸린 시간으로 암호를 짐작할 수 없게 비교한다."""
    return hmac.compare_digest(given.encode(), expected.encode())


def login_check(auth: str | None) -> Callable | None:
    """Gradio의 로그인이 부를 함수. 틀리면 1초를 기다려 암호를 마구 넣어 보지 못하게 한다."""
    if not auth:
        return None

    async def check(user: str, password: str) -> bool:
        right = same_secret(f"{user}:{password}", auth)
        if not right:
            await asyncio.sleep(1)
        return right

    return check


def check_text(**texts: object) -> None:
    """글의 길이를 서버에서 다시 본다.

    Raises:
        UsageError: 글이 아니거나 너무 길다.
    """
    for name, text in texts.items():
        if not isinstance(text, str):
            raise UsageError(f"글이어야 한다: {name}")
        if len(text) > MAX_CHARS:
            raise UsageError(f"글이 너무 길다({name}): {len(text):,}글자. {MAX_CHARS:,}글자까지 받는다")
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise UsageError(f"글자가 될 수 없는 값(짝 없는 surrogate)이 들어 있다: {name}")


def is_number(value: object) -> bool:
    """브라우저나 파일에서 온 값이 유한한 수인가. JSON의 true는 수가 아니다."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)  # isfinite는 아주 큰 정수를 받지 못한다


def bounded_sampling(seed: int | None = None, **values: object) -> Sampling:
    """범위를 서버에서 다시 본 설정. 슬라이더 밖의 값은 브라우저가 아니라 여기서 막는다.

    Raises:
        UsageError: 숫자가 아니거나 범위를 벗어났다.
    """
    numbers = {}
    for name, value in values.items():
        low, high, whole = BOUNDS[name]
        fits = is_number(value) and low <= value <= high
        if not fits or (whole and value != int(value)):
            kind = "정수" if whole else "수"
            raise UsageError(f"{name}의 값은 {low}에서 {high}까지의 {kind}다. 받은 값: {str(value)[:40]}")
        numbers[name] = int(value) if whole else float(value)
    if seed is not None and not (is_number(seed) and 0 <= seed < 2**53 and seed == int(seed)):
        raise UsageError("seed는 0 이상 2^53 미만의 정수다")
    return Sampling(**numbers, seed=None if seed is None else int(seed))


class CleanStream(io.TextIOBase):
    """터미널을 조종하는 글자를 빼고 넘기는 콘솔."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def clean_console() -> None:
    """낯선 사람이 보낸 글이 라이브러리의 오류에 섞여 나와도 콘솔을 조종하지 못하게 한다."""
    sys.stdout, sys.stderr = CleanStream(sys.stdout), CleanStream(sys.stderr)


class OneLineErrors:
    """낯선 값이 낸 오류를 한 줄로 알리는, Gradio의 큐가 쓰는 `traceback` 모듈의 대신."""

    @staticmethod
    def print_exc() -> None:
        error = sys.exc_info()[1]
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        print(f"주의: 페이지의 요청을 처리하지 못했다: {type(error).__name__}: {reason} "
              f"({Path(frame.filename).name}:{frame.lineno})", file=sys.stderr)


class Guard:
    """모든 요청을 먼저 보는 ASGI 문지기.

    Host가 이 컴퓨터의 이름이 아니면 DNS rebinding으로, Origin이 Host와 다르면 남의 사이트가 보낸 것으로 보고 거절한다.
    페이지가 쓰지 않는 길은 없는 길이다.

    Args:
        server_name: 서버가 열린 주소.
        share: 공유 링크로도 열렸는가.
        api: `/v1/` 아래의 길도 여는가.
        on_leave: 브라우저가 떠나면 그 session_hash로 부를 함수.
    """

    def __init__(self, app, *, server_name: str, share: bool, api: bool, on_leave: Callable[[str], None]):
        self._app = app
        self._server_name = server_name
        self._share = share
        self._api = api
        self._on_leave = on_leave

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        status = self._refusal(scope, headers)
        if status:
            await _refuse(status, send, as_json=scope["path"].startswith("/v1/"))
            return

        watcher = None
        if scope["path"].startswith("/gradio_api/queue/data"):
            session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
            watcher = asyncio.create_task(self._watch(receive, session))

        async def send_guarded(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            elif watcher and not message.get("more_body"):
                watcher.cancel()  # 다 보내고 닫는 것은 떠난 것이 아니다
            await send(message)

        try:
            await self._app(scope, receive, send_guarded)
        finally:
            if watcher:
                watcher.cancel()

    async def _watch(self, receive, session: str) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._on_leave(session)

    def _refusal(self, scope, headers: dict[str, str]) -> int:
        """거절할 때의 HTTP 상태. 받아들이면 0이다."""
        host = headers.get("host", "")
        if scope["type"] != "http" or not self._known_host(host):
            return 403
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403
        opening = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if site == "cross-site" and not opening:
            return 403
        if not self._known_path(scope["path"]):
            return 404
        if scope["method"] not in ("GET", "HEAD"):
            length = headers.get("content-length", "")
            if "transfer-encoding" in headers or not length.isdigit():
                return 411
            if int(length) > MAX_BODY:
                return 413
        return 0

    def _known_host(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in LOOPBACK or (self._share and name.endswith(".gradio.live")):
            return True
        if is_loopback(self._server_name):
            return False
        machine = socket.gethostname().lower()
        return name in (self._server_name.lower(), machine, f"{machine}.local") or _is_address(name)

    def _known_path(self, path: str) -> bool:
        if ".." in path or "\\" in path:
            return False
        if path.startswith("/v1/"):
            return self._api
        if path.startswith("/gradio_api"):
            rest = path.removeprefix("/gradio_api").rstrip("/")
            return rest in QUEUE_PATHS or rest.startswith("/heartbeat/")
        return path in PAGE_PATHS or path.rstrip("/") in PAGE_PATHS or path.startswith(PAGE_FOLDERS)


def _is_address(name: str) -> bool:
    """이름이 아니라 IP 주소로 왔는가. DNS rebinding에는 이름이 필요하므로 주소는 안전하다."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _refuse(status: int, send, as_json: bool = False) -> None:
    """한 줄로 거절한다. API에는 OpenAI의 오류 꼴로 적는다."""
    reasons = {403: "거절했다: 이 페이지의 주소로 온 요청이 아니다", 404: "없는 경로다",
               411: "본문의 길이를 알려 주지 않은 요청은 받지 않는다",
               413: f"본문이 너무 크다. {MAX_BODY // 1024} KB까지 받는다. 여럿을 나누어 보낸다"}
    body, kind = reasons[status], b"text/plain; charset=utf-8"
    if as_json:
        error = {"message": body, "type": "invalid_request_error", "param": None, "code": None}
        body, kind = json.dumps({"error": error}, ensure_ascii=False), b"application/json"
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *HEADERS]})
    await send({"type": "http.response.body", "body": body.encode("utf-8")})
