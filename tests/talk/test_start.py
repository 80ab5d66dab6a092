"""페이지에서 시작한 학습: 보이는 명령 그대로 돌고, 두 번 눌러도 하나이고, 멈추면 저장되고, 이어서 끝난다."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import write_rows
from tiny import build_neox

from utils.console import shown_command
from utils.errors import UsageError
from utils.model import checkpoint
from utils.paths import DATA_DEMO, ROOT
from utils.talk import page_start
from utils.talk.opened import Opened
from utils.talk.order import Order, base_models, data_files, free_name
from utils.talk.runs import PROCESS_FILE, Runs, _find_process
from utils.talk.source import find_source

GOOD = {"data_path": "rows.json", "base_model": "resources/tiny", "name": "배움", "epochs": 40, "template": "default"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """데이터 하나와 기반 모델 하나가 있는 지금 폴더."""
    folder = tmp_path_factory.mktemp("start")
    build_neox(folder / "resources" / "tiny", context=1024, brief=True)
    write_rows(folder / "rows.json")
    return folder


@pytest.fixture
def runs(lab, monkeypatch):
    monkeypatch.chdir(lab)
    monkeypatch.setenv("TMPDIR", str(lab / "tmp"))
    (lab / "tmp").mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", None)  # TMPDIR를 다시 읽게 한다
    opened = Runs()
    yield opened
    for name in opened.names():
        process = opened._process(opened.home / name)
        if process is not None:
            process.kill()


def wait(runs, name: str, until, seconds: float = 240):
    end = time.monotonic() + seconds
    while True:
        progress = runs.progress(name)
        if until(progress):
            return progress
        assert time.monotonic() < end, f"{progress.line}\n{progress.log.lines}"
        time.sleep(0.1)


def test_a_process_that_has_only_just_begun_is_found(monkeypatch):
    """exec이 막 끝난 프로세스의 명령줄은 잠깐 비어 있다. 그동안 다른 페이지가 도는 학습을 보지 못했다."""
    this = psutil.Process()
    record = {"pid": this.pid, "created": this.create_time()}
    assert _find_process(record) is None, "남의 프로세스다"
    monkeypatch.setattr(psutil.Process, "cmdline", lambda process: [])
    assert _find_process(record) == this
    assert _find_process({**record, "created": this.create_time() - 60}) is None, "번호를 물려받은 다른 프로세스다"


def test_a_run_is_checked_started_stopped_resumed_and_finished(runs, lab):
    order = Order.checked(**GOOD)
    plan = runs.check(order)
    places = [plan.find(part) for part in ("데이터: ", "계획: ", " step(", "걸리는 시간: ", "찾은 것")]
    assert places == sorted(places) and places[0] == 0, plan
    assert not runs.home.exists(), "검사는 아무것도 만들지 않는다"

    refused = []

    def click(opened):
        try:
            opened.start(order)
        except UsageError as error:
            refused.append(str(error))

    twin = Runs()  # 같은 폴더에서 연 다른 서버
    clicks = [threading.Thread(target=click, args=(opened,)) for opened in (runs, runs, twin, twin)]
    for each in clicks:
        each.start()
    for each in clicks:
        each.join()
    assert len(refused) == 3
    assert all("이미 학습하고 있어요: 배움" in line or "다른 페이지가 지금" in line for line in refused), refused
    process = runs._process(lab / "train" / "배움")
    shown = page_start.shown_command(runs.command(order))
    if sys.platform == "linux":
        assert process.cmdline() == shlex.split(shown), "보인 명령이 그대로 돈다"
        assert os.getsid(process.pid) == process.pid != os.getsid(0), "서버의 Ctrl+C와 닫힘이 닿지 않는다"
    with pytest.raises(UsageError, match="이미 학습하고 있어요"):
        runs.start(Order.checked(**{**GOOD, "name": "다른-것"}))
    with pytest.raises(UsageError, match="이미 학습하고 있어요: .*배움"):
        Runs(home=lab / "다른 폴더").start(order)  # 다른 폴더에서 연 페이지도 같은 카드를 쓴다

    reopened = Runs()  # 서버를 다시 열었다
    assert reopened.names() == ["배움"]
    moving = wait(reopened, "배움", lambda progress: "남은 시간" in progress.line)
    assert moving.state == "running" and "loss" in moving.line and "step" in moving.line
    assert page_start.follow(reopened, "배움")[4]["visible"] is True
    assert [page_start.follow(reopened, "배움", here)[-1]["active"] for here in (True, False)] == [True, False]
    reopened.stop("배움")
    stopped = wait(reopened, "배움", lambda progress: progress.state != "running")
    assert stopped.state == "stopped" and "저장하고 멈추었다" in stopped.log.last_line
    assert "이어 할 수 있어요" in stopped.line
    saved = checkpoint.newest_valid(lab / "train" / "배움")
    assert saved is not None and not (lab / "train" / "배움" / "run.json").exists()
    with pytest.raises(UsageError, match="돌고 있지 않은"):
        reopened.stop("배움")
    with pytest.raises(UsageError, match="이미 무언가 있어요"):
        reopened.start(order)

    reopened.resume("배움")
    with pytest.raises(UsageError, match="이미 학습하고 있어요"):
        reopened.resume("배움")
    done = wait(reopened, "배움", lambda progress: progress.state != "running")
    assert done.state == "finished", done.log
    log = (lab / "train" / "배움" / "train.log").read_text(encoding="utf-8")
    assert "이어 가기: " in log and saved.name in log
    assert done.log.total == done.log.step == max(done.log.losses) and 0 in done.log.evals
    _, status, _, curve, stop, resume, talk, enter, clock = page_start.follow(reopened, "배움")
    assert curve.count("<polyline") == 2 and not clock["active"]
    assert status.startswith("끝났어요") and not stop["visible"] and not resume["visible"]
    folder = lab / "train" / "배움"
    words = ["python", str(ROOT / "generate.py"), "--peft_root", str(folder.relative_to(lab))]
    assert talk["visible"] and enter["visible"] and talk["value"] == shown_command(words)
    assert find_source(None, words[-1], print).adapter.resolve() == folder
    pages = Opened()
    url = pages.url_of(folder)
    assert pages.url_of(folder) == url and "배움" in httpx.get(url).text, "같은 학습은 한 번만 연다"
    with pytest.raises(UsageError, match="어댑터가 없다"):
        pages.url_of(lab / "resources")
    (process, _), = pages._pages.values()
    pages.close()
    assert process.wait(30) is not None
    assert "약" in reopened._time_line("블록: 1,000개 x 1024 토큰(채움 90.0%)", order)


@pytest.mark.quick
def test_the_tab_is_there_only_on_this_machine(runs, lab):
    """다른 컴퓨터에서 들어올 수 있으면 탭도, 그 함수들도 없다."""
    from utils.talk.page import Access, Results, build
    from utils.talk.source import find_sources, load_models

    models = load_models(find_sources("resources/tiny", [], print), None, None, False, None, print)
    sizes = {}
    for opened in (None, runs):
        config = build(models, "tiny", Results(), opened).get_config_file()
        ids = {component["props"].get("elem_id") for component in config["components"]}
        assert ("start-go" in ids) is (opened is not None)
        sizes[opened] = len(config["dependencies"])
    assert sizes[None] < sizes[runs]
    assert Access().is_private and Access(server_name="localhost", auth="a:b").is_private
    for reachable in (Access(share=True), Access(server_name="0.0.0.0"), Access(server_name="192.168.0.2")):
        assert not reachable.is_private


@pytest.mark.slow
def test_a_browser_starts_follows_and_stops(lab, browser, monkeypatch):
    """보이는 명령, 두 번 누른 시작, 살아 있는 진행과 곡선, 닫았다 연 브라우저, 다른 탭에서는 묻지 않기, 멈추기."""
    from playwright.sync_api import expect
    from serving import PORT, serving

    monkeypatch.setenv("TMPDIR", str(lab / "tmp"))
    (lab / "tmp").mkdir(exist_ok=True)
    with serving("--base_model", "resources/tiny", cwd=lab, port=PORT + 40) as served:
        page = browser.new_page(locale="ko-KR")

        def open_tab():
            page.goto(served.url)
            page.get_by_role("tab", name="학습하기").click()
            expect(page.locator("#start-command textarea")).to_have_value(re.compile("--data_path rows.json"),
                                                                          timeout=60_000)
        open_tab()
        page.locator("#start-epochs input").fill("60")
        page.locator("#start-epochs input").press("Tab")
        expect(page.locator("#start-command textarea")).to_have_value(re.compile("--num_train_epochs 60"))
        page.locator("#start-check").click()
        expect(page.locator("#start-plan textarea")).to_have_value(re.compile("계획: "), timeout=120_000)
        page.locator("#start-go").dblclick()  # 두 번째 누름이 다음 이름으로 또 시작하지 않는다
        status = page.locator("#start-status textarea")
        expect(status).to_have_value(re.compile(r"\d+/\d+ step · loss .* 남은 시간"), timeout=120_000)
        open_tab()
        expect(status).to_have_value(re.compile("학습하는 중"), timeout=30_000)
        expect(page.locator("#start-curve polyline.train")).to_be_attached()
        asked = []
        page.on("request", lambda request: asked.append(request.url) if "queue/join" in request.url else None)
        with page.expect_request(lambda request: "queue/join" in request.url, timeout=30_000):
            pass
        page.get_by_role("tab", name="대화").click()
        page.wait_for_timeout(3000)
        asked.clear()
        page.wait_for_timeout(2500 * page_start.EVERY)
        assert not asked, "보지 않는 탭은 서버에 묻지 않는다"
        page.get_by_role("tab", name="학습하기").click()
        page.locator("#start-stop").click()
        expect(status).to_have_value(re.compile("멈췄어요|끝났어요"), timeout=120_000)
        assert len(list((lab / "train").glob("lora-*"))) == 1


@pytest.mark.quick
def test_a_run_that_fails_says_why(runs, lab):
    (lab / "empty.json").write_text("[]", encoding="utf-8")
    order = Order.checked(**{**GOOD, "data_path": "empty.json", "name": "실패"})
    with pytest.raises(UsageError) as error:
        runs.check(order)
    assert "empty.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.quick
class TestOrder:
    @pytest.fixture(autouse=True)
    def here(self, lab, monkeypatch):
        monkeypatch.chdir(lab)

    @pytest.mark.parametrize("wrong", [
        {"data_path": "../secret.json"}, {"data_path": "/etc/passwd"}, {"data_path": "none.json"}, {"data_path": None},
        {"data_path": "resources"}, {"data_path": "rows.json\0"}, {"data_path": ["rows.json"]},
        {"base_model": "resources"}, {"base_model": "/"}, {"base_model": "owner/name"}, {"base_model": ""},
        {"name": "../x"}, {"name": "a/b"}, {"name": "a\\b"}, {"name": "-rf"}, {"name": ".hidden"}, {"name": ""},
        {"name": "가" * 61}, {"name": "a;b"}, {"name": "con"}, {"name": "NUL.txt"}, {"name": "끝."}, {"name": "a b"},
        {"epochs": 0}, {"epochs": -1}, {"epochs": float("nan")}, {"epochs": "5"}, {"epochs": True}, {"epochs": 10**9},
        {"template": "../../x"}, {"template": None}])
    def test_what_the_browser_sends_is_checked_again(self, wrong):
        with pytest.raises(UsageError) as error:
            Order.checked(**{**GOOD, **wrong})
        assert "\n" not in str(error.value)

    def test_a_link_inside_is_followed(self, lab, tmp_path):
        with contextlib.suppress(FileExistsError):
            (lab / "data").symlink_to(tmp_path, target_is_directory=True)
        write_rows(tmp_path / "mine.json")
        assert Order.checked(**{**GOOD, "data_path": "data/mine.json"}).data_path.endswith("mine.json")

    def test_lists_name_what_is_there(self, tmp_path):
        assert "rows.json" in data_files() and str(Path("resources/tiny")) in base_models()
        assert not any(name.endswith("requirements.txt") for name in data_files())
        shipped = [name for name in data_files() if "polyglot-ko" in name]
        assert shipped[0].endswith(DATA_DEMO.name) and len(shipped) > 1
        (tmp_path / "lora-1").mkdir()
        assert free_name(tmp_path) == "lora-2"


@pytest.mark.quick
def test_a_record_that_was_changed_is_checked_again(runs, lab):
    folder = lab / "train" / "옛것"
    folder.mkdir(parents=True)
    for text in ("", "[]", json.dumps({"pid": 1, "created": 0, "order": {"cmd": "rm"}}),
                 json.dumps({"pid": "x", "order": {**GOOD, "data_path": "/etc/passwd"}})):
        (folder / PROCESS_FILE).write_text(text, encoding="utf-8")
        assert runs.progress("옛것").state == "failed"
        with pytest.raises(UsageError) as error:
            runs.order("옛것")
        assert "\n" not in str(error.value)
        with pytest.raises(UsageError, match="체크포인트가 없어요"):
            runs.resume("옛것")
    with pytest.raises(UsageError, match="목록에서"):
        runs.progress("../../etc")
    assert psutil.pid_exists(1), "남의 프로세스를 건드리지 않는다"
    (folder / PROCESS_FILE).unlink()


@pytest.mark.skipif(os.name == "nt", reason="Windows의 terminate는 정리할 틈을 주지 않는다")
@pytest.mark.quick
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_page_that_is_told_to_end_closes_what_it_opened(number):
    """연 페이지들을 닫는 일은 atexit에 있다. 신호를 그냥 받으면 불리지 않아 그 페이지들이 남는다."""
    code = ("import atexit, threading; from utils.talk.opened import wait_for_signal; "
            "atexit.register(print, 'closed', flush=True); "
            "threading.Timer(1, print, ['open'], {'flush': True}).start(); wait_for_signal()")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        process.send_signal(getattr(signal, number))
        assert process.stdout.read() == "closed\n" and process.wait(30) == 128 + getattr(signal, number)
