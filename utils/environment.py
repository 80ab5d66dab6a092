"""이 컴퓨터의 Python, 패키지, 카드, 디스크와 메모리. 스크립트가 시작할 때 하는 빠른 검사도 여기에 있다."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from utils.errors import UsageError
from utils.paths import ROOT

OK, WARN, BAD = "확인", "주의", "오류"
INSTALL = "python -m pip install -r requirements.txt"
MIN_DISK_GB, MIN_MEMORY_GB, MIN_VRAM_GB = 2, 4, 2.5
SMI_SECONDS = 10
OPTIONAL = ("openpyxl",)  # 쓸 때 없으면 그때 설치하는 명령을 말한다


@dataclass(frozen=True)
class Finding:
    """검사 하나의 결과. `level`은 OK, WARN(쓸 수는 있다), BAD(고쳐야 한다)이고, OK가 아니면 `fix`가 있다."""

    level: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Quick:
    """torch를 불러오지 않고 2초 안에 알 수 있는 사실.

    Attributes:
        python: Python의 버전(3, 12).
        system: 운영 체제. `sys.platform`의 값이다.
        versions: requirements.txt의 패키지 -> 설치된 버전. 없으면 None이다.
        torch_cuda: torch가 쓰는 CUDA의 버전. CPU용이면 None이다.
        nvidia: 첫 NVIDIA 카드의 `이름, 드라이버 버전`. torch가 CPU용일 때만 묻는다.
        free_disk_gb: 저장소가 있는 디스크의 여유 공간(GB, 10^9바이트).
    """

    python: tuple[int, int] = sys.version_info[:2]
    system: str = sys.platform
    versions: dict[str, str | None] = field(default_factory=dict)
    torch_cuda: str | None = None
    nvidia: str = ""
    free_disk_gb: float = 0.0


def quick(say: Callable[[str], None], facts: Quick | None = None) -> None:
    """스크립트가 시작할 때 하는 검사. 나쁜 것만 말하고, 그대로는 실행할 수 없으면 멈춘다.

    Raises:
        UsageError: Python이 낮거나 패키지가 없다.
    """
    facts = facts or look_quick()
    for check in QUICK_CHECKS:
        finding = check(facts)
        if finding.level == BAD and check in (check_python, check_versions):
            raise UsageError(f"{finding.text}. 고치는 법: {finding.fix}")
        if finding.level != OK:
            say(f"{finding.level}: {finding.text}\n      고치는 법: {finding.fix}")


def require_utf8(texts: list[str]) -> None:
    """파일 이름을 UTF-8로 읽지 않는 환경이면, 한글 경로를 라이브러리에 넘기기 전에 멈춘다.

    Raises:
        UsageError: 경로나 값에 그 환경이 읽지 못한 글자가 있다.
    """
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and any(text != text.encode("utf-8", "ignore").decode() for text in texts):
        raise UsageError(f"이 환경은 파일 이름의 인코딩이 {encoding}이어서 한글 경로를 쓸 수 없다. 환경 변수 "
                         "PYTHONUTF8=1을 정하고(export PYTHONUTF8=1) 다시 실행한다")


def look_quick() -> Quick:
    """torch를 불러오지 않고 본다. NVIDIA 카드는 torch가 CPU용일 때만 묻는다."""
    torch_cuda = _torch_build()
    return Quick(versions={name: installed_version(name) for name in required_versions()}, torch_cuda=torch_cuda,
                 nvidia="" if torch_cuda else ask_nvidia_smi(), free_disk_gb=shutil.disk_usage(ROOT).free / 1e9)


def check_python(facts: Quick) -> Finding:
    text = f"Python {facts.python[0]}.{facts.python[1]}"
    if facts.python < (3, 11):
        return Finding(BAD, f"너무 오래된 {text}", "conda create -n pgko python=3.12 && conda activate pgko")
    return Finding(OK, text)


def check_versions(facts: Quick) -> Finding:
    ranges = required_versions()
    missing = [name for name, found in facts.versions.items() if found is None and name not in OPTIONAL]
    if missing:
        asleep = "torch" in missing  # 하나만 없으면 그것만 설치하면 된다
        start = "가상 환경을 만들어 두었으면 먼저 켠다(conda activate pgko). 처음이면 " if asleep else ""
        return Finding(BAD, f"없는 패키지: {', '.join(missing)}", f"{start}{INSTALL}")
    from packaging.specifiers import SpecifierSet

    untested = [f"{name} {found}(시험한 범위 {ranges[name]})" for name, found in facts.versions.items()
                if found is not None and not SpecifierSet(ranges[name]).contains(found, prereleases=True)]
    if untested:
        return Finding(WARN, f"시험하지 않은 버전: {', '.join(untested)}", INSTALL)
    return Finding(OK, f"패키지 {len(facts.versions)}개가 모두 시험한 범위 안에 있다")


def check_torch_build(facts: Quick) -> Finding:
    if facts.torch_cuda is None and facts.nvidia:
        return Finding(BAD, f"NVIDIA 카드({facts.nvidia.split(',')[0]})가 있는데 torch가 CPU용이다", install_cuda())
    build = f"CUDA {facts.torch_cuda}용" if facts.torch_cuda else "CPU용"
    return Finding(OK, f"torch {facts.versions.get('torch')}, {build}")


def check_disk(facts: Quick) -> Finding:
    text = f"남은 디스크 {facts.free_disk_gb:.1f} GB"
    if facts.free_disk_gb < MIN_DISK_GB:
        return Finding(WARN, f"{text}로는 모자랄 수 있다", f"{ROOT}가 있는 디스크를 {MIN_DISK_GB} GB 넘게 비운다")
    return Finding(OK, text)


QUICK_CHECKS: tuple[Callable[[Quick], Finding], ...] = (check_python, check_versions, check_torch_build, check_disk)


def install_cuda() -> str:
    """CPU용 torch를 CUDA용으로 바꾸는 명령."""
    return (f"python -m pip uninstall -y torch && python -m pip install \"torch{required_versions()['torch']}\" "
            "--index-url https://download.pytorch.org/whl/cu130")


def required_versions() -> dict[str, str]:
    """requirements.txt의 이름 -> 범위."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    rows = (re.match(r"([A-Za-z0-9_-]+)([<>=!~][^;#]*)", line) for line in lines)
    return {row[1]: row[2].strip() for row in rows if row}


def installed_version(name: str) -> str | None:
    """설치된 패키지의 버전. 없으면 None이다. 패키지를 불러오지 않는다."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def ask_nvidia_smi() -> str:
    """첫 NVIDIA 카드의 `이름, 드라이버 버전`. 카드나 드라이버가 없으면 빈 글자다."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if program is None:
        return ""
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip().splitlines()[0] if asked.returncode == 0 and asked.stdout.strip() else ""


def peak_ram_bytes() -> int:
    """이 프로세스가 지금까지 쓴 RAM의 최댓값(바이트)."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    status = Path("/proc/self/status")
    if status.is_file():  # Linux의 ru_maxrss는 부모 프로세스의 것을 물려받는다
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _torch_build() -> str | None:
    """설치된 torch가 쓰는 CUDA의 버전. CPU용이면 None이다. 불러오면 느리므로 파일만 읽는다."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda[^=\n]*=\s*'([^']+)'", text, re.MULTILINE)
    return found[1] if found else None
