"""페이지를 새 프로세스로 열고, 사람 대신 Gradio의 길로 묻는다. 페이지의 테스트와 부하 시험과 그림이 함께 쓴다."""

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = Path("/usr/bin/chromium")
DONE = "스스로 멈춤|최대 길이에 닿음"
# pytest-xdist의 일꾼마다 100씩 떨어진 포트. 페이지는 잡힌 포트를 만나면 20개까지 옮겨 간다
PORT = 7960 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
SETTINGS = [0.7, 0.9, 40, 256, 1.0, 0, None, None, ""]  # 슬라이더 넷, 더 많은 설정 둘, 시드, 모델, 비교할 모델


def launch_browser(playwright):
    """데비안의 chromium, Windows에서는 Edge."""
    if sys.platform == "win32":
        return playwright.chromium.launch(channel="msedge")
    if not CHROMIUM.is_file():
        raise FileNotFoundError("chromium이 없다. 설치: sudo apt-get install chromium fonts-noto-cjk")
    return playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])


@contextmanager
def visiting(browser, url: str, width: int = 1280, height: int = 800, **options):
    """새 브라우저 창으로 페이지를 연다. 끝날 때 브라우저의 오류와 밖으로 나간 요청이 없었는지 본다."""
    context = browser.new_context(viewport={"width": width, "height": height}, locale="ko-KR", accept_downloads=True,
                                  permissions=["clipboard-read", "clipboard-write"], **options)
    page = context.new_page()
    requests, problems = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(url)
    page.locator("#talk-question textarea").wait_for(timeout=60_000)
    yield page
    context.close()
    outside = [each for each in requests if not each.startswith((url, "data:", "blob:"))]
    assert not outside, outside
    assert not problems, problems


@dataclass
class Served:
    """열린 페이지 하나. `lines`는 지금까지 콘솔에 나온 줄이다."""

    url: str
    process: subprocess.Popen
    lines: list[str] = field(default_factory=list)


@contextmanager
def serving(*flags: str, cwd: Path = ROOT, port: int = PORT) -> Iterator[Served]:
    """generate.py로 페이지를 열고, 다 쓰면 닫는다."""
    command = [sys.executable, str(ROOT / "generate.py"), "--server_port", str(port), *flags]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               encoding="utf-8")
    served = Served("", process)
    opened = threading.Event()

    def read() -> None:
        for line in process.stdout:
            served.lines.append(line.rstrip("\n"))
            if line.startswith("페이지: "):
                served.url = line.split()[1].rstrip("/")
                opened.set()
        opened.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        if not opened.wait(180) or not served.url:
            raise RuntimeError("페이지가 열리지 않았다:\n" + "\n".join(served.lines))
        yield served
    finally:
        process.terminate()
        process.wait(30)


def event_number(url: str, element: str, event: str = "click", client: httpx.Client | None = None) -> int:
    """`element`의 `event`가 부르는 함수의 번호."""
    config = (client or httpx).get(f"{url}/config", timeout=30).json()
    component = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == element)
    return next(d["id"] for d in config["dependencies"] if [component, event] in d["targets"])


class Visitor:
    """브라우저 하나처럼 묻는 손님."""

    def __init__(self, url: str, number: int):
        self._url = url
        self._number = number
        self.session = secrets.token_hex(8)

    def join(self, *values) -> httpx.Response:
        body = {"data": list(values), "fn_index": self._number, "session_hash": self.session}
        return httpx.post(f"{self._url}/gradio_api/queue/join", json=body, timeout=30)

    def ask(self, instruction: str, input: str = "", settings: list | None = None, leave_after: float | None = None,
            timeout: float = 120) -> list | None:
        """묻고 마지막에 화면에 남은 값 [답, 상태, ...]을 돌려준다. `leave_after`초 뒤에 떠나면 None이다."""
        self.join(instruction, input, *(settings or SETTINGS)).raise_for_status()
        shown: list = []
        began = time.monotonic()
        with httpx.stream("GET", f"{self._url}/gradio_api/queue/data", params={"session_hash": self.session},
                          timeout=httpx.Timeout(timeout, connect=30)) as response:
            for line in response.iter_lines():
                if leave_after is not None and time.monotonic() - began > leave_after:
                    return None
                if not line.startswith("data: "):
                    continue
                message = json.loads(line[6:])
                if message["msg"] == "process_generating":
                    shown = apply_changes(shown, message["output"]["data"])
                elif message["msg"] == "process_completed":
                    data = (message.get("output") or {}).get("data")
                    return [_value(item) for item in data or shown]
        raise RuntimeError("답이 끝나지 않고 끊겼다")


def _value(item):
    """칸의 값. 모양도 함께 고치는 답이면 그 속의 값이다."""
    return item["value"] if isinstance(item, dict) and "value" in item else item


def apply_changes(shown: list, data: list) -> list:
    """Gradio가 보낸, 앞의 값과 달라진 곳만 담은 값을 앞의 값에 적용한다."""
    if not shown:
        return list(data)
    return [_changed(old, new) for old, new in zip(shown, data, strict=True)]


def _changed(old, changes):
    if not isinstance(changes, list):
        return changes
    for action, path, value in changes:
        if path:  # 글이 아닌 값의 속을 고치는 변화는 답을 읽는 데 필요하지 않다
            continue
        old = old + value if action == "append" else value
    return old


def resident_bytes(process: subprocess.Popen) -> int:
    """프로세스가 지금 쓰는 RAM(바이트)."""
    import psutil

    return psutil.Process(process.pid).memory_info().rss


def write_talk_run(folder: Path, base: Path, data: Path, name: str = "run") -> Path:
    """학습하지 않고, 답을 바꾸는 어댑터와 학습의 기록을 가진 실행 폴더를 쓴다."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from utils import record
    from utils.model import adapter
    from utils.prompter import Prompter

    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(
        r=4, target_modules=["query_key_value"], init_lora_weights=False, task_type="CAUSAL_LM",
        base_model_name_or_path=str(base)))
    run = folder / name
    model.save_pretrained(run, safe_serialization=True)
    end_id = AutoTokenizer.from_pretrained(base).eos_token_id
    adapter.write_prompt_info(run, adapter.PromptInfo(Prompter().template, "<|endoftext|>", end_id, 64))
    history = [{"step": step, "loss": 4 / step, "eval_loss": 4.2 / step, "learning_rate": 1e-3 / step,
                "grad_norm": 1 / step} for step in range(1, 9)]
    settings = {"base_model": str(base), "data_path": str(data), "cutoff_len": 64, "val_set_size": 20, "seed": 42,
                "num_train_epochs": 3, "batch_size": 16, "lora_r": 4}
    asked = {"rows": 40, "questions": ["3 더하기 3은?", "4 더하기 4는?"]}
    record.write_run(run, {"settings": settings, "data": asked, "eval_loss_before": 4.5, "history": history,
                           "eval_loss_after": 0.5, "tokens_per_second": 1000.0, "peak_vram_gb": 1.27})
    return run
