"""집의 규칙: import는 한 방향이고, 방끼리 돌지 않고, 세 단계는 서로를 모른다. utils/README.md의 지도와 같다."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
UTILS = ROOT / "utils"
SCRIPTS = ("finetune-lora.py", "merge-lora.py", "generate.py")
FLOORS = (("",), ("data",), ("model",), ("engine",), ("decode",), ("train", "merge", "talk", "doctor"))
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
ENGINE_DOORS = {"utils.train.step", "utils.decode.decoder"}
# 계산하지 않고 구조와 크기만 말하는 것. train과 decode는 어디서든 물을 수 있다
ENGINE_FACTS = {"utils.engine.families", "utils.engine.family", "utils.engine.train_memory"}
WITHOUT_TORCH = ("utils.cli", "utils.prompter", "utils.talk.exposure", "utils.data.kobest", "utils.record")
MAX_FILE_LINES, MAX_SCRIPT_LINES = 280, 200
TOP_LEVEL = {*SCRIPTS, "utils", "ko-datasets", "templates", "resources", ".create-symbolic-links.bat",
             "INSTALL-Win.md", "INSTALL-WSL.md", "requirements.txt", "tests", "README.md", "LICENSE", "assets"}


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(UTILS.rglob("*.py"))}


def imported(file: Path) -> set[str]:
    """파일이 import하는 utils의 모듈들. 함수 안의 import도 센다."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "utils":
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= inside or {node.module}
    return found


ARROWS = {name: imported(file) - {name} for name, file in MODULES.items()}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or parts[-1] in LEVEL else ""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    here = room(module)
    for other in ARROWS[module]:
        there = room(other)
        assert there == here or LEVEL[there] < LEVEL[here], f"{module}이 위나 옆의 {other}을 import한다"


def test_no_circles():
    left = {name: set(arrows) & set(MODULES) for name, arrows in ARROWS.items()}
    while free := [name for name, arrows in left.items() if not arrows]:
        for name in free:
            del left[name]
        for arrows in left.values():
            arrows.difference_update(free)
    assert not left, f"서로를 import한다: {sorted(left)}"


def test_engine_has_two_doors():
    """계산은 두 문으로만 한다. 다른 곳은 무엇을 계산할 줄 아는지(`Family`)와 그 크기만 묻는다."""
    outside = {name: {other for other in arrows if room(other) == "engine"} for name, arrows in ARROWS.items()
               if room(name) != "engine"}
    assert {name for name, inside in outside.items() if inside - ENGINE_FACTS} == ENGINE_DOORS
    assert {room(name) for name, inside in outside.items() if inside} == {"train", "decode"}
    for fact in ENGINE_FACTS:
        assert {other for other in ARROWS[fact] if room(other) == "engine"} <= ENGINE_FACTS


def test_utils_never_imports_a_script():
    stems = {Path(script).stem.replace("-", "_") for script in SCRIPTS}
    for file in MODULES.values():
        names = {alias.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                 if isinstance(node, ast.Import) for alias in node.names}
        assert not names & stems


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_modules_do_not_reach_torch(module):
    """이 모듈이 맨 위에서 불러오는 것들을 따라가도 torch와 transformers가 없다."""
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in MODULES:
            continue
        seen.add(name)
        for node in ast.parse(MODULES[name].read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & {"torch", "transformers"}, name
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in ("torch", "transformers"), name
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]


def test_room_init_files_hold_no_code():
    for file in UTILS.rglob("__init__.py"):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), file


@pytest.mark.parametrize("file", [*(ROOT / script for script in SCRIPTS), *MODULES.values()],
                         ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_file_is_one_noun(file):
    """파일은 무엇인지 말하는 한 문장으로 열고, 한자리에서 읽을 만큼 짧다."""
    text = file.read_text(encoding="utf-8")
    if file.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text)), file
    assert len(text.splitlines()) <= (MAX_SCRIPT_LINES if file.parent == ROOT else MAX_FILE_LINES)


def test_the_map_names_every_file():
    maps = (UTILS / "README.md", UTILS / "engine" / "README.md")
    codes = [code for file in maps for code in re.findall(r"`([^`\n]+)`", file.read_text(encoding="utf-8"))]
    named = {part for code in codes for part in re.split(r"[\s,]+", code.replace("/", "."))}
    for name, file in MODULES.items():
        if file.name not in ("__init__.py", "__main__.py"):
            assert file.name in named or file.stem in named or name.removeprefix("utils.") in named, name


def test_top_level_is_what_the_readme_promises():
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} | {".create-symbolic-links.bat"}
    tracked = visible - {"train", "data", "__pycache__"}  # 학습하거나 테스트를 돌리면 생기는 폴더
    assert tracked <= TOP_LEVEL, tracked - TOP_LEVEL
