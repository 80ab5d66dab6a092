"""명령줄 한 줄을 단계 함수 호출 하나로 바꾸고, 사용자의 잘못을 한국어 한 줄로 알린다.

fire는 알지 못하는 플래그를 함수를 실행한 뒤에야 거절하고, `--flag=false`를 참인 문자열로 넘긴다. 그래서 fire에게는
플래그를 모으는 일만 맡긴다. 모인 글자를 서명의 타입에 맞춘 다음에 단계 함수를 부른다.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import io
import math
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

try:
    import fire
except ModuleNotFoundError:  # 패키지를 설치하지 않았거나 환경을 켜지 않았다. 시작할 때의 검사가 설치하는 명령을 말한다
    fire = None

from utils import environment
from utils.console import hush_libraries, printable, say, use_utf8
from utils.errors import UsageError, disk_reason, memory_reason
from utils.helptext import asks_help, descriptions, examples, help_text
from utils.paths import ROOT, at_home
from utils.process import is_first_process

TRUE_WORDS = {"true", "yes", "on", "1", "참"}
FALSE_WORDS = {"false", "no", "off", "0", "거짓"}
QUOTES = {"''", "“”", "‘’"}  # 여는 것과 닫는 것
LONG_DASHES = "–—―−"
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
WAIT_FOR_FIRST = 5  # 다른 프로세스가 제 오류를 말하기 전에 기다리는 초
Parameters = typing.Mapping[str, inspect.Parameter]


def run(stage: Callable, retired: dict[str, str] | None = None, argv: list[str] | None = None) -> None:
    """명령줄을 읽어 `stage`를 부르고, `UsageError`를 한 줄로 알린 뒤 종료 코드 2로 끝낸다.

    Args:
        stage: 키워드 인자만 받는 단계 함수. 서명이 설정이고 docstring이 `--help`다.
        retired: 더는 쓰지 않는 플래그 -> 그것을 대신하는 것. 만나면 한 줄로 알리고 무시한다.
        argv: 명령줄. 없으면 `sys.argv[1:]`.
    """
    use_utf8()
    hush_libraries()
    try:
        if fire is None:
            environment.quick(say)
        environment.require_utf8([str(ROOT), str(Path.cwd()), *sys.argv])
        flags = parse(stage, sys.argv[1:] if argv is None else argv, retired or {})
        if flags is not None:
            environment.quick(say)
            stage(**flags)
    except UsageError as error:
        if not is_first_process():  # torchrun은 하나가 끝나면 나머지를 죽인다. 첫 프로세스가 먼저 말하고 끝나게 한다
            time.sleep(WAIT_FOR_FIRST)
        print(f"오류: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # 출력을 읽던 쪽(head, less)이 먼저 닫았다
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        reason = memory_reason(error) or disk_reason(error)
        if reason is None:
            raise
        print(f"오류: {reason}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def parse(stage: Callable, argv: list[str], retired: dict[str, str]) -> dict | None:
    """명령줄을 `stage`의 인자로 바꾼다. 도움말을 보여 주었으면 None이다.

    Raises:
        UsageError: 모르는 플래그, 값이 없는 플래그, 타입에 맞지 않는 값, 빠진 것. 잘못된 것을 모두 말한다.
    """
    parameters = inspect.signature(stage).parameters
    argv = _drop_retired(argv, retired)
    if asks_help(argv):
        print(help_text(stage))
        return None
    _refuse_unknown(argv, parameters)
    _refuse_missing(argv, stage)
    texts: dict[str, str | bool] = {}

    @functools.wraps(stage)
    def collect(**flags):
        texts.update(flags)

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            fire.Fire(collect, command=[_as_literal(token) for token in argv], name=Path(sys.argv[0]).name)
    except fire.core.FireExit:
        raise UsageError(f"명령줄을 읽지 못했다: {' '.join(argv)} (도움말: --help)") from None
    return _fit_all(texts, parameters)


def check(rules: Iterable[tuple[bool, str]]) -> None:
    """(지켜졌는가, 어겼을 때 할 말)을 모두 보고, 어긴 것을 한 번에 말한다.

    Raises:
        UsageError: 하나라도 어겼다.
    """
    broken = [message for kept, message in rules if not kept]
    if broken:
        raise UsageError(" / ".join(broken))


def _drop_retired(argv: list[str], retired: dict[str, str]) -> list[str]:
    kept, skip = [], False
    for token in argv:
        name = flag_name(token)
        if name in retired:
            say(f"알림: 쓰지 않는 플래그라 무시한다: --{name}. {retired[name]}")
            skip = "=" not in token
        elif not (skip and name is None):
            kept.append(token)
            skip = False
        else:
            skip = False
    return kept


def _as_literal(token: str) -> str:
    """값을 파이썬 문자열 리터럴로 감싼다. 그러지 않으면 fire가 007을 7로, 1e-3을 실수로 바꾸어 버린다."""
    if flag_name(token) is None:
        return repr(token)
    name, equals, value = token.partition("=")
    return f"{name}={value!r}" if equals else token


def flag_name(token: str) -> str | None:
    if not token.startswith("-") or token.lstrip("-")[:1].isdigit() or not token.strip("-"):
        return None
    return token.lstrip("-").split("=", 1)[0].replace("-", "_")


def _refuse_unknown(argv: list[str], parameters: Parameters) -> None:
    problems = []
    previous = None
    seen = set()
    for token in argv:
        name = flag_name(token)
        if name is None:
            if previous is None:
                problems.append(f"어느 플래그의 값인지 알 수 없는 '{token}'({_loose_hint(token)})")
            previous = None
            continue
        base = name[2:] if name.startswith("no") and name not in parameters else name
        if base not in parameters:
            near = _nearest(name.lower(), parameters)
            hint = f"혹시 --{near[0]}?" if near else "쓸 수 있는 플래그는 --help로 본다"
            if previous is not None and not near:
                hint = f"--{previous}의 값이면 --{previous}={token} 으로 적는다"
            problems.append(f"없는 플래그 --{name}({hint})")
        elif base in seen:
            problems.append(f"두 번 적은 플래그 --{base}")
        seen.add(base)
        previous = None if "=" in token else name
    if problems:
        raise UsageError(" / ".join(problems))


def _nearest(name: str, parameters: Parameters) -> list[str]:
    """비슷하게 적은 플래그. 오타, 이름의 한 부분(epochs), 첫 글자(lr)의 차례로 찾는다."""
    return (difflib.get_close_matches(name, parameters, n=1)
            or [each for each in parameters if name in each.split("_")]
            or [each for each in parameters if name == "".join(word[0] for word in each.split("_"))])[:1]


def _loose_hint(token: str) -> str:
    if token.startswith(tuple(LONG_DASHES)):
        return f"긴 줄표 '{token[0]}'로 시작한다. --{token.lstrip(LONG_DASHES)} 로 적는다"
    return "모든 값은 --이름 값 으로 적고, 빈칸이 든 값은 따옴표로 감싼다"


def _refuse_missing(argv: list[str], stage: Callable) -> None:
    given = {flag_name(token) for token, value in pairwise([*argv, "--"])
             if "=" in token or not value.startswith("--")}  # 값 없이 적은 것도 없는 것이다
    parameters = inspect.signature(stage).parameters
    bare = [name for name in map(flag_name, argv) if name in parameters and name not in given
            and bool not in _choices(parameters[name].annotation)]
    required = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    missing = [name for name in required if name not in given]
    if missing:
        described = descriptions(stage)
        first_sentences = {name: described.get(name, "").split(". ")[0].rstrip(".") for name in missing}
        names = " / ".join([*(f"--{name}({sentence})" for name, sentence in first_sentences.items()),
                            *(f"--{name}의 값" for name in bare if name not in missing)])
        example = next((f". 예: {line}" for line in examples(stage)), "")
        raise UsageError(f"꼭 필요한 값이 없다: {names}{example}")


def _fit_all(texts: dict[str, str | bool], parameters: Parameters) -> dict:
    """fire가 모은 것을 타입에 맞춘다. 값 없이 적은 플래그를 fire는 True나 False(`--no이름`)로 준다."""
    values, problems = {}, []
    for name, text in texts.items():
        annotation, default = parameters[name].annotation, parameters[name].default
        if isinstance(text, bool):
            if bool in _choices(annotation):
                values[name] = text
            else:
                problems.append(f"--{name}에 값이 없다. --{name} 값 으로 적는다")
        elif not text.strip() and default != "":
            problems.append(f"--{name}의 값이 비었다. 값을 적거나 플래그를 뺀다")
        else:
            try:
                values[name] = at_home(name, _fit(text, annotation))
            except ValueError as expected:
                problems.append(f"--{name}에는 {expected}: '{text}'")
    if problems:
        raise UsageError(" / ".join(problems))
    return values


def _choices(annotation) -> tuple:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _fit(text: str, annotation) -> object:
    """글자를 타입에 맞춘다. 맞지 않으면 기대한 것을 담은 ValueError를 올린다."""
    choices = _choices(annotation)
    if len(text) > 1 and text[0] + text[-1] in QUOTES:
        text = text[1:-1]  # Windows의 cmd는 작은따옴표를 떼지 않고, 문서에서 옮긴 둥근 따옴표는 어느 셸도 떼지 않는다
    word = text.strip().lower()
    if type(None) in choices and word in ("none", "null"):
        return None
    if bool in choices:
        if word in TRUE_WORDS | FALSE_WORDS:
            return word in TRUE_WORDS
        if str not in choices:
            raise ValueError("True나 False를 적는다")
    if int in choices or float in choices:
        return _fit_number(word, int in choices)
    if any(typing.get_origin(choice) is tuple for choice in choices):
        return _fit_words(text)
    return text


def _fit_number(word: str, whole: bool) -> int | float:
    expected = "정수를 적는다" if whole else "숫자를 적는다"
    try:
        number = float(word)
    except ValueError:
        hint = "(쉼표 없이)" if "," in word else "(단위 없이)" if word[:1].isdigit() else ""
        raise ValueError(expected + hint) from None
    if not math.isfinite(number) or (whole and number != int(number)):
        raise ValueError(expected)
    return int(number) if whole else number


def _fit_words(text: str) -> tuple[str, ...]:
    """`"['a','b']"`, `a,b`, `a`를 모두 문자열의 tuple로 읽는다."""
    inner = text.strip()
    if inner[:1] in "[(":
        try:
            words = ast.literal_eval(inner)
        except (ValueError, SyntaxError):
            words = inner.strip("[]()").split(",")  # Windows의 cmd는 따옴표를 지우기도 한다: [query_key_value]
        words = (words,) if isinstance(words, str) else tuple(words)
    else:
        words = tuple(inner.split(","))
    words = tuple(str(word).strip().strip("'\"") for word in words)
    if not words or not all(words):
        raise ValueError("빈칸 없이 쉼표로 이어 적는다(예: 하나,둘)")
    return words
