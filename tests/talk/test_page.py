"""사람이 브라우저로 쓰는 그대로: 묻고, 흐르고, 멈추고, 지우고, 비교하고, 재고, 기록한다. 밖으로 나가는 요청은 없다."""

import csv
import io
import json
import os
import re
import socket
import sys
import threading
from pathlib import Path

import httpx
import psutil
import pytest
from playwright.sync_api import Error, expect, sync_playwright
from serving import SETTINGS, Visitor, event_number

CHROMIUM = Path("/usr/bin/chromium")


def launch_browser(playwright):
    """데비안의 chromium, Windows에서는 Edge."""
    if sys.platform == "win32":
        return playwright.chromium.launch(channel="msedge")
    if not CHROMIUM.is_file():
        raise FileNotFoundError("chromium이 없다. 설치: sudo apt-get install chromium fonts-noto-cjk")
    return playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        try:
            opened = launch_browser(playwright)
        except (Error, FileNotFoundError) as error:
            if os.environ.get("REQUIRE_BROWSER"):
                raise
            pytest.skip(f"브라우저가 없다: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture
def page(browser, talk_server):
    """새 브라우저 창. 끝날 때 오류와 밖으로 나간 요청이 없었는지 본다."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, locale="ko-KR", accept_downloads=True)
    opened = context.new_page()
    requests, problems = [], []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.goto(talk_server.url)
    expect(opened.locator("#submit")).to_be_visible(timeout=60_000)
    yield opened
    context.close()
    outside = [url for url in requests if not url.startswith((talk_server.url, "data:", "blob:"))]
    assert not outside, outside
    assert not problems, problems


def output(page, element: str = "output") -> str:
    return page.locator(f"#{element} textarea").input_value()


def ask(page, text: str, button: str = "submit") -> None:
    page.locator("#instruction textarea").fill(text)
    page.locator(f"#{button}").click()


def set_tokens(page, count: int) -> None:
    field = page.locator("#max-new-tokens input[type=number]")
    field.fill(str(count))
    field.press("Tab")


def wait_status(page, pattern: str, element: str = "status") -> str:
    field = page.locator(f"#{element} textarea")
    expect(field).to_have_value(re.compile(pattern), timeout=90_000)
    return field.input_value()


DONE = "스스로 멈춤|최대 길이에 닿음"


def test_answer_streams_and_tells_its_figures(page):
    set_tokens(page, 200)
    ask(page, "딥러닝이 뭐야?")
    seen = set()
    while not re.search(DONE, page.locator("#status textarea").input_value()):
        seen.add(output(page))
        page.wait_for_timeout(50)
    final = output(page)
    assert len(seen - {""}) > 2, "한꺼번에 나왔다"
    assert all(final.startswith(part) for part in seen)
    assert "\ufffd" not in final and "### 질문" not in final
    wait_status(page, r"토큰 \d+개 · [\d,.]+ 토큰/초 · 첫 토큰까지 [\d.]+초 · ")
    expect(page.locator("#output button").first).to_be_visible()


def test_stop_ends_the_work(page):
    set_tokens(page, 1000)
    ask(page, "오래 답해 줘")
    expect(page.locator("#output textarea")).not_to_have_value("", timeout=60_000)
    page.locator("#stop").click()
    status = wait_status(page, "사용자가 멈춤")
    stopped = output(page)
    page.wait_for_timeout(500)
    assert output(page) == stopped and int(re.search(r"토큰 (\d+)개", status)[1]) < 1000


@pytest.mark.parametrize("button", ["submit", "compare"])
def test_clear_empties_and_stops(page, button):
    set_tokens(page, 1000)
    for turn in range(5):  # 뒤늦은 글이 되살아나는 것은 몇 번에 한 번뿐이다
        ask(page, f"지울 질문 {turn}", button)
        growing = "output" if button == "submit" else "base-output"
        expect(page.locator(f"#{growing} textarea")).not_to_have_value("", timeout=60_000)
        page.locator("#clear").click()
        for element in ("instruction", "input", "output", "status"):
            expect(page.locator(f"#{element} textarea")).to_have_value("", timeout=30_000)
        page.wait_for_timeout(500)
        assert output(page) == output(page, "status") == ""
        expect(page.locator("#base-output")).to_be_hidden()


def test_three_examples_fill_the_form(page):
    rows = page.locator("#examples tbody tr")
    expect(rows).to_have_count(3)
    rows.nth(1).click()
    expect(page.locator("#instruction textarea")).to_have_value("{x}가 뭐지?", timeout=30_000)
    expect(page.locator("#input textarea")).to_have_value("AI")


def test_compare_shows_both_models(page):
    set_tokens(page, 12)
    expect(page.locator("#base-output")).to_be_hidden()
    ask(page, "비교해 보자", "compare")
    wait_status(page, DONE)
    wait_status(page, DONE, "base-status")
    assert output(page) and output(page, "base-output") and output(page) != output(page, "base-output")
    ask(page, "이제 하나만")
    expect(page.locator("#base-output")).to_be_hidden(timeout=60_000)
    wait_status(page, DONE)


def test_sliders_reach_the_model(page):
    set_tokens(page, 3)
    temperature = page.locator("#temperature input[type=number]")
    temperature.fill("0")
    temperature.press("Tab")
    ask(page, "짧게")
    assert int(re.search(r"토큰 (\d+)개", wait_status(page, DONE))[1]) <= 3
    first = output(page)
    page.locator("#submit").click()
    page.wait_for_timeout(1500)
    wait_status(page, DONE)
    assert output(page) == first


def test_empty_question_gets_a_korean_line(page):
    page.locator("#submit").click()
    wait_status(page, "질문이 비어 있다")


def test_text_is_never_html(page):
    set_tokens(page, 20)  # 무작위 모델의 두 토큰은 완성된 음절이 없어 빈 답일 수 있고, 빈 답은 기록하지 않는다
    ask(page, "<img src=x onerror=alert(1)>")
    wait_status(page, DONE)
    page.get_by_role("tab", name="내 기록").click()
    expect(page.locator("#history-list article h3").first).to_have_text("<img src=x onerror=alert(1)>")
    assert page.locator("#history-list img").count() == 0


def test_history_stays_in_the_browser_and_can_be_exported(page):
    set_tokens(page, 20)
    ask(page, "기억할 질문")
    wait_status(page, DONE)
    answer = output(page)
    page.get_by_role("tab", name="내 기록").click()
    expect(page.locator("#history-list article")).to_have_count(1)
    with page.expect_download() as download:
        page.locator("#history-export").click()
    rows = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert rows[0]["instruction"] == "기억할 질문" and rows[0]["answer"] == answer
    page.reload()
    page.get_by_role("tab", name="내 기록").click()
    expect(page.locator("#history-list article")).to_have_count(1, timeout=30_000)
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#history-clear").click()
    expect(page.locator("#history-list article")).to_have_count(0)


def test_dark_mode_is_remembered(page):
    body = page.locator("body")
    dark = "dark" in (body.get_attribute("class") or "")
    page.locator("#theme-button").click()
    page.wait_for_timeout(200)
    assert ("dark" in (body.get_attribute("class") or "")) is not dark
    page.reload()
    expect(page.locator("#submit")).to_be_visible(timeout=60_000)
    page.wait_for_timeout(1000)
    assert ("dark" in (body.get_attribute("class") or "")) is not dark


def test_phone_width_needs_no_sideways_scroll(page):
    page.set_viewport_size({"width": 375, "height": 800})
    for name in ("대화", "얼마나 배웠나", "학습 기록", "내 기록"):
        tab = page.get_by_role("tab", name=name)
        if not tab.is_visible():
            page.locator(".overflow-menu button").first.click()
            page.get_by_text(name, exact=True).last.click()
        else:
            tab.click()
        page.wait_for_timeout(700)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, name


def test_learned_tab_measures_and_gives_a_csv(page):
    page.get_by_role("tab", name="얼마나 배웠나").click()
    wait_status(page, "검증 질문", "learned-status")
    page.locator("#ask-both").click()
    expect(page.locator("#reference textarea")).to_have_value(re.compile("더하면"), timeout=90_000)
    wait_status(page, DONE, "learned-status")
    assert output(page, "learned-base") != output(page, "learned-tuned")
    count = page.locator("#count input[type=number]")
    count.fill("1")
    count.press("Tab")
    page.locator("#measure").click()
    wait_status(page, "질문 1개로 쟀다", "learned-status")
    expect(page.locator("#scores")).to_contain_text("chrF")
    with page.expect_download() as download:
        page.locator("#csv").click()
    rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8-sig"))))
    assert len(rows) == 2 and "더하기" in rows[1][0]


def test_run_tab_shows_curves_and_settings(page):
    page.get_by_role("tab", name="학습 기록").click()
    expect(page.locator("#curves img")).to_be_visible(timeout=60_000)
    expect(page.locator("#run-table")).to_contain_text("최대 VRAM")
    expect(page.locator("#run-table")).to_contain_text("1.27")


def test_busy_line_says_so_in_korean_and_disconnects_free_the_card(talk_server):
    number = event_number(talk_server.url, "submit")
    long = [*SETTINGS[:3], 900, *SETTINGS[4:]]
    results = []

    def visit():
        results.append(Visitor(talk_server.url, number).ask("오래 답해 줘", settings=long, leave_after=3))

    threads = [threading.Thread(target=visit) for _ in range(13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(shown and "바쁘다" in shown[1] for shown in results)
    shown = Visitor(talk_server.url, number).ask("이제 내 차례", settings=[0, *SETTINGS[1:3], 2, *SETTINGS[4:]])
    assert re.search(DONE, shown[1]), shown


@pytest.mark.parametrize("values", [
    ["질문", "", 99, *SETTINGS[1:]], ["질문", "", *SETTINGS[:3], 10**9, *SETTINGS[4:]], ["가" * 9000, "", *SETTINGS],
    ["질문", "가" * 9000, *SETTINGS], [None, "", *SETTINGS],
    ["질문", "", "\x1b[31m빨강", *SETTINGS[1:]], ["\x1b[31m빨강"]])
def test_the_server_checks_what_the_browser_should_have(talk_server, values):
    """브라우저를 거치지 않고 보낸 값은 거절되고, 다음 질문은 멀쩡하다."""
    number = event_number(talk_server.url, "submit")
    visitor = Visitor(talk_server.url, number)
    if visitor.join(*values).status_code == 200:
        with httpx.stream("GET", f"{talk_server.url}/gradio_api/queue/data",
                          params={"session_hash": visitor.session}, timeout=60) as response:
            text = "".join(response.iter_text())
        assert "토큰/초" not in text
    shown = Visitor(talk_server.url, number).ask("멀쩡한 질문", settings=[0, *SETTINGS[1:3], 2, *SETTINGS[4:]])
    assert re.search(DONE, shown[1])


def test_only_one_port_is_open_and_only_to_this_machine(talk_server):
    family = psutil.Process(talk_server.process.pid)
    listening = [c for process in (family, *family.children(recursive=True))
                 for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    port = int(talk_server.url.rsplit(":", 1)[1])
    assert {(c.laddr.ip, c.laddr.port) for c in listening} == {("127.0.0.1", port)}
    outside = [c for c in family.net_connections(kind="inet") if c.raddr and not c.raddr.ip.startswith("127.")]
    assert not outside
    addresses = {a.address for group in psutil.net_if_addrs().values() for a in group if a.family == socket.AF_INET}
    for address in addresses - {"127.0.0.1"}:
        with socket.socket() as probe:
            probe.settimeout(2)
            assert probe.connect_ex((address, port)) != 0, f"{address}:{port}이 열려 있다"


def test_console_stays_quiet_about_what_people_write(talk_server):
    text = "\n".join(talk_server.lines)
    assert "\x1b" not in text and "오래 답해 줘" not in text, text[-2000:]


def test_many_visitors_with_a_third_leaving(talk_server):
    """tests/bench/load_page.py의 짧은 실행이다."""
    from bench.load_page import load

    result = load(talk_server, clients=20, seconds=8)
    assert result["lost"] == 0 and result["busy"] > 0 and result["answered"] > 0 and result["left"] > 0, result
    assert result["next_answer"] == "answered" and result["ram_grown_mb"] < 300, result
