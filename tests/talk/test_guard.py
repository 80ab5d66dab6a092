"""문지기는 남의 이름, 남의 사이트, 페이지가 쓰지 않는 길, 너무 큰 것을 들이지 않는다."""

import asyncio

import pytest

from utils.errors import UsageError
from utils.talk import exposure, guard

pytestmark = pytest.mark.quick


def status(path="/", method="GET", server_name="127.0.0.1", share=False, api=False, **headers) -> int:
    """문지기가 돌려준 HTTP 상태. 들여보냈으면 200이다."""
    async def inside(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = {"host": "127.0.0.1:7860", **headers}
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "method": method, "query_string": b"", "headers": pairs}
    door = guard.Guard(inside, server_name=server_name, share=share, api=api, on_leave=lambda session: None)
    asyncio.run(door(scope, receive, send))
    names = dict(sent[0]["headers"])
    assert b"default-src 'self'" in names[b"content-security-policy"]
    return sent[0]["status"]


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "localhost:7860", "[::1]:7860", "LOCALHOST:1"])
def test_own_names_enter(host):
    assert status(host=host) == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", "", "@",
                                  "192.168.0.5:7860", "127.0.0.1:7860@evil.example", "[::1", "x.gradio.live"])
def test_rebinding_names_do_not(host):
    assert status(host=host) == 403


def test_open_server_takes_addresses_but_not_names():
    assert status(host="192.168.0.5:7860", server_name="0.0.0.0") == 200
    assert status(host="evil.example", server_name="0.0.0.0") == 403


def test_share_name_enters_only_when_shared():
    assert status(host="abc.gradio.live", share=True) == 200
    assert status(host="abc.gradio.live.evil.example", share=True) == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:8000", "http://localhost:7860"])
def test_other_origins_are_refused(origin):
    assert status("/gradio_api/queue/join", "POST", origin=origin, content_length="2") == 403


def test_same_origin_and_no_origin_enter():
    assert status("/gradio_api/queue/join", "POST", origin="http://127.0.0.1:7860", content_length="2") == 200
    assert status("/gradio_api/queue/join", "POST", content_length="2") == 200


def test_cross_site_requests_are_refused_but_a_link_opens():
    assert status(sec_fetch_site="cross-site", sec_fetch_mode="no-cors") == 403
    assert status("/config", sec_fetch_site="cross-site", sec_fetch_mode="cors") == 403
    assert status(sec_fetch_site="cross-site", sec_fetch_mode="navigate") == 200


@pytest.mark.parametrize("path", [
    "/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/proxy=http://a",
    "/gradio_api/call/answer", "/gradio_api/run/predict", "/gradio_api/component_server", "/docs", "/openapi.json",
    "/monitoring", "/gradio_api/dev/reload", "/gradio_api/vibe-edit", "/static/../../etc/passwd", "/assets/..\\x",
    "/v1/models", "/gradio_api/info", "/gradio_api/token", "/gradio_api/user", "/gradio_api/mcp", "/svelte/x",
    "/gradio_api/runs", "/custom_component/1"])
def test_unused_paths_do_not_exist(path):
    assert status(path) == 404


def test_api_paths_exist_only_when_asked():
    assert status("/v1/models", api=True) == 200


def test_large_and_unmeasured_bodies_are_refused():
    assert status("/gradio_api/queue/join", "POST", content_length=str(guard.MAX_BODY + 1)) == 413
    assert status("/gradio_api/queue/join", "POST", transfer_encoding="chunked") == 411
    assert status("/gradio_api/queue/join", "POST") == 411


@pytest.mark.parametrize("server_name, share, auth, problem", [
    ("127.0.0.1", False, None, False), ("localhost", False, None, False), ("127.0.0.5", False, None, False),
    ("0.0.0.0", False, None, True), ("192.168.0.5", False, None, True), ("::", False, None, True),
    ("127.0.0.1", True, None, True), ("0.0.0.0", True, "a:b", False), ("0.0.0.0", False, "a:", True),
    ("127.0.0.1", False, "name", True), ("0.0.0.0", False, ":b", True)])
def test_opening_to_others_needs_a_password(server_name, share, auth, problem):
    assert bool(exposure.exposure_problem(server_name, share, auth)) is problem


@pytest.mark.parametrize("server_name, named", [
    ("127.0.0.1", ""), ("0.0.0.0", ""), ("10.255.255.1", "10.255.255.1"), ("없는곳", "없는곳"), ("a" * 300, "주소가")])
def test_an_address_of_another_machine_is_refused_before_the_model(server_name, named):
    problem = exposure.address_problem(server_name)
    assert bool(problem) == bool(named) and named in problem


@pytest.mark.parametrize("values", [
    {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": float("nan")}, {"temperature": "0.7"},
    {"temperature": None}, {"temperature": True}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": 1.5}, {"top_k": -1},
    {"max_new_tokens": 0}, {"max_new_tokens": 10**9}, {"max_new_tokens": 10**400}, {"repetition_penalty": 0},
    {"no_repeat_ngram_size": 11}, {"seed": -1}, {"seed": 2**60}, {"seed": "1"}, {"seed": float("nan")}])
def test_values_outside_the_sliders_are_refused(values):
    with pytest.raises(UsageError):
        guard.bounded_sampling(**values)


def test_values_inside_arrive():
    sampling = guard.bounded_sampling(temperature=0, top_p=1, top_k=0, max_new_tokens=7.0, seed=3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens, sampling.seed) == (
        0.0, 1.0, 0, 7, 3)


def test_long_text_is_refused_by_name():
    guard.check_text(Instruction="가" * guard.MAX_CHARS, Input="")
    with pytest.raises(UsageError, match="Input"):
        guard.check_text(Instruction="", Input="가" * (guard.MAX_CHARS + 1))
    with pytest.raises(UsageError, match="Instruction"):
        guard.check_text(Instruction=["가"])


def test_wrong_password_waits(monkeypatch):
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    check = guard.login_check("사용자:암호:끝")
    assert asyncio.run(check("사용자", "암호:끝")) and not waited
    assert not asyncio.run(check("사용자", "암호")) and waited == [1]
    assert guard.login_check(None) is None
