"""Windows의 규칙: 경로, 인코딩, 이름 바꾸기, 명령줄, 파일 이름. Windows가 아닌 곳에서도 그 규칙으로 확인한다."""

import ast
import io
import ntpath
import re
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest

from utils import console, files, seals
from utils.record import CURVES_FILE, RUN_FILE, SAMPLES_FILE
from utils.train import run_folder

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*ROOT.glob("*.py"), *sorted((ROOT / "utils").rglob("*.py")), *sorted((ROOT / "ko-datasets").glob("*.py"))]
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}
FORK = re.compile(r"sys\.platform|os\.name")
POSIX_ONLY = re.compile(r"os\.(fork|geteuid|getuid|setsid|mkfifo|chown)\b|signal\.SIGKILL|[\"']/(dev|tmp|etc)/")


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_every_text_file_is_opened_as_utf8(file):
    """적지 않으면 Windows에서는 cp949로 읽고 쓴다."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        modes = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        binary = any("b" in mode for mode in modes)
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        foreign = isinstance(owner, ast.Name) and owner.id in ("os", "webbrowser", "safetensors", "gzip")
        if called in ("read_text", "write_text") or (called == "open" and not binary and not foreign):
            assert "encoding" in {word.arg for word in node.keywords}, f"{name(file)}:{node.lineno}"


def test_forks_by_system_are_listed_in_one_place():
    listed = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## 운영 체제")[2]
    forks = {name(file) for file in SOURCES if FORK.search(file.read_text(encoding="utf-8"))}
    assert forks == set(re.findall(r"`((?:utils|ko-datasets)/[\w./-]+\.py)`", listed.partition("\n## ")[0]))
    for file in SOURCES:
        text = file.read_text(encoding="utf-8")
        assert not POSIX_ONLY.search(text) or FORK.search(text), name(file)


def test_console_of_code_page_949_gets_every_letter(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp949"))
    console.use_utf8()
    console.say("한글 뷁 😀")
    assert raw.getvalue().decode("utf-8").strip() == "한글 뷁 😀"


def split_command(line: str) -> list[str]:
    """Windows의 C 런타임이 명령줄을 나누는 규칙(큰따옴표만 안다)."""
    return [re.sub(r'\\"', '"', word[1:-1] if word.startswith('"') else word)
            for word in re.findall(r'"(?:\\"|[^"])*"|[^\s"]+', line)]


def test_commands_can_be_pasted_into_cmd(monkeypatch):
    argv = ["finetune-lora.py", "--data_path", r"C:\Users\홍 길동\내 데이터.csv", "--lora_target_modules", "['a','b']",
            "--output_dir", "train/첫 번째"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "platform", "win32")
    line = run_folder.command({"resume_from_checkpoint": "True"})
    assert split_command(line) == ["python", *argv, "--resume_from_checkpoint", "True"]
    assert line == subprocess.list2cmdline(["python", *argv, "--resume_from_checkpoint", "True"])


class WindowsPath:
    """폴더 위로 이름을 바꾸지 못하고, 잠깐 열려 있는 파일을 바꾸지 못하는 Windows의 `Path.replace`."""

    def __init__(self, busy: int = 0):
        self.busy, self.real = busy, Path.replace

    def replace(self, source: Path, target: Path) -> Path:
        if target.is_dir():
            raise PermissionError(13, "액세스가 거부되었습니다", str(target))
        if self.busy:
            self.busy -= 1
            raise PermissionError(32, "다른 프로세스가 파일을 사용 중입니다", str(source))
        return self.real(source, target)


def test_an_existing_folder_is_replaced_without_renaming_onto_it(tmp_path, monkeypatch):
    for folder, text in (("새것", "새"), ("checkpoint-3", "옛")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text, encoding="utf-8")
    system = WindowsPath()
    monkeypatch.setattr(Path, "replace", lambda source, target: system.replace(source, Path(target)))
    files.put(tmp_path / "새것", tmp_path / "checkpoint-3")
    assert (tmp_path / "checkpoint-3" / "a.txt").read_text(encoding="utf-8") == "새"
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_file_that_a_virus_scanner_holds_is_tried_again(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("글", encoding="utf-8")
    system, waited = WindowsPath(busy=2), []
    monkeypatch.setattr(Path, "replace", lambda source, target: system.replace(source, Path(target)))
    monkeypatch.setattr(files.time, "sleep", waited.append)
    files.put(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text(encoding="utf-8") == "글" and len(waited) == 2


def test_written_names_are_allowed_on_windows():
    folder = Path("train/한글 폴더")
    written = [RUN_FILE, CURVES_FILE, SAMPLES_FILE, seals.MANIFEST, files.LOCK_FILE, "checkpoint-12",
               files.staging_of(folder / "checkpoint-12").name, files.own_staging_of(folder / RUN_FILE).name]
    for each in written:
        assert not set(each) & set('<>:"/\\|?*') and each == each.rstrip(". ")
        assert ntpath.basename(each) == each and each.split(".")[0].upper() not in RESERVED


@pytest.mark.parametrize("odd", ["..\\밖", "C:\\밖", "C:밖", "\\\\서버\\밖", "a\\..\\..\\밖", "a/../../밖", "/밖"])
def test_names_that_leave_the_folder_are_refused(odd):
    inside = seals._is_inside(odd)
    assert not inside
    assert PureWindowsPath(odd).is_absolute() or PureWindowsPath(odd).drive or PureWindowsPath(odd).root \
        or ".." in PureWindowsPath(odd).parts
