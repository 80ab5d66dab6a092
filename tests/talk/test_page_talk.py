"""사람이 브라우저로 대화하는 그대로: 묻고, 고치고, 다시 답하고, 비교하고, 남기고, 그것으로 다시 배운다."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect
from serving import DONE, visiting

from utils.data.dataset import load_documents
from utils.data.encoder import Encoder
from utils.model.tokenizer import load_tokenizer
from utils.prompter import Prompter

LIVE_TEXT = ("<b>굵게</b> <img src=x onerror=\"window.hacked=1\"> <script>window.hacked=1</script> "
             "![그림](http://192.0.2.1/x.png)\n\n| 가 | 나 |\n|---|---|\n| 1 | 2 |\n\n```python\nprint('<i>')\n```\n\n"
             "```mermaid\ngraph TD; A-->B\n```")


SHORT = 24  # 무작위 모델의 토큰 몇 개는 완성된 음절이 없어 빈 답일 수 있다


@pytest.fixture(scope="module")
def opened(browser, talk_server):
    with visiting(browser, talk_server.url) as page:
        page.locator("#talk-settings button").first.click()
        set_tokens(page, SHORT)
        yield page


@pytest.fixture
def page(opened):
    start_anew(opened)
    set_seed(opened, "5")
    set_tokens(opened, SHORT)
    return opened


def start_anew(page) -> None:
    page.locator("#talk-new").click()
    expect(page.locator("#chat .message-row")).to_have_count(0)


def set_seed(page, seed: str) -> None:
    page.locator("#talk-seed input, #talk-seed textarea").fill(seed)


def set_tokens(page, count: int) -> None:
    field = page.locator("#talk-max-new-tokens input[type=number]")
    field.fill(str(count))
    field.press("Tab")


def question(page):
    return page.locator("#talk-question textarea")


def wait_answer(page, turns: int = 1) -> None:
    expect(page.locator("#chat [data-testid=bot]")).to_have_count(turns, timeout=60_000)
    expect(page.locator("#talk-status textarea")).to_have_value(re.compile(DONE), timeout=60_000)
    expect(page.locator("#talk-question .submit-button")).to_be_visible()


def wait_new_answer(page, before: str, turns: int = 2) -> None:
    """마지막 답이 `before`에서 바뀌어 다 될 때까지."""
    page.wait_for_function("""before => {
        const last = [...document.querySelectorAll("#chat [data-testid=bot]")].at(-1);
        return last && last.innerText.trim() && last.innerText.trim() !== before;
    }""", arg=before)
    wait_answer(page, turns)


def ask(page, text: str, turns: int = 1) -> None:
    question(page).fill(text)
    question(page).press("Enter")
    wait_answer(page, turns)


def said(page, role: str, place: int = -1, chat: str = "chat") -> str:
    texts = page.locator(f"#{chat} [data-testid={role}]").all_inner_texts()
    return texts[place].replace("\u2060", "").strip()


def press(page, role: str, label: str) -> None:
    """마지막 말 아래의 단추를 누른다."""
    side = "right" if role == "user" else "left"
    page.locator(f"#chat .message-buttons-{side}").last.get_by_role("button", name=label, exact=True).click()


def rewrite(page, role: str, text: str) -> None:
    press(page, role, "고쳐 쓰기")
    page.locator("#chat .message-row textarea").fill(text)
    page.get_by_role("button", name="고친 글 보내기").click()


def test_talk_of_several_turns(page):
    question(page).fill("첫 줄")
    question(page).press("Shift+Enter")
    question(page).press_sequentially("둘째 줄")
    assert question(page).input_value() == "첫 줄\n둘째 줄"
    set_tokens(page, 60)
    page.evaluate("""() => {
        const shown = (name) => document.querySelector(`#talk-question .${name}`)?.offsetParent;
        new MutationObserver(() => { window.swapped ||= shown("stop-button") && !shown("submit-button"); })
            .observe(document.body, { childList: true, subtree: true, attributes: true });
    }""")  # 답이 짧아 금방 지나가도 본다
    question(page).press("Enter")
    page.wait_for_function("() => window.swapped")  # 답하는 동안에는 보내기 자리에 멈추기가 선다
    wait_answer(page)
    set_tokens(page, SHORT)
    assert question(page).input_value() == ""
    first = said(page, "bot")
    ask(page, "두 번째 질문", turns=2)
    second = said(page, "bot")
    assert said(page, "user", 0) == "첫 줄\n둘째 줄" and said(page, "bot", 0) == first
    page.reload()
    expect(page.locator("#chat [data-testid=bot]")).to_have_count(2, timeout=30_000)
    assert said(page, "bot", 0) == first
    page.locator("#talk-settings button").first.click()
    set_tokens(page, SHORT)
    press(page, "bot", "다시 답하기")
    wait_new_answer(page, second)
    assert said(page, "user") == "두 번째 질문"
    third = said(page, "bot")
    rewrite(page, "user", "고친 질문")
    wait_new_answer(page, third)
    assert said(page, "user") == "고친 질문"
    press(page, "bot", "마지막 질문 되돌리기")
    expect(page.locator("#chat [data-testid=bot]")).to_have_count(1)
    expect(question(page)).to_have_value("고친 질문")
    question(page).fill("")


def test_stop_keeps_what_was_said(page):
    set_tokens(page, 900)
    question(page).fill("오래 답해 줘")
    question(page).press("Enter")
    expect(page.locator("#chat [data-testid=bot]").last).not_to_have_text("", timeout=30_000)
    page.locator("#talk-question .stop-button").click()
    expect(page.locator("#talk-status textarea")).to_have_value(re.compile("사용자가 멈춤"), timeout=30_000)
    expect(page.locator("#talk-question .submit-button")).to_be_visible()
    assert said(page, "bot")


def test_long_answers_are_followed_to_their_end(page):
    page.set_viewport_size({"width": 390, "height": 560})
    set_tokens(page, 60)
    box = page.locator("#chat .bubble-wrap")
    for turn in range(1, 4):
        ask(page, f"{turn}번째로 길게 답해 줘", turn)
        page.wait_for_timeout(600)
        below = box.evaluate("box => box.scrollHeight - box.scrollTop - box.clientHeight")
        assert below < 30, below
    tall = box.evaluate("box => box.scrollHeight - box.clientHeight")
    assert tall > 100, tall
    page.set_viewport_size({"width": 1280, "height": 800})


def test_composing_hangul_never_sends(page):
    keys = page.context.new_cdp_session(page)
    question(page).focus()
    keys.send("Input.imeSetComposition", {"text": "안녀", "selectionStart": 2, "selectionEnd": 2})
    for key in ({"type": "rawKeyDown", "windowsVirtualKeyCode": 229, "key": "Process", "code": "Enter"},
                {"type": "keyDown", "windowsVirtualKeyCode": 13, "key": "Enter", "code": "Enter", "text": "\r"}):
        keys.send("Input.dispatchKeyEvent", key)
        keys.send("Input.imeSetComposition", {"text": "안녕", "selectionStart": 2, "selectionEnd": 2})
    page.wait_for_timeout(400)
    assert page.locator("#chat .message-row").count() == 0
    keys.send("Input.insertText", {"text": "안녕"})
    assert question(page).input_value().strip() == "안녕"
    question(page).press("Enter")
    wait_answer(page)
    assert said(page, "user") == "안녕"


def test_text_is_drawn_but_never_live(page):
    ask(page, LIVE_TEXT)
    rewrite(page, "bot", LIVE_TEXT)
    expect(page.locator("#talk-status textarea")).to_have_value(re.compile("고친 답을 남겼어요"))
    for role in ("user", "bot"):
        box = page.locator(f"#chat [data-testid={role}]").last
        expect(box.locator("table td").first).to_have_text("1")
        expect(box.locator("pre code").first).to_contain_text("print")
        assert box.locator("img, script, svg.flowchart, b").count() == 0
        assert "<img src=x" in said(page, role) and "<script>" in said(page, role)
    press(page, "bot", "복사")
    assert page.evaluate("navigator.clipboard.readText()") == LIVE_TEXT
    assert page.evaluate("window.hacked") is None


def test_two_models_stand_side_by_side(page):
    page.locator("#other input").click()
    page.get_by_role("option", name="기반 모델").click()
    expect(page.locator("#chat-other")).to_be_visible()
    ask(page, "비교해 보자")
    left, right = page.locator("#chat").bounding_box(), page.locator("#chat-other").bounding_box()
    assert left["height"] == right["height"] and left["y"] == right["y"] and left["x"] < right["x"]
    assert said(page, "bot") and said(page, "bot", chat="chat-other") not in ("", said(page, "bot"))
    expect(page.locator("#chat [data-testid=block-label]")).to_contain_text("run")
    expect(page.locator("#chat-other [data-testid=block-label]")).to_contain_text("기반 모델")
    page.locator("#other input").click()
    page.get_by_role("option", name="비교하지 않기").click()
    expect(page.locator("#chat-other")).to_be_hidden()


def export_pair(page) -> list[list[str]]:
    """내려받은 선호 쌍 하나의 질문, 고른 답, 버린 답. 빈칸에서 나눈 낱말들이다."""
    page.get_by_role("tab", name="내 기록").click()
    with page.expect_download() as download:
        page.locator("#history-pairs").click()
    (row,) = map(json.loads, Path(download.value.path()).read_text(encoding="utf-8").splitlines())
    page.get_by_role("tab", name="대화", exact=True).click()
    return [row[name][-1]["content"].split() for name in ("prompt", "chosen", "rejected")]


def test_a_better_second_answer_makes_a_pair(page):
    page.evaluate("localStorage.removeItem('polyglot-ko-lite-talks')")
    ask(page, "다시 답해 보자")
    bad = said(page, "bot")
    press(page, "bot", "나쁜 답")
    expect(page.locator("#talk-status textarea")).to_have_value(re.compile("나쁜 답으로 남겼어요"))
    set_seed(page, "6")
    press(page, "bot", "다시 답하기")
    wait_new_answer(page, bad, turns=1)
    good = said(page, "bot")
    press(page, "bot", "좋은 답")
    expect(page.locator("#talk-status textarea")).to_have_value(re.compile("이 답이 더 낫다고"))
    assert export_pair(page) == [["다시", "답해", "보자"], good.split(), bad.split()]


def test_a_thumb_beside_another_answer_makes_a_pair(page):
    page.evaluate("localStorage.removeItem('polyglot-ko-lite-talks')")
    page.locator("#other input").click()
    page.get_by_role("option", name="기반 모델").click()
    ask(page, "비교해 보자")
    left, right = said(page, "bot"), said(page, "bot", chat="chat-other")
    pairs = []
    for label, told in (("나쁜 답", "옆의 답이 더 낫다고"), ("좋은 답", "이 답이 더 낫다고")):
        press(page, "bot", label)
        expect(page.locator("#talk-status textarea")).to_have_value(re.compile(told))
        pairs.append(export_pair(page))
    asked = ["비교해", "보자"]
    assert pairs == [[asked, right.split(), left.split()], [asked, left.split(), right.split()]]
    page.locator("#other input").click()
    page.get_by_role("option", name="비교하지 않기").click()


def test_empty_question_and_bad_seed_get_a_notice_beside_the_button(page):
    question(page).press("Enter")
    notice = page.locator("#talk-status")
    expect(notice.locator("textarea")).to_have_value("질문을 적어 주세요")
    assert "notice" in notice.get_attribute("class")
    button = page.locator("#talk-question .submit-button").bounding_box()
    assert 0 < notice.bounding_box()["y"] - button["y"] < 80
    set_seed(page, "하나")
    question(page).fill("질문")
    question(page).press("Enter")
    expect(notice.locator("textarea")).to_have_value(re.compile("시드에는 0 이상의 정수"))
    expect(question(page)).to_have_value("질문")


def test_examples_fill_the_question(page):
    chip = page.locator("#chips button").first
    expect(chip).to_contain_text("더하기", timeout=30_000)  # 사용자의 검증 질문
    assert chip.bounding_box()["y"] < question(page).bounding_box()["y"]
    text = chip.locator("div").first
    shape = text.evaluate("one => { const style = getComputedStyle(one);"
                          " return [style.display, style.textOverflow, style.whiteSpace]; }")
    assert shape == ["block", "ellipsis", "nowrap"], "긴 질문은 줄임표로 끝난다"
    chip.click()
    expect(question(page)).to_have_value(chip.inner_text().strip())
    question(page).fill("")


def test_lost_connection_is_told_in_korean(browser, talk_server):
    """영어 브라우저에서도 그렇다."""
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    page.goto(talk_server.url)
    question(page).wait_for(timeout=60_000)
    page.wait_for_timeout(1000)
    context.set_offline(True)
    question(page).fill("질문")
    question(page).press("Enter")
    expect(page.locator(".toast-body")).to_contain_text("서버와 연결이 끊겼어요", timeout=30_000)
    assert not re.search("[A-Za-z]{3}", page.locator(".toast-body").inner_text())
    context.close()


def test_marked_talks_train_the_next_adapter(page, talk_run, tmp_path):
    page.evaluate("localStorage.removeItem('polyglot-ko-lite-talks')")
    page.locator("#system textarea").fill("짧게 답한다")
    ask(page, "첫 질문")
    ask(page, "둘째 질문", turns=2)
    original = said(page, "bot")
    rewrite(page, "bot", "사람이 고친 답")
    expect(page.locator("#talk-status textarea")).to_have_value(re.compile("고친 답을 남겼어요"))
    page.locator("#system textarea").fill("")
    start_anew(page)
    ask(page, "다른 질문")
    liked = said(page, "bot")
    press(page, "bot", "좋은 답")
    expect(page.locator("#talk-status textarea")).to_have_value(re.compile("좋은 답으로 남겼어요"))
    page.get_by_role("tab", name="내 기록").click()
    expect(page.locator("#history-list article")).to_have_count(2)
    with page.expect_download() as download:
        page.locator("#history-train").click()
    file = tmp_path / "train.jsonl"
    file.write_bytes(Path(download.value.path()).read_bytes())
    with page.expect_download() as download:
        page.locator("#history-pairs").click()
    pair_file = tmp_path / "pairs.jsonl"
    pair_file.write_bytes(Path(download.value.path()).read_bytes())
    pair = json.loads(pair_file.read_text(encoding="utf-8"))
    page.get_by_role("button", name="이어서 대화하기").last.click()
    expect(page.locator("#chat [data-testid=bot]").last).to_have_text("사람이 고친 답")

    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [message["role"] for message in rows[0]["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert rows[0]["messages"][2]["weight"] == 0 and rows[0]["messages"][4]["content"] == "사람이 고친 답"
    assert rows[1]["messages"][1]["content"].split() == liked.split()
    assert pair["rejected"][0]["content"].split() == original.split()
    assert pair["chosen"][0]["content"] == "사람이 고친 답"

    base = json.loads((talk_run / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    tokenizer, prompter = load_tokenizer(base), Prompter()
    encoder = Encoder(tokenizer, tokenizer.eos_token_id, len(tokenizer))
    documents = load_documents(str(file), prompter, encoder, 256, tokenizer.eos_token_id)
    assert len(documents) == 2
    tokens, learned = documents.document(0)
    assert tokenizer.decode(tokens[learned]).removesuffix("<|endoftext|>").strip() == "사람이 고친 답"
    pairs = load_documents(str(pair_file), prompter, encoder, 256, tokenizer.eos_token_id)
    answers = [tokenizer.decode(ids[marked]).removesuffix("<|endoftext|>").split()
               for ids, marked in map(pairs.document, range(2))]
    assert pairs.pairs and answers == [["사람이", "고친", "답"], original.split()]
