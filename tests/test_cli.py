"""명령줄은 단계의 서명에 정확히 맞추어지고, 잘못은 모두 한 줄로 알려진다."""

import errno
import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from utils import cli, console, process
from utils.errors import UsageError
from utils.paths import ROOT

pytestmark = pytest.mark.quick


def stage(*, count: int = 3, rate: float = 1e-3, wide: bool = True, names: tuple[str, ...] = ("x",),
          folder: str | None = None, resume: bool | str | None = None):
    """단계 하나."""


def parse(*argv: str, retired: dict | None = None) -> dict:
    return cli.parse(stage, list(argv), retired or {})


@pytest.mark.parametrize("word, expected", [("false", False), ("False", False), ("0", False), ("no", False),
                                            ("거짓", False), ("true", True), ("참", True), ("1", True)])
def test_bool_words_mean_what_they_say(word, expected):
    assert parse(f"--wide={word}") == {"wide": expected} == parse("--wide", word)


def test_bare_flag_is_true_and_no_prefix_is_false():
    assert parse("--wide") == {"wide": True}
    assert parse("--nowide") == {"wide": False}


@pytest.mark.parametrize("text", ["007", "True", "1e-3", "it's", 'say "hi"', "back\\slash", "{x}", "학습/폴더 둘",
                                  "[1,2]"])
def test_strings_arrive_letter_by_letter(text):
    assert parse("--folder", text) == {"folder": text} == parse(f"--folder={text}")


@pytest.mark.parametrize("text", ["['a','b']", "a,b", "[a,b]", "('a', 'b')", '["a","b"]'])
def test_names_in_every_spelling(text):
    assert parse("--names", text) == {"names": ("a", "b")}


def test_numbers():
    assert parse("--count", "16", "--rate", "1e-3") == {"count": 16, "rate": 0.001}
    assert parse("--rate=-3") == {"rate": -3.0}
    assert parse("--count", "2.0") == {"count": 2}


def test_flag_or_text_keeps_both():
    assert parse("--resume") == {"resume": True}
    assert parse("--resume", "train/checkpoint-3") == {"resume": "train/checkpoint-3"}
    assert parse("--resume", "none") == {"resume": None}


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(UsageError, match="--count.*--rate.*--wide"):
        parse("--count", "x", "--rate", "nan", "--wide", "maybe")


def test_unknown_flags_are_named_with_the_nearest():
    with pytest.raises(UsageError, match="--cuont.*--count"):
        parse("--cuont", "3")


@pytest.mark.parametrize("argv", [["--folder"], ["--folder", "--count", "3"], ["--count", "3", "--folder"],
                                  ["--nofolder"], ["--folder", ""], ["--folder="], ["--folder", "  "]])
def test_a_flag_without_a_value_is_named(argv):
    with pytest.raises(UsageError, match="--folder") as refused:
        parse(*argv)
    assert "True" not in str(refused.value) and "--count" not in str(refused.value)


@pytest.mark.parametrize("argv, named", [
    (["--count", "1,000"], "쉼표 없이"), (["--count", "16개"], "단위 없이"), (["--rate", "6GB"], "단위 없이"),
    (["–count", "3"], "--count"), (["--Count", "3"], "--count"), (["--folder", "my", "runs"], "따옴표"),
    (["--folder", "-이름"], "--folder=-이름"), (["--count", "3.5"], "정수"), (["--rate", "빠르게"], "숫자"),
])
def test_careless_values_say_what_to_do(argv, named):
    with pytest.raises(UsageError, match=named):
        parse(*argv)


@pytest.mark.parametrize("typed, meant", [("epochs", "num_train_epochs"), ("lr", "learning_rate"), ("cuont", "count")])
def test_short_and_partial_names_are_understood(typed, meant):
    def train(*, num_train_epochs: float = 3, learning_rate: float = 1.0, count: int = 3):
        """단계 하나."""

    with pytest.raises(UsageError, match=f"혹시 --{meant}"):
        cli.parse(train, [f"--{typed}", "3"], {})


@pytest.mark.parametrize("text", ["“학습 폴더”", "‘학습 폴더’", "'학습 폴더'"])
def test_quotes_copied_from_a_document_are_taken_off(text):
    assert parse("--folder", text) == {"folder": "학습 폴더"}


def needy(
    *,
    # 먼저
    source: str,
    target: str,
    # 다음
    count: int = 3,
    folder: str | None = None,
):
    """무엇을 하는 단계.

    Args:
        source: 옮길 것. 폴더다.
        target: 둘 곳.
        count: 아주 길어서 도움말의 한 줄에 다 들어가지 않는 설명. 그래서 다음 줄로 이어지고, 이어진 줄도 모두 보여야
            한다. 끝이다.
        folder: 없어도 되는 폴더.

    Examples:
        python tool.py --source a --target b
        python tool.py --source a --target b --count 5
    """


def test_missing_values_are_named_with_what_they_mean_and_an_example():
    with pytest.raises(UsageError, match=r"--source\(옮길 것\) / --target\(둘 곳\)\. 예: python tool.py") as refused:
        cli.parse(needy, ["--count", "3"], {})
    assert "--count" not in str(refused.value)


@pytest.mark.parametrize("argv", [["--source"], ["--source", "--target", "x"], ["--target", "x", "--source"]])
def test_a_needed_flag_without_a_value_is_missing(argv):
    with pytest.raises(UsageError, match=r"없다: --source\(옮길 것\)"):
        cli.parse(needy, argv, {})


@pytest.mark.parametrize("word", ["--help", "-h", "help", "/?", "--HELP", "--h", "--help=True"])
def test_help_is_korean_grouped_and_whole(word, capsys):
    assert cli.parse(needy, [word], {}) is None
    text = capsys.readouterr().out
    order = [text.index(part) for part in ("무엇을 하는", "쓰는 법", "먼저", "--source", "--target", "다음", "--count",
                                           "끝이다.", "기본값: 3", "--folder", "보기", "--count 5")]
    assert order == sorted(order)
    assert not [word for word in ("Type:", "Optional", "FLAGS", "int", "str |", "None") if word in text]


@pytest.mark.parametrize("argv", [["free"], ["--count", "3", "4"], ["--count=3", "--count=4"], ["--count"],
                                  ["-c", "3"]])
def test_loose_and_repeated_values_are_refused(argv):
    with pytest.raises(UsageError):
        parse(*argv)


def test_stage_is_not_called_when_a_flag_is_wrong(capsys):
    called = []

    def train(*, count: int = 3):
        called.append(count)

    with pytest.raises(SystemExit) as stop:
        cli.run(train, argv=["--count", "3", "--other", "1"])
    assert stop.value.code == 2 and not called
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("오류: ")


def test_retired_flag_says_what_replaces_it(capsys):
    assert parse("--block_size", "512", "--count", "4", retired={"block_size": "길이는 --cutoff_len"}) == {"count": 4}
    assert "--cutoff_len" in capsys.readouterr().out


def test_check_reports_every_broken_rule():
    with pytest.raises(UsageError, match="하나.*셋"):
        cli.check([(False, "하나"), (True, "둘"), (False, "셋")])


def test_terminal_escapes_do_not_reach_the_console(capsys):
    console.say("안녕\x1b[31m\x07\x9b하세요\n")
    assert capsys.readouterr().out == "안녕[31m하세요\n\n"


def test_a_hangul_path_is_refused_where_file_names_are_not_utf8(tmp_path):
    """라이브러리는 그런 경로를 읽지 못하고, 토크나이저를 다시 받으라는 엉뚱한 말이 나온다."""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, str(ROOT / "generate.py"), "--base_model", "데모 모델", "--ask", "물음"],
                          cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and "PYTHONUTF8=1" in done.stderr and done.stderr.count("\n") == 1


def test_a_flag_without_a_value_is_named_with_what_is_missing():
    def needs(*, source: str, target: str | None = None, quick: bool = False):
        """단계."""

    with pytest.raises(UsageError, match="--source.* / --target의 값$"):
        cli.parse(needs, ["--target", "--quick"], {})


@pytest.mark.parametrize(("error", "said"), [
    (lambda: torch.empty(1 << 54), "RAM이 모자라다"), (lambda: np.empty(1 << 54), "RAM이 모자라다"),
    (lambda: fail(MemoryError()), "RAM이 모자라다"), (lambda: fail(OSError("[WinError 1455] 페이징")), "페이지 파일"),
    (lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), "VRAM이 모자라다"),
])
def test_running_out_of_memory_is_one_line_that_says_what_is_short(error, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: error(), argv=[])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("오류: ") and said in told and told.count("\n") == 1


def test_other_errors_keep_their_traceback():
    with pytest.raises(ValueError, match="결함"):
        cli.run(lambda: fail(ValueError("결함")), argv=[])


def fail(error: Exception):
    raise error


def test_garbage_collection_rests_only_while_libraries_are_imported():
    with pytest.raises(ImportError), process.importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


@pytest.mark.parametrize("number, said", [(errno.ENAMETOOLONG, "이름이 너무 길다"), (errno.EACCES, "권한이 없다"),
                                          (errno.ENOSPC, "디스크가 차서")])
def test_a_path_that_the_system_refuses_is_one_line(capsys, number, said):
    def stage(*, folder: str = "x"):
        """단계 하나."""
        raise OSError(number, "refused", folder)

    with pytest.raises(SystemExit) as ended:
        cli.run(stage, argv=["--folder", "자리"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and "자리" in error and error.count("\n") == 1
