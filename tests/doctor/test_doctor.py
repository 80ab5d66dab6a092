"""환경 검사: 검사마다 흠 하나를 넣으면 그 검사만 알아채고 고치는 법을 말한다."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from tiny import build_neox

from utils import environment
from utils.doctor import checks
from utils.doctor.facts import Full, _is_taken, folder_error, look_full, multiply_4bit, proxy_for_localhost
from utils.environment import BAD, OK, WARN
from utils.errors import UsageError

VERSIONS = {name: spec.split(",")[0].lstrip(">=") for name, spec in environment.required_versions().items()}
GOOD = Full(
    python=(3, 12), system="linux", versions=VERSIONS, torch_cuda="13.0", nvidia="NVIDIA RTX 3060, 581.10",
    free_disk_gb=50, gpu="NVIDIA RTX 3060", capability=(8, 6), free_vram_gb=11, total_vram_gb=12,
    attention=("flash", "efficient", "math"), free_ram_gb=16, swap_gb=8, paths=("/home/me/pgko",), base_error="")

FAULTS = [
    (environment.check_python, {"python": (3, 10)}, BAD),
    (environment.check_versions, {"versions": {**VERSIONS, "gradio": None}}, BAD),
    (environment.check_versions, {"versions": {**VERSIONS, "transformers": "4.57.0"}}, WARN),
    (environment.check_torch_build, {"torch_cuda": None}, BAD),
    (environment.check_disk, {"free_disk_gb": 0.5}, WARN),
    (checks.check_torch_loads, {"torch_error": "OSError: libcudart.so.13"}, BAD),
    (checks.check_driver, {"nvidia": "NVIDIA RTX 3060, 551.23"}, BAD),
    (checks.check_driver, {"gpu": "", "capability": None}, BAD),
    (checks.check_bf16, {"capability": (7, 5)}, WARN),
    (checks.check_attention, {"attention": ("math",)}, WARN),
    (checks.check_4bit, {"matmul_4bit_error": "RuntimeError: no kernel"}, BAD),
    (checks.check_vram, {"free_vram_gb": 1.0}, WARN),
    (checks.check_spill, {"system": "win32"}, WARN),
    (checks.check_memory, {"free_ram_gb": 1, "swap_gb": 0}, WARN),
    (checks.check_paths, {"system": "win32", "paths": ("C:\\Users\\홍 길동\\pgko",), "nvidia": "RTX, 531.0"}, WARN),
    (checks.check_console, {"code_page": 949}, WARN),
    (checks.check_console, {"encoding": "ascii"}, WARN),
    (checks.check_proxy, {"proxy": "http://proxy:8080"}, WARN),
    (checks.check_port, {"port_taken": True}, WARN),
    (checks.check_demo, {"demo_error": "덜 받아졌다"}, BAD),
    (checks.check_base, {"base_error": "덜 받아졌다"}, BAD),
]


def test_a_good_machine_has_no_finding():
    assert [(f.text, f.fix) for f in checks.diagnose(GOOD) if f.level != OK] == []


def test_every_check_has_a_fault_here():
    assert {check for check, _, _ in FAULTS} == set(checks.FULL_CHECKS)


@pytest.mark.parametrize(("check", "fault", "level"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_each_fault_is_found_with_one_line_and_one_fix(check, fault, level):
    finding = check(replace(GOOD, **fault))
    assert finding.level == level
    assert finding.fix
    assert "\n" not in finding.text + finding.fix


@pytest.mark.parametrize(("check", "fault", "level"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_quick_part_says_faults_or_stops(check, fault, level):
    facts, said = replace(GOOD, **fault), []
    if level == BAD and check in (environment.check_python, environment.check_versions):
        with pytest.raises(UsageError, match="고치는 법"):
            environment.quick(said.append, facts)
    else:
        environment.quick(said.append, facts)
        assert len(said) == (check in environment.QUICK_CHECKS)


def test_quick_part_imports_nothing_heavy():
    code = ("import sys; from utils import environment; environment.quick(print);"
            "print({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'transformers', 'bitsandbytes'})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_missing_torch_is_told_before_anything_is_computed():
    levels = [finding.level for finding in checks.diagnose(replace(GOOD, torch_error="ImportError: libtorch"))]
    assert levels == [OK, OK, OK, OK, BAD]


def test_without_packages_the_scripts_and_the_doctor_say_how_to_install(tmp_path):
    """설치하지 않았거나 가상 환경을 켜지 않은 Python에서도 traceback이 아니라 한 줄이다."""
    for words, code in ((["finetune-lora.py"], 2), (["merge-lora.py"], 2), (["generate.py"], 2),
                        (["-m", "utils.doctor"], 1)):
        done = subprocess.run([sys.executable, "-I", "-S", "-c", _BARE, *words], cwd=ROOT, capture_output=True,
                              encoding="utf-8", timeout=60, env={"PYTHONIOENCODING": "utf-8"})
        said = done.stdout + done.stderr
        assert done.returncode == code and "Traceback" not in said, said
        assert "없는 패키지: torch" in said and "pip install -r requirements.txt" in said


# 표준 라이브러리뿐인 Python에서 스크립트나 모듈을 실행한다
_BARE = """
import runpy, sys
sys.path.insert(0, ".")
words = sys.argv[1:]
sys.argv = words[:1] if words[0] != "-m" else words[1:]
runpy.run_module(words[1], run_name="__main__") if words[0] == "-m" else runpy.run_path(words[0], run_name="__main__")
"""


def test_real_facts_of_this_machine():
    facts = look_full()
    assert facts.python == sys.version_info[:2]
    assert facts.matmul_4bit_error == ""
    assert facts.torch_cuda == torch.version.cuda
    assert set(facts.versions) >= {"torch", "transformers", "peft", "bitsandbytes", "gradio"}


def test_4bit_product_notices_a_wrong_result(monkeypatch):
    import bitsandbytes as bnb

    right = bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *args, **kwargs: right(*args, **kwargs) * 2)
    assert multiply_4bit("cpu", torch.float32) != ""


def test_half_downloaded_model_is_named(tmp_path):
    folder = build_neox(tmp_path / "model")
    assert folder_error(folder) == ""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in folder_error(folder)
    assert "없다" in folder_error(tmp_path / "nothing")


def test_proxy_and_port_are_seen(monkeypatch):
    import socket

    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert proxy_for_localhost() == "http://127.0.0.1:9"
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    assert proxy_for_localhost() == ""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert _is_taken(port)
    assert not _is_taken(port)


def test_command_prints_a_line_for_each_finding():
    done = subprocess.run([sys.executable, "-m", "utils.doctor"], cwd=ROOT, capture_output=True, encoding="utf-8",
                          timeout=120)
    findings = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(findings) == len(checks.FULL_CHECKS), done.stdout + done.stderr
    assert done.returncode == any(line.startswith(f"[{BAD}]") for line in findings)
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows는 프로세스마다 따로 센다")
def test_peak_memory_is_this_process_alone():
    large = torch.ones(150_000_000)  # 600 MB
    code = "from utils.environment import peak_ram_bytes; print(peak_ram_bytes())"
    child = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)
    assert environment.peak_ram_bytes() > large.nbytes > 3 * child > 3e7
