"""학습의 기록: run.json, samples.md, curves.png."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import cli, record, report
from utils.errors import UsageError


def history(n: int = 30) -> list[dict]:
    rows = []
    for step in range(1, n + 1):
        rows.append({"step": step, "loss": 3 / step, "learning_rate": 1e-3, "grad_norm": 0.1 * step})
        if step % 10 == 0:
            rows.append({"step": step, "eval_loss": 3.1 / step, "eval_samples_per_second": 7.0})
    return rows


def test_run_is_valid_json_whatever_the_values(tmp_path):
    run = {"history": history(), "nan": math.nan, "inf": [np.float32(np.inf)], "tensor": torch.tensor(1.5),
           "path": Path("가/나"), "names": ("a", "b"), "flag": True, "nothing": None}
    record.write_run(tmp_path, run)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"JSON이 아닌 값: {name}"))
    assert (read["nan"], read["inf"], read["tensor"], read["flag"], read["nothing"]) == (None, [None], 1.5, True, None)
    assert read["path"] == str(Path("가/나"))
    assert "가" in text
    assert record.read_run(tmp_path)["history"] == history()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"history": 3}', '{"history": [{"loss": 1}]}'])
def test_a_folder_without_a_run_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"run\.json"):
        record.read_run(tmp_path)


def test_samples_keep_every_line_and_show_no_html(tmp_path):
    answer = "### 1. 개요\n\n- 가\n- 나 <b>굵게</b>"
    record.write_samples(tmp_path, [{"question": "질문?", "reference": answer, "base": "", "tuned": "답"},
                                    {"question": "예시?", "base": "", "tuned": "답"}])
    text = (tmp_path / "samples.md").read_text(encoding="utf-8")
    for line in ("> \\### 1. 개요", "> - 나 \\<b>굵게\\</b>", "> (빈 답)", "> 답"):
        assert line in text
    assert text.count("**모범 답**") == 1  # 예시 질문에는 모범 답이 없다


def test_samples_have_no_headings_of_their_own_and_no_runs_of_empty_lines(tmp_path):
    answer = "# 제목" + "\n" * 100 + "글\n---\n===\n```\n> 인용" + "\n" * 50
    record.write_samples(tmp_path, [{"kind": "검증 질문", "question": answer, "base": answer, "tuned": answer}])
    lines = (tmp_path / "samples.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# 질문과 답", "## 1. 검증 질문"]
    quoted = [line.removeprefix(">").strip() for line in lines if line.startswith(">")]
    assert all(before or after for before, after in pairwise(quoted))
    assert not [line for line in quoted if line.startswith(("#", "---", "===", "```", ">"))]


@pytest.mark.parametrize("rows", [history(), [], history(1), [{"step": 1, "loss": None, "grad_norm": 0.0}]])
def test_curves_are_drawn_from_any_history(tmp_path, rows):
    png = report.draw_curves([("e3/b16", {"history": rows, "eval_loss_before": 3.2})], tmp_path / "curves.png")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_no_character_is_drawn_as_a_box(tmp_path, recwarn, caplog):
    """글꼴에 없는 글자를 그리면 matplotlib이 경고한다. 제목과 표의 한글은 함께 설치되는 글꼴에 모두 있다."""
    runs = [("학습 e3 漢字 ก 🙂 $x$", {"history": history()}), ("e5", {"history": history(50), "peak_vram_gb": 2.0})]
    report.draw_curves(runs, tmp_path / "curves.png")
    messages = [str(warning.message) for warning in recwarn] + caplog.messages  # 수식의 글자는 경고가 아니라 기록이다
    assert [message for message in messages if "lyph" in message] == []


def test_a_missing_font_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FONT_PACKAGE", "no_such_font_package")
    with pytest.raises(UsageError, match=r"no_such_font_package.*requirements\.txt"):
        report.draw_curves([("e3", {"history": history()})], tmp_path / "curves.png")


def test_points_skip_what_cannot_be_drawn():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3}, {"step": 4, "loss": None}]
    assert report.points(rows, "loss") == ([1], [2.0])


def test_overlay_command(tmp_path, capsys):
    for name in ("e3", "한글 e5", "쉼표, 빈칸"):
        (tmp_path / name).mkdir()
        record.write_run(tmp_path / name, {"history": history()})
    folders = [str(tmp_path / name) for name in ("e3", "한글 e5", "쉼표, 빈칸")]
    for words in ([*folders, "--output", str(tmp_path / "새 폴더" / "셋.png")],
                  [f"--output={tmp_path / '새 폴더' / '셋.png'}", *folders]):
        cli.run(report.overlay, argv=report.named(words))
        assert (tmp_path / "새 폴더" / "셋.png").stat().st_size > 20_000
        (tmp_path / "새 폴더" / "셋.png").unlink()
    cli.run(report.overlay, argv=report.named(["--help"]))
    text = capsys.readouterr().out
    assert [part for part in ("쓰는 법", "--run_dirs", "보기") if part not in text] == [] and "usage" not in text


@pytest.mark.parametrize("words, said", [
    ([], "--run_dirs"), (["없다"], "run.json이 없다"), (["e3", "--output"], "--output에 값이 없다"),
    (["e3", "--outptu", "x"], "--output"), (["e3", "--output", "x.글"], "--output에 쓸 .png")])
def test_overlay_refuses_in_one_korean_line(tmp_path, monkeypatch, capsys, words, said):
    record.write_run(tmp_path, {"history": history()})
    with pytest.raises(SystemExit) as stop:
        cli.run(report.overlay, argv=report.named([str(tmp_path) if word == "e3" else word for word in words]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and said in error


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1e-4, "0.0001"), (0.00025, "0.00025"), (2.5, "2.5"),
                                             (3.14159, "3.142"), (120, "120"), (12345.6, "12346"), (-0.5, "-0.5")])
def test_ticks_are_plain_numbers(value, text):
    assert report.plain_number(value) == text
