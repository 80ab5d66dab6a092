"""도움말: 단계 함수의 서명과 docstring에서 만든다. 무리의 이름은 서명 속의 주석(`# 모델`)이다."""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

from utils.paths import ROOT

WIDTH = 100
_ARGUMENT = re.compile(r"^    (\w+): (.*)$")
_GROUP = re.compile(r"^    # (.+)$")
_PARAMETER = re.compile(r"^    (\w+):")


def help_text(stage: Callable) -> str:
    """`stage`의 도움말. 플래그마다 뜻과 기본값이 있고, 끝에 보기가 있다."""
    described = descriptions(stage)
    parameters = inspect.signature(stage).parameters
    lines = [_opening(stage), "", f"쓰는 법: python {Path(sys.argv[0]).name} --이름 값 ..."]
    for title, names in groups(stage):
        lines += ["", title]
        for name in names:
            lines.append(f"  --{name}")
            lines += [f"      {line}" for line in _wrap(described.get(name, ""))]
            lines += [f"      {line}" for line in _default(parameters[name])]
    shown = examples(stage)
    return "\n".join([*lines, *(["", "보기", *(f"  {line}" for line in shown)] if shown else [])])


def groups(stage: Callable) -> list[tuple[str, list[str]]]:
    """서명에 적힌 차례대로 (무리의 이름, 플래그들)."""
    found: list[tuple[str, list[str]]] = [("플래그", [])]
    parameters = inspect.signature(stage).parameters
    for line in inspect.getsource(stage).splitlines():
        if line.startswith(")"):
            break
        if group := _GROUP.match(line):
            found.append((group[1], []))
        elif (parameter := _PARAMETER.match(line)) and parameter[1] in parameters:
            found[-1][1].append(parameter[1])
    listed = {name for _, names in found for name in names}
    found[0][1].extend(name for name in parameters if name not in listed)  # 한 줄로 적은 서명
    return [group for group in found if group[1]]


def descriptions(stage: Callable) -> dict[str, str]:
    """docstring의 `Args:`에 적힌 플래그의 뜻."""
    found: dict[str, str] = {}
    name = None
    for line in _section(stage, "Args:"):
        if argument := _ARGUMENT.match(line):
            name = argument[1]
            found[name] = argument[2]
        elif name is not None:
            found[name] += f" {line.strip()}"
    return found


def examples(stage: Callable) -> list[str]:
    """docstring의 `Examples:`에 적힌 명령들."""
    return [line.strip() for line in _section(stage, "Examples:") if line.strip()]


def _opening(stage: Callable) -> str:
    return (inspect.getdoc(stage) or "").split("\n\nArgs:")[0]


def _section(stage: Callable, title: str) -> list[str]:
    """docstring에서 `title` 아래의 들여 쓴 줄들."""
    lines = (inspect.getdoc(stage) or "").splitlines()
    if title not in lines:
        return []
    inside = []
    for line in lines[lines.index(title) + 1:]:
        if line.strip() and not line.startswith(" "):
            break
        if line.strip():
            inside.append(line)
    return inside


def _default(parameter: inspect.Parameter) -> list[str]:
    value = parameter.default
    if value is inspect.Parameter.empty:
        return ["꼭 적는다"]
    if value is None or value in ("", ()):
        return []
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    path = Path(str(value))
    return [f"기본값: {path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else value}"]


def _wrap(text: str) -> list[str]:
    """한글은 두 칸이므로 터미널의 칸을 세어 나눈다."""
    lines, line, used = [], "", 0
    for word in text.split():
        size = sum(2 if ord(char) > 0x1100 else 1 for char in word)
        if line and used + 1 + size > WIDTH:
            lines.append(line)
            line, used = word, size
        else:
            line, used = f"{line} {word}".strip(), used + 1 + size
    return [*lines, line] if line else lines
