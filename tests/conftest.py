"""테스트가 함께 쓰는 fixture와 실행하는 법: 작은 모델의 폴더, 끝까지 학습한 작은 실행, 열린 페이지, 고장의 실험실."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # 일꾼마다 코어 하나. 서로의 스레드를 기다리지 않는다

import pytest
import warm
from tiny import build_neox

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / room) for room in ("bench", "engine"))]


def write_rows(path: Path, n: int = 40) -> Path:
    """textonly 형식의 짧은 행 n개."""
    form = "### 질문: {0} 더하기 {0}는?\n\n### 답변: {0}에 {0}를 더하면 {1}입니다. {0}의 두 배와 같습니다.<|endoftext|>"
    texts = [form.format(i, 2 * i) for i in range(n)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pieces_of(prompter, question: str, context: str, answer: str) -> tuple[str, str]:
    """질문 하나와 답 하나를 따로 토큰화할 두 조각."""
    from utils.turns import Turn, as_talk

    return prompter.talk([*as_talk(question, context), Turn("assistant", answer)])[0][0]


def load_answerer(source, *options):
    """모델 하나를 올린다. `options`는 `load_answerers`의 나머지 인자다."""
    from utils.talk.source import load_answerers

    return load_answerers([source], *options)[0]


def run_script(name: str, *flags: str, cwd: Path = ROOT, env: dict | None = None,
               cold: bool = False) -> subprocess.CompletedProcess:
    """스크립트를 제 프로세스에서 실행한다. 출력은 UTF-8로 읽는다.

    Args:
        env: 더할 환경 변수.
        cold: 라이브러리를 읽어 둔 프로세스(`warm`)에서 가르지 않고 새로 시작한다. 라이브러리가 읽을 때 보는 환경 변수를
            바꾸거나, 시작하는 것을 볼 때 쓴다.
    """
    if warm.CAN_FORK and not cold:
        done = warm.shared().run(ROOT / name, *flags, cwd=cwd, env=env or {})
        return subprocess.CompletedProcess([name, *flags], done.codes[0], done.stdout, done.stderr)
    return subprocess.run([sys.executable, str(ROOT / name), *flags], cwd=cwd, capture_output=True, encoding="utf-8",
                          env={**os.environ, "PYTHONIOENCODING": "utf-8", **(env or {})}, timeout=600)


@pytest.fixture(scope="session")
def tiny_neox(tmp_path_factory) -> Path:
    """문맥이 짧아, 멈출 줄 모르는 무작위 답도 곧 끝난다."""
    return build_neox(tmp_path_factory.mktemp("models") / "tiny-neox", context=128)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.json")


@pytest.fixture(scope="session")
def tiny_run(tiny_neox, tiny_data, tmp_path_factory) -> Path:
    """작은 모델을 실제로 4비트로 학습한 실행의 output_dir."""
    output = tmp_path_factory.mktemp("runs") / "run"
    done = run_script("finetune-lora.py", "--base_model", str(tiny_neox), "--data_path", str(tiny_data),
                      "--output_dir", str(output), "--cutoff_len", "64", "--batch_size", "4", "--num_train_epochs", "2",
                      "--val_set_size", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.fixture(scope="session")
def talk_run(tiny_data, tmp_path_factory) -> Path:
    """답이 몇 초 걸리는 무작위 모델과, 그 답을 바꾸는 어댑터의 실행 폴더."""
    from serving import write_talk_run

    folder = tmp_path_factory.mktemp("talk")
    # 토큰의 반 넘게는 온전한 글자여야 몇 토큰의 답에도 글자가 보인다
    base = build_neox(folder / "base", layers=8, hidden=256, heads=4, context=1024, vocab_size=704)
    return write_talk_run(folder, base, tiny_data)


@pytest.fixture(scope="session")
def talk_server(talk_run):
    """API까지 연 페이지."""
    from serving import serving

    with serving("--peft_root", str(talk_run), "--run_dirs", f"{talk_run}", "--api", "True") as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    """파일 하나의 테스트가 함께 쓰는 브라우저. 열려 있는 동안 이 스레드의 asyncio를 쓰므로 파일마다 닫는다."""
    from playwright.sync_api import Error, sync_playwright
    from serving import launch_browser

    with sync_playwright() as playwright:
        try:
            opened = launch_browser(playwright)
        except (Error, FileNotFoundError) as error:
            if os.environ.get("REQUIRE_BROWSER"):
                raise
            pytest.skip(f"브라우저가 없다: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory, tiny_neox, tiny_data):
    """40개의 행을 한 epoch에 9 step씩 배우는 실험실."""
    import faults

    if not warm.CAN_FORK:
        pytest.skip("프로세스를 가를 수 있는 Linux에서만 고장을 일으킨다")
    return faults.Lab(tmp_path_factory.mktemp("lab"), {
        "base_model": tiny_neox, "data_path": tiny_data, "cutoff_len": 64, "batch_size": 4, "num_train_epochs": 2,
        "val_set_size": 20})


def refuse(capsys, stage, *flags: str, retired: dict | None = None) -> str:
    """단계를 부르고, 종료 코드 2와 한 줄짜리 오류를 확인해 그 줄을 돌려준다."""
    from utils import cli

    with pytest.raises(SystemExit) as stop:
        cli.run(stage, retired, list(flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("오류: ") and error.count("\n") == 1, error
    return error


def load_script(name: str):
    """이름에 붙임표가 든 스크립트를 모듈로 읽는다."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name.removesuffix(".py").replace("-", "_"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STAGES = {"finetune-lora.py": "train", "merge-lora.py": "merge", "generate.py": "serve",
          "ko-datasets/download-koalpaca.py": "download"}


def call_script(capsys, name: str, *flags: str) -> str:
    """스크립트의 단계를 이 프로세스에서 명령줄처럼 부르고, 표준 출력을 돌려준다. 새 프로세스보다 빠르다."""
    from utils import cli

    script = load_script(name)
    capsys.readouterr()
    cli.run(getattr(script, STAGES[name]), getattr(script, "RETIRED", None), list(flags))
    return capsys.readouterr().out


def train_settings(**changed):
    """`finetune-lora.py`의 기본값에서 몇 가지만 바꾼 학습 설정."""
    import inspect

    from utils.train.records import Settings

    defaults = inspect.signature(load_script("finetune-lora.py").train).parameters
    given = {name: parameter.default for name, parameter in defaults.items()} | {"learning_rate": 1e-3}
    return Settings(**given | changed)


def pytest_configure(config):
    config.option.loadscopereorder = False  # 파일을 놓인 차례로 나눈다. 오래 걸리는 파일이 끝에 몰리지 않는다
    for number in (getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)):
        if signal.getsignal(number) is signal.SIG_IGN:  # nohup이나 &로 시작했다. 띄우는 프로세스까지 무시하지 않게 한다
            signal.signal(number, lambda *_: None)
    config.addinivalue_line("markers", "quick: 모델을 학습하지 않는 가벼운 테스트")
    config.addinivalue_line("markers", "gpu: CUDA GPU가 있어야 도는 테스트")
    config.addinivalue_line("markers", "slow: 오래 걸려 `-m slow`로 청할 때만 도는 테스트")


def pytest_collection_finish():
    """지금까지 읽은 모듈은 끝까지 쓴다. garbage collection이 그것을 되풀이해 훑지 않게 한다."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="-m slow로 청할 때만 돈다"))
