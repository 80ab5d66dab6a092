"""대화 말고도 페이지가 보이는 것: 한 번 묻기, 재기, 학습 기록, 첫 화면, 빛깔."""

import csv
import io
import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect
from serving import DONE, visiting

from utils.prompter import EXAMPLES
from utils.talk import page
from utils.talk.page_learned import Results
from utils.talk.source import find_sources, load_models

CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")
TABS = ("대화", "한 번 묻기", "얼마나 배웠나", "학습 기록", "학습하기", "내 기록")


@pytest.fixture(scope="module")
def opened(browser, talk_server):
    with visiting(browser, talk_server.url) as window:
        yield window


@pytest.fixture
def form(opened):
    show_tab(opened, "한 번 묻기")
    instruction = opened.locator("#instruction textarea")
    instruction.fill("지울 글")  # 지우기가 끝난 것을 알아야 한다. 늦게 지우면 다음에 적는 질문이 사라진다
    opened.locator("#clear").click()
    expect(instruction).to_have_value("")
    expect(opened.locator("#status textarea")).to_have_value("")
    return opened


def show_tab(page, name: str) -> None:
    tab = page.get_by_role("tab", name=name)
    if tab.is_visible():
        tab.click()
    else:
        page.locator(".overflow-menu button").first.click()
        page.get_by_text(name, exact=True).last.click()


def output(page, element: str = "output") -> str:
    return page.locator(f"#{element} textarea").input_value()


def ask(page, text: str, button: str = "submit") -> None:
    page.locator("#instruction textarea").fill(text)
    page.locator(f"#{button}").click()


def set_number(page, name: str, value: float) -> None:
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def wait_status(page, pattern: str, element: str = "status") -> str:
    field = page.locator(f"#{element} textarea")
    expect(field).to_have_value(re.compile(pattern), timeout=90_000)
    return field.input_value()


def test_answer_streams_and_tells_its_figures(form):
    set_number(form, "max-new-tokens", 300)
    ask(form, "딥러닝이 뭐야?")
    seen, until = set(), time.monotonic() + 90
    while not re.search(DONE, form.locator("#status textarea").input_value()):
        assert time.monotonic() < until, form.locator("#status textarea").input_value()
        seen.add(output(form))
        form.wait_for_timeout(50)
    final = output(form)
    assert len(seen - {""}) > 2, "한꺼번에 나왔다"
    assert all(final.startswith(part.rstrip()) for part in seen)
    assert "\ufffd" not in final and "### 질문" not in final
    wait_status(form, r"토큰 \d+개 · [\d,.]+ 토큰/초 · 첫 토큰까지 [\d.]+초 · ")
    expect(form.locator("#submit")).to_be_visible()


def test_stop_ends_the_work(form):
    set_number(form, "max-new-tokens", 900)
    ask(form, "오래 답해 줘")
    expect(form.locator("#output textarea")).not_to_have_value("", timeout=60_000)
    expect(form.locator("#submit")).to_be_hidden()  # 만드는 동안에는 같은 자리에 멈춤 단추가 있다
    form.locator("#stop").click()
    status = wait_status(form, "사용자가 멈춤")
    assert int(re.search(r"토큰 (\d+)개", status)[1]) < 900


@pytest.mark.parametrize("button", ["submit", "compare"])
def test_clear_empties_and_stops(form, button):
    set_number(form, "max-new-tokens", 900)
    for turn in range(3):  # 뒤늦은 글이 되살아나는 것은 몇 번에 한 번뿐이다
        ask(form, f"지울 질문 {turn}", button)
        expect(form.locator("#output textarea")).not_to_have_value("", timeout=60_000)
        form.locator("#clear").click()
        for element in ("instruction", "input", "output", "status"):
            expect(form.locator(f"#{element} textarea")).to_have_value("", timeout=30_000)
        form.wait_for_timeout(300)
        assert output(form) == output(form, "status") == ""
        expect(form.locator("#base-output")).to_be_hidden()


def test_examples_fill_the_form_and_an_empty_slot_warns(form):
    set_number(form, "max-new-tokens", 4)
    rows = form.locator("#examples tbody tr")
    expect(rows).to_have_count(2)  # 데모의 예시가 아니라 학습한 사용자의 질문이다
    rows.nth(1).click()
    expect(form.locator("#instruction textarea")).to_have_value("4 더하기 4는?", timeout=30_000)
    form.locator("#instruction textarea").fill("{x}가 뭐지?")
    form.locator("#submit").click()
    assert "{x} 자리" in wait_status(form, DONE)
    form.locator("#instruction textarea").fill(" ")
    form.locator("#submit").click()
    wait_status(form, "질문을 적어 주세요")


def test_compare_asks_the_tuned_model_first(form):
    set_number(form, "max-new-tokens", 12)
    expect(form.locator("#base-output")).to_be_hidden()
    ask(form, "비교해 보자", "compare")
    wait_status(form, DONE)
    wait_status(form, DONE, "base-status")
    assert output(form) and output(form, "base-output") and output(form) != output(form, "base-output")
    tuned, base = (form.locator(f"#{name}").bounding_box() for name in ("output", "base-output"))
    assert tuned["x"] < base["x"] and tuned["height"] == base["height"]
    expect(form.locator("#base-output")).to_contain_text("기반 모델")


def test_sliders_reach_the_model_and_opening_settings_changes_nothing(form):
    form.locator("#more button").first.click()
    expect(form.locator("#seed")).to_be_visible()
    form.wait_for_timeout(300)
    assert form.locator("#seed input, #seed textarea").input_value() == ""
    set_number(form, "max-new-tokens", 3)
    set_number(form, "temperature", 0)
    ask(form, "짧게")
    assert int(re.search(r"토큰 (\d+)개", wait_status(form, DONE))[1]) <= 3
    set_number(form, "temperature", 0.7)


def test_learned_tab_measures_and_gives_a_csv(opened):
    show_tab(opened, "얼마나 배웠나")
    wait_status(opened, "검증 질문", "learned-status")
    opened.locator("#ask-both").click()
    expect(opened.locator("#reference textarea")).to_have_value(re.compile("더하면"), timeout=90_000)
    wait_status(opened, DONE, "learned-status")
    assert output(opened, "learned-base") != output(opened, "learned-tuned")
    set_number(opened, "count", 1)
    opened.locator("#measure").click()
    wait_status(opened, "질문 1개로 쟀어요", "learned-status")
    expect(opened.locator("#scores")).to_contain_text("chrF")
    with opened.expect_download() as download:
        opened.locator("#csv").click()
    rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8-sig"))))
    assert len(rows) == 2 and "더하기" in rows[1][0]


def test_run_tab_shows_curves_and_settings(opened):
    show_tab(opened, "학습 기록")
    expect(opened.locator("#curves img")).to_be_visible(timeout=60_000)
    expect(opened.locator("#run-table")).to_contain_text("최대 VRAM")
    expect(opened.locator("#run-table")).to_contain_text("1.27")


def test_words_stand_out_from_their_ground(browser, talk_server):
    """보이는 글마다 글과 바탕의 명암비가 4.5를 넘는다. 어두운 페이지는 새로 열어도 어둡다."""
    with visiting(browser, talk_server.url) as window:
        expect(window.locator("#chips button").first).to_contain_text("더하기", timeout=30_000)
        window.locator("#theme-button").click()
        window.wait_for_timeout(500)
        window.reload()
        expect(window.locator("body.dark")).to_be_visible(timeout=30_000)
        expect(window.locator("#chips button").first).to_contain_text("더하기", timeout=30_000)
        for shade in ("dark", "light"):
            for name in TABS:
                show_tab(window, name)
                if name == "얼마나 배웠나":
                    wait_status(window, "검증 질문", "learned-status")
                if name == "학습 기록":
                    expect(window.locator("#curves img")).to_be_visible(timeout=60_000)
                window.wait_for_timeout(300)
                weak = window.evaluate(CONTRAST)
                assert not weak, (shade, name, weak)
            window.locator("#theme-button").click()


def test_tabs_with_nothing_are_not_made(tiny_neox):
    models = load_models(find_sources(str(tiny_neox), (), print), None, None, False, None, print)
    config = page.build(models, "제목", Results()).get_config_file()
    props = [component["props"] for component in config["components"] if component["type"] == "tabitem"]
    assert [each["label"] for each in props] == ["대화", "한 번 묻기", "내 기록"]
    samples = [component["props"]["samples"] for component in config["components"] if component["type"] == "dataset"]
    said = ["존댓말로 바꿔 줘: 나는 어제 도서관에서 책을 읽었어.", "AI가 뭐지?", "숫자를 읽어 줘: 3,482"]
    assert samples == [[[text] for text in said], list(map(list, EXAMPLES))]
    hidden = {component["props"].get("elem_id") for component in config["components"]
              if component["props"].get("visible") is False}
    assert {"model", "other", "compare"} <= hidden  # 비교할 것이 없다


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_first_screen_shows_question_answer_and_send(browser, talk_server, width, height):
    with visiting(browser, talk_server.url, width, height) as window:
        expect(window.locator("#chips button").first).to_contain_text("더하기", timeout=30_000)
        boxes = [window.locator(name).bounding_box() for name in ("#chat", "#talk-question", ".submit-button")]
        assert all(box["y"] >= 0 and box["y"] + box["height"] <= height for box in boxes), boxes
        assert boxes[0]["height"] >= 200
        expect(window.locator("#system")).to_be_hidden()
        expect(window).to_have_title("base + run")
        window.locator("#talk-question .submit-button").click()
        expect(window.locator("#talk-status textarea")).to_have_value("질문을 적어 주세요")
        window.locator("#chips button").first.click()  # 설정을 펴 보지 않아도 답한다
        expect(window.locator("#talk-question textarea")).not_to_have_value("")
        window.locator("#talk-question textarea").press("Enter")
        expect(window.locator("#chat [data-testid=bot]")).not_to_have_text("", timeout=30_000)
        window.locator("#talk-question .stop-button").click()
        expect(window.locator("#talk-status textarea")).to_have_value(re.compile("사용자가 멈춤"), timeout=30_000)
        for name in TABS:
            show_tab(window, name)
            window.wait_for_timeout(300)
            assert window.evaluate("document.documentElement.scrollWidth") <= width, name
