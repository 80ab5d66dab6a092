"""도움말: 단계 함수의 서명과 docstring에서 만든다. 그룹의 이름은 서명 속의 주석(`# 모델`)이다."""

import inspect
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from utils.paths import ROOT

WIDEST, INDENT = 100, 6
HELP_WORDS = {"--help", "-h", "--h", "-help", "-?"}
_ARGUMENT = re.compile(r"^    (\w+): (.*)$")
_GROUP = re.compile(r"^    # (.+)$")
_PARAMETER = re.compile(r"^    (\w+):")


def asks_help(argv: list[str]) -> bool:
    """도움말을 물었는지. Windows의 `/?`도 안다."""
    return bool(HELP_WORDS & {token.lower().partition("=")[0] for token in argv}) or argv[:1] in (["help"], ["/?"])


def help_text(stage: Callable) -> str:
    """`stage`의 도움말. 플래그마다 뜻과 기본값이 있고, 끝에 보기가 있다."""
    described = descriptions(stage)
    parameters = inspect.signature(stage).parameters
    flags = " --이름 값 ..." if parameters else ""
    lines = [*_opening(stage), "", f"쓰는 법: python {_program()}{flags}"]
    for title, names in groups(stage):
        lines += ["", title]
        for name in names:
            meaning = _wrap(described.get(name, ""))
            lines.append(f"  --{name}")
            lines += [" " * INDENT + line for line in (*meaning, *_default(parameters[name]))]
    shown = examples(stage)
    if shown:
        lines += ["", "보기", *(f"  {line}" for line in shown)]
    return "\n".join(lines)


def groups(stage: Callable) -> list[tuple[str, list[str]]]:
    """서명에 적힌 차례대로 (그룹의 이름, 플래그들)."""
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


def _opening(stage: Callable) -> list[str]:
    """`Args:` 앞의 글. 문단 사이에는 빈 줄이 있다."""
    paragraphs = re.split(r"\n\n(?:Args|Examples):", inspect.getdoc(stage) or "")[0].split("\n\n")
    return "\n\n".join("\n".join(_wrap(paragraph)) for paragraph in paragraphs).splitlines()


def _program() -> str:
    """지금 실행한 것: `finetune-lora.py`나 `-m utils.report`."""
    spec = sys.modules["__main__"].__spec__
    return f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


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
    """한글은 두 칸이므로 칸을 세어, 좁은 터미널에서도 낱말이 잘리지 않게 나눈다."""
    width = min(WIDEST, shutil.get_terminal_size((WIDEST + INDENT, 0)).columns - INDENT)
    lines, line, used = [], "", 0
    for word in text.split():
        size = sum(2 if ord(char) > 0x1100 else 1 for char in word)
        if line and used + 1 + size > width:
            lines.append(line)
            line, used = word, size
        else:
            line, used = f"{line} {word}".strip(), used + 1 + size
    return [*lines, line] if line else lines
