"""실제 페이지를 브라우저로 써 보며 README의 그림을 찍는다.

    python tests/bench/shoot_page.py --peft_root train/lora-demo --run_dirs train/lora-e3,train/lora-e5 --output assets
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from playwright.sync_api import expect, sync_playwright
from serving import DONE, ROOT, launch_browser, serving

WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


def shoot(url: str, output: Path) -> list[Path]:
    """그림을 찍고 그 경로를 돌려준다."""
    shots = []

    def keep(page, name: str, whole: bool = False) -> None:
        page.mouse.move(0, 0)
        page.wait_for_timeout(600)
        page.screenshot(path=output / name, full_page=whole)
        shots.append(output / name)

    with sync_playwright() as playwright:
        browser = launch_browser(playwright)
        page = browser.new_page(viewport=WIDE, locale="ko-KR")
        page.goto(url)
        ask(page, 0)
        ask(page, 1)
        keep(page, "page.png")
        page.locator("#theme-button").click()
        keep(page, "page-dark.png")
        page.locator("#theme-button").click()
        page.locator("#talk-new").click()
        page.locator("#other input").click()
        page.get_by_role("option", name="기반 모델").click()
        ask(page, 0)
        keep(page, "page-compare.png")
        page.get_by_role("tab", name="얼마나 배웠나").click()
        expect(page.locator("#learned-status textarea")).to_have_value(re.compile("검증 질문"), timeout=60_000)
        page.locator("#ask-both").click()
        wait(page, "#learned-status")
        page.locator("#measure").click()
        expect(page.locator("#learned-status textarea")).to_have_value(re.compile("개로 쟀어요"), timeout=240_000)
        keep(page, "page-learned.png", whole=True)
        page.get_by_role("tab", name="학습 기록").click()
        expect(page.locator("#curves img")).to_be_visible(timeout=60_000)
        keep(page, "page-runs.png", whole=True)
        phone = browser.new_page(viewport=PHONE, locale="ko-KR", device_scale_factor=2, is_mobile=True)
        phone.goto(url)
        ask(phone, 1)
        keep(phone, "page-phone.png")
        browser.close()
    return shots


def ask(page, example: int) -> None:
    """예시 하나(0부터)를 늘 같은 답이 나오게 묻는다."""
    expect(page.locator("#talk-question .submit-button")).to_be_visible(timeout=60_000)
    page.wait_for_timeout(1500)  # 검증 질문을 읽어 예시를 바꾸기를 기다린다
    chips = page.locator("#chips button")
    chips.nth(min(example, chips.count() - 1)).click(timeout=60_000)  # 검증 질문이 하나뿐인 학습도 있다
    expect(page.locator("#talk-question textarea")).not_to_have_value("", timeout=60_000)
    temperature = page.locator("#talk-temperature input[type=number]")
    if not temperature.is_visible():
        page.locator("#talk-settings button").first.click()
        temperature.fill("0")
        temperature.press("Tab")
        page.locator("#talk-settings button").first.click()
    page.locator("#talk-question textarea").press("Enter")
    expect(page.locator("#talk-question textarea")).to_have_value("", timeout=60_000)  # 답하기 시작했다
    wait(page, "#talk-status")
    expect(page.locator("#talk-question .submit-button")).to_be_visible(timeout=120_000)


def wait(page, element: str) -> None:
    expect(page.locator(f"{element} textarea")).to_have_value(re.compile(DONE), timeout=120_000)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peft_root", required=True)
    parser.add_argument("--run_dirs", default="")
    parser.add_argument("--output", type=Path, default=ROOT / "assets")
    options = parser.parse_args()
    runs = ["--run_dirs", options.run_dirs] if options.run_dirs else []
    with serving("--peft_root", options.peft_root, *runs) as served:
        for file in shoot(served.url, options.output):
            print(file)
