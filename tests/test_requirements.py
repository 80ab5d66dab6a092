"""requirements.txt는 이 저장소가 직접 부르는 패키지를 모두 적는다."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

from conftest import ROOT

from utils import environment

ASKED_FOR = {"gguf"}  # --export gguf에만 쓴다. 없으면 그때 설치하는 명령을 말한다
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("ko-datasets/*.py"), *ROOT.glob("utils/**/*.py")])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(source: str) -> set[str]:
    """이 저장소와 표준 라이브러리의 것을 뺀, 소스가 부르는 패키지의 맨 앞 이름. 함수 안의 import도 센다."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names} - {"utils", *ASKED_FOR, *sys.stdlib_module_names}


def test_every_imported_package_is_required_by_name():
    required = {normal(name) for name in environment.required_versions()}
    distributions = packages_distributions()
    missing = {}
    for file in SOURCES:
        for name in imported(file.read_text(encoding="utf-8")):
            if not {normal(each) for each in distributions.get(name, [name])} & required:
                missing.setdefault(name, file.relative_to(ROOT).as_posix())
    assert not missing


def test_every_range_holds_what_is_installed_here():
    facts = environment.look_quick()
    finding = environment.check_versions(facts)
    assert finding.level == environment.OK, finding.text


def test_an_import_inside_a_function_counts():
    assert imported("import os.path\ndef f():\n    from a.b import c\n    import d.e, utils.x\n") == {"a", "d"}
