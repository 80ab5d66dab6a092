"""페이지의 서버가 낯선 손님에게서 지키는 것: 줄의 끝, 받은 값, 열린 포트, 콘솔."""

import re
import socket
import threading

import httpx
import psutil
import pytest
from serving import DONE, SETTINGS, Visitor, event_number


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
    assert any(shown and "바빠요" in shown[1] for shown in results)
    shown = Visitor(talk_server.url, number).ask("이제 내 차례", settings=[0, *SETTINGS[1:3], 2, *SETTINGS[4:]])
    assert re.search(DONE, shown[1]), shown


@pytest.mark.parametrize("values", [
    ["질문", "", 99, *SETTINGS[1:]], ["질문", "", *SETTINGS[:3], 10**9, *SETTINGS[4:]], ["가" * 9000, "", *SETTINGS],
    ["질문", "가" * 9000, *SETTINGS], [None, "", *SETTINGS], ["질문", "", *SETTINGS[:-2], "없는 모델", ""],
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
    assert "Traceback" not in text, text[-3000:]


def test_many_visitors_with_a_third_leaving(talk_server):
    """tests/bench/load_page.py의 짧은 실행이다."""
    from bench.load_page import load

    result = load(talk_server, clients=20, seconds=8)
    assert result["lost"] == 0 and result["busy"] > 0 and result["answered"] > 0 and result["left"] > 0, result
    assert result["next_answer"] == "answered" and result["ram_grown_mb"] < 300, result
