"""집의 규칙: import는 한 방향이고, 방끼리 돌지 않고, 세 단계는 서로를 모른다. utils/README.md의 지도와 같다."""

import ast
import functools
import importlib
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
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def imported(tree: ast.Module) -> set[str]:
    """소스가 import하는 utils의 모듈들. 함수 안의 import도 센다."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "utils":
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= inside or {node.module}
    return found


ARROWS = {name: imported(tree) - {name} for name, tree in TREES.items()}


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
    stems = {stem for script in SCRIPTS for stem in (Path(script).stem, Path(script).stem.replace("-", "_"))}
    for name, tree in TREES.items():
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not modules & stems, name


def test_every_import_is_seen_by_these_rules():
    """상대 import와, 이름을 값으로 넘기는 import는 위의 규칙들이 읽지 못하므로 쓰지 않는다."""
    hidden = {"import_module", "__import__", "spec_from_file_location", "run_path", "run_module"}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{name}: 상대 import"
            used = {getattr(node, "id", None), getattr(node, "attr", None)}
            assert not used & hidden, f"{name}: {used & hidden}"


def outer_bases(tree: ast.Module) -> list[tuple[ast.ClassDef, type]]:
    """다른 라이브러리의 class를 잇는 class와 그 class. `nn.Module`처럼 점으로 이은 이름도 찾는다."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).split(".")[0]: (alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    found = []
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for base in node.bases:
            first, *rest = ast.unparse(base).partition("[")[0].split(".")
            module, name = names.get(first, ("utils", None))
            if module.split(".")[0] != "utils":
                found.append((node, functools.reduce(getattr, rest if name is None else [name, *rest],
                                                     importlib.import_module(module))))
    return found


def test_no_private_method_of_another_library_is_overridden():
    """비공개 메서드는 약속이 아니어서, 바꾸어 두면 버전을 올릴 때 조용히 다르게 돈다."""
    checked = set()
    for module, tree in TREES.items():
        for node, base in outer_bases(tree):
            own = {part.name for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)}
            private = {name for name in own if name.startswith("_") and not name.endswith("__") and hasattr(base, name)}
            assert not private, f"{module}.{node.name}이 {base}의 {private}를 바꾼다"
            checked.add(base.__name__)
    assert {"Module", "Tensor", "Function"} <= checked


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_modules_do_not_reach_torch(module):
    """이 모듈이 맨 위에서 불러오는 것들을 따라가도 torch와 transformers가 없다."""
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in MODULES:
            continue
        seen.add(name)
        for node in TREES[name].body:
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
    """지도의 방마다 그 방의 파일이 모두 있고, 없는 파일은 없다."""
    rows = re.findall(r"^\| (1층|`\w+/`) \|.*\|(.*)\|$", (UTILS / "README.md").read_text(encoding="utf-8"), re.M)
    listed = {name.strip("`/").replace("1층", ""): set(re.findall(r"`(\w+)`", files)) for name, files in rows}
    engine = re.findall(r"^\| (`.*?) \|", (UTILS / "engine" / "README.md").read_text(encoding="utf-8"), re.M)
    listed["engine"] = {name for cell in engine for name in re.findall(r"`(\w+)\.py`", cell)}
    files = {}
    for name, file in MODULES.items():
        if file.name not in ("__init__.py", "__main__.py"):
            files.setdefault(room(name), set()).add(file.stem)
    assert listed == files


def test_tests_mirror_the_rooms():
    rooms = {folder.name for folder in (ROOT / "tests").iterdir() if list(folder.glob("test_*.py"))}
    assert rooms == LEVEL.keys() - {""}


def test_top_level_is_what_the_readme_promises():
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} | {".create-symbolic-links.bat"}
    tracked = visible - {"train", "data", "__pycache__"}  # 학습하거나 테스트를 돌리면 생기는 폴더
    assert tracked <= TOP_LEVEL, tracked - TOP_LEVEL
