"""글에 적힌 명령은 모두 지금의 서명으로 읽히고, 적힌 파일과 플래그는 모두 있다."""

import inspect
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT, STAGES, load_script, run_script

from utils import cli, environment
from utils.model import folder

pytestmark = pytest.mark.quick

DOCS = [*(ROOT / name for name in ("README.md", "INSTALL-Win.md", "INSTALL-WSL.md", ".github/CONTRIBUTING.md")),
        *sorted(ROOT.glob("[a-z]*/README.md")), *sorted(ROOT.glob("resources/*/README.md"))]
SYSTEM_COMMANDS = {"cd", "conda", "nvidia-smi", "wsl", "sudo", "source", "ln", "set", "export", "chcp", "git",
                   "python3"}
FENCE = re.compile(r"^```(?:sh|bat|powershell)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# 글 속에 나오는 다른 도구(torchrun, accelerate, wsl)의 플래그
FOREIGN_FLAGS = {"index_url", "nnodes", "standalone", "nproc_per_node", "exclude", "node_rank", "rdzv_endpoint",
                 "cpu", "num_processes", "update", "shutdown", "help"}


def commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCS:
        for block in FENCE.findall(document.read_text(encoding="utf-8")):
            parts = (part.strip() for line in block.splitlines() for part in line.split("&&"))
            found += [(document.relative_to(ROOT).as_posix(), part) for part in parts if part and part[0] != "#"]
    return found


@cache
def stage_of(script: str):
    module = load_script(script)
    return getattr(module, STAGES[script]), getattr(module, "RETIRED", {})


def parse_script(words: list[str]) -> None:
    stage, retired = stage_of(words[0])
    assert cli.parse(stage, words[1:], retired) is not None


def parse_pip(words: list[str]) -> None:
    for flag, value in pairwise(words):
        assert flag != "-r" or (ROOT / value).is_file()
    torch_range = environment.required_versions()["torch"]
    assert all(word == f"torch{torch_range}" for word in words if word.startswith("torch"))


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "pip"]:
        parse_pip(words[2:])
    elif words[:2] == ["-m", "utils.report"]:
        assert not any(word.startswith("-") for word in words[2:])
    elif words[:2] == ["-m", "utils.doctor"]:
        assert len(words) == 2
    elif words[:2] == ["-m", "pytest"]:
        assert words[2:6] == ["-n", "2", "--dist", "loadfile"] and words[6:] in ([], ["-m", "quick"])
    elif words[0].startswith("tests/bench/"):
        assert (ROOT / words[0]).is_file() and len(words) == 1
    elif words[0] == "-c":
        compile(words[1], "문서", "exec")
    elif words != ["--version"]:
        parse_script(words)


def check_launcher(words: list[str]) -> None:
    at = next(number for number, word in enumerate(words) if word.endswith(".py"))
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args(words[1:]).training_script == words[at]
    else:
        from accelerate.commands.launch import launch_command_parser

        assert launch_command_parser().parse_args(words[2:]).training_script == words[at]
    parse_script(words[at:])


@pytest.mark.parametrize(("document", "command"), commands(), ids=lambda value: value[:70])
def test_command_in_the_documents_is_valid(document, command):
    words = shlex.split(command)
    if words[0] == "python":
        check_python(words[1:])
    elif words[0] in ("torchrun", "accelerate"):
        check_launcher(words)
    elif words[0] == "hf":
        assert command == folder.download_command(Path(words[words.index("--local-dir") + 1]))
    else:
        assert words[0] in SYSTEM_COMMANDS, f"알 수 없는 명령: {command}"


@pytest.mark.parametrize("script", STAGES)
def test_every_flag_has_its_line_of_help(script):
    stage, retired = stage_of(script)
    flags = set(inspect.signature(stage).parameters)
    described = set(re.findall(r"^    (\w+): ", inspect.getdoc(stage), re.MULTILINE))
    assert described == flags
    assert not flags & set(retired)
    assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(stage).parameters.values())


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_flags_and_files_named_in_the_text_exist(document):
    text = document.read_text(encoding="utf-8")
    known = FOREIGN_FLAGS.union(*(inspect.signature(stage_of(script)[0]).parameters for script in STAGES))
    known |= {"output"} if "utils.report" in text else set()
    prose = FENCE.sub("", text)
    assert {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", prose)} - known == set()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (document.parent / target).exists(), target


SHAPE_NAMES = {"Qwen3-0.6B": "qwen3-0.6b", "Qwen3-1.7B": "qwen3-1.7b", "Qwen3-4B": "qwen3-4b",
               "Llama 1.5B": "llama-1.5b", "Llama 2.1B": "llama-2.1b", "EXAONE 4 1.2B": "exaone4-1.2b",
               "Gemma 3 1B": "gemma3-1b", "Gemma 3 270M": "gemma3-270m"}


def test_memory_the_readme_measured_is_what_the_planner_says():
    """잰 VRAM이 지금의 예측과 4% 안에서 같다. 앞선 버전에서 잰 것(별표)은 예측이 그보다 크지 않다."""
    from modern import SHAPES

    from utils.engine.families import describe
    from utils.train.planner import MemoryPlan
    from utils.train.prediction import Workload, predict

    rows = re.findall(r"^\| ([^|]*), (`query_key_value`|모든 선형층) \|(.*)\|(.*)\|$",
                      (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 9
    for name, where, *cells in rows:
        config = SHAPES[SHAPE_NAMES.get(name, name)]
        targets = tuple(describe(config).linears()) if where == "모든 선형층" else ("query_key_value",)
        for recompute, cell in zip((0, config["num_hidden_layers"] - 1), cells, strict=True):
            if not cell.strip():
                continue
            parts = predict(Workload(config, targets, 8, 1024, 2), 1, recompute)
            predicted, measured = MemoryPlan(1, recompute, parts, 79e9).reserved / 1e9, float(cell.split()[0])
            assert predicted < measured * 1.04, (name, recompute)
            assert "*" in cell or predicted > measured * 0.96, (name, recompute)


def test_the_table_of_a_laptop_is_what_the_planner_says():
    """빈 VRAM이 5.2 GB일 때 잰 것이 예측과 4% 안에서 같다. 앞선 버전에서 잰 것(별표)은 예측이 그보다 크지 않다."""
    from modern import SHAPES

    from utils.engine.families import describe
    from utils.train.planner import MemoryPlan
    from utils.train.prediction import CONTEXT, Workload, predict

    name, speed, vram = r"([^|(]*) \((`query_key_value`|모든 선형층)\)", r"[\d,]+", r"([\d.]+)(\*?) \([\d.]+\)"
    rows = re.findall(rf"^\| {name} \| {speed} \| {vram} \| (\d+) \|",
                      (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 10
    for name, where, measured, star, recompute in rows:
        config = SHAPES[SHAPE_NAMES.get(name, name)]
        targets = tuple(describe(config).linears()) if where == "모든 선형층" else ("query_key_value",)
        parts = predict(Workload(config, targets, 8, 1024, 6), 1, int(recompute))
        predicted, measured = MemoryPlan(1, int(recompute), parts, 5.2e9).reserved / 1e9, float(measured)
        assert predicted < measured * 1.04, (name, where)
        assert star or predicted > measured * 0.96, (name, where)
        assert measured + CONTEXT / 1e9 < 5.2, (name, where)


def test_readme_opens_with_one_sentence_and_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines[2].count("다.") == 1
    assert lines[4:8] == ["```sh", "python -m pip install -r requirements.txt && "
                          "python finetune-lora.py --num_train_epochs 3 --batch_size 4",
                          "python -m pip install -r tests/requirements.txt && "
                          "python -m pytest -n 2 --dist loadfile", "```"]


def test_readme_names_every_top_level_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8").stdout.splitlines()
    top = {path.split("/")[0] for path in tracked}
    hidden_and_shown = {".create-symbolic-links.bat", *(name for name in top if not name.startswith("."))}
    assert {name for name in hidden_and_shown - {"README.md"} if name not in text} == set()


@pytest.mark.parametrize("flag", ["--help", "--no_such_flag"])
@pytest.mark.parametrize("script", STAGES)
def test_help_and_a_typo_import_nothing_heavy(script, flag):
    done = run_script(script, flag, env={"PYTHONPROFILEIMPORTTIME": "1"}, cold=True)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "fire" in imported
    assert not imported & {"torch", "transformers", "peft", "datasets", "gradio", "numpy", "matplotlib"}
    assert done.returncode == (0 if flag == "--help" else 2)
    assert ("쓰는 법" if flag == "--help" else "no_such_flag") in done.stdout + done.stderr


@pytest.mark.parametrize("module", ["utils.report", "utils.doctor"])
def test_the_modules_answer_help_as_fast(module):
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", module, "--help"], cwd=ROOT, capture_output=True,
                          encoding="utf-8")
    assert done.returncode == 0 and f"쓰는 법: python -m {module}" in done.stdout and "보기" in done.stdout
    assert not {"torch", "numpy", "matplotlib"} & {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}


def test_data_check_of_the_readme_runs():
    checked = run_script("finetune-lora.py", "--data_path", "ko-datasets/polyglot-ko-lite_textonly.json",
                         "--check_data", "True")
    assert checked.returncode == 0, checked.stderr


def test_link_tool_has_windows_line_ends_and_ascii_until_utf8():
    content = (ROOT / ".create-symbolic-links.bat").read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n")
    head = content[:content.index(b"chcp 65001")]
    assert head.isascii()
    assert b"/s " not in content.lower() and b"del " not in content.lower()


def test_single_quotes_that_cmd_leaves_are_taken_off():
    stage, retired = stage_of("finetune-lora.py")
    assert cli.parse(stage, ["--base_model", "'resources/a b'"], retired) == {"base_model": "resources/a b"}
