"""학습 한 번의 기록(run.json, curves.png, samples.md)을 쓰고, 여러 번의 기록을 겹쳐 그린다.

`python -m utils.report train/lora-e3/b16 train/lora-e5/b16`은 두 학습의 곡선을 그림 하나에 겹친다.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from utils.errors import UsageError
from utils.record import CURVES_FILE, FIGURES, read_run

# (history의 열, 한글 제목, 영어 제목, 로그 축인가)
PANELS = (
    ("loss", "학습 loss", "train loss", False),
    ("eval_loss", "검증 loss (답의 토큰 평균)", "eval loss (answer tokens)", False),
    ("learning_rate", "학습률", "learning rate", False),
    ("grad_norm", "기울기 크기", "gradient norm", True),
    ("eval_samples_per_second", "검증 속도 (블록/초)", "eval samples/s", False),
)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
KOREAN_FONTS = ("malgun", "applesdgothicneo", "notosanscjk-regular", "notosanskr-regular", "notosanscjkkr-regular",
                "nanumgothic", "nanumbarungothic", "applegothic", "gulim", "undotum", "notoserifcjk-regular")
WSL_FONT = Path("/mnt/c/Windows/Fonts/malgun.ttf")


def draw_curves(runs: Sequence[tuple[str, dict]], png_path: Path | BinaryIO) -> Path | BinaryIO:
    """학습 곡선을 PNG로 그린다. 여러 학습이면 한 축에 겹친다.

    한글 글꼴이 있으면 한글로, 없으면 영어로 적는다. 글꼴에 없는 글자는 네모 대신 물음표가 된다.

    Args:
        runs: (이름, `write_run`에 준 dict)들.
        png_path: 쓸 파일이나 메모리의 흐름. 그대로 돌려준다.
    """
    import matplotlib
    from matplotlib.figure import Figure

    fonts = korean_fonts()
    korean = len(fonts) > 1
    with matplotlib.rc_context({"font.family": fonts, "font.size": 12, "axes.unicode_minus": False,
                                "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                                "axes.spines.right": False}):
        figure = Figure(figsize=(15, 8), dpi=110, layout="constrained")
        axes = figure.subplots(2, 3).ravel()
        names = [_drawable(name, fonts) for name, _ in runs]
        for axis, (key, title, english, log) in zip(axes, PANELS, strict=False):
            axis.set_title(title if korean else english, fontsize=14)
            axis.set_xlabel("step")
            _draw_panel(axis, key, [_with_start(run) for _, run in runs], log, "기록 없음" if korean else "no record")
        _draw_figures(axes[-1], names, [run for _, run in runs], korean)
        if len(runs) > 1:
            figure.legend(axes[0].get_lines()[: len(runs)], names, loc="outside lower center", ncols=min(len(runs), 3),
                          frameon=False)
        else:
            figure.suptitle(names[0], fontsize=15)
        figure.savefig(png_path)
    return png_path


def korean_fonts() -> list[str]:
    """글꼴 이름들: 한글 글꼴을 찾으면 [한글 글꼴, DejaVu Sans], 못 찾으면 [DejaVu Sans]."""
    from matplotlib import font_manager

    found = {Path(path).stem.lower(): path for path in font_manager.findSystemFonts()}
    if WSL_FONT.is_file():
        found.setdefault("malgun", str(WSL_FONT))
    for stem in KOREAN_FONTS:
        path = found.get(stem)
        if path and {ord("가"), ord("힣")} <= set(font_manager.get_font(path).get_charmap()):
            font_manager.fontManager.addfont(path)
            return [font_manager.FontProperties(fname=path).get_name(), "DejaVu Sans"]
    return ["DejaVu Sans"]


def points(history: Sequence[dict], key: str) -> tuple[list[int], list[float]]:
    """history에서 `key`가 유한한 숫자인 줄만 골라 (step들, 값들)로 돌려준다."""
    rows = [row for row in history if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
    return [row["step"] for row in rows], [row[key] for row in rows]


def _with_start(run: dict) -> list[dict]:
    """학습하기 전의 검증 loss를 0번째 step으로 앞에 붙인 history."""
    return [{"step": 0, "eval_loss": run.get("eval_loss_before")}, *run["history"]]


def _draw_panel(axis, key: str, histories: list[list[dict]], log: bool, empty: str) -> None:
    drawn, highest = 0, 0.0
    for number, history in enumerate(histories):
        steps, values = points(history, key)
        axis.plot(steps, values, STYLES[number % len(STYLES)], color=COLORS[number % len(COLORS)], linewidth=2,
                  marker="o" if len(steps) <= 30 else None, markersize=4)
        drawn += len(steps)
        highest = max([highest, *values])
        if key == "eval_loss" and values:
            best = min(range(len(values)), key=values.__getitem__)
            axis.annotate(f"{values[best]:.3f}", (steps[best], values[best]), xytext=(0, 9), fontsize=11,
                          textcoords="offset points", ha="center", color=COLORS[number % len(COLORS)],
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8})
    if not drawn:
        axis.text(0.5, 0.5, empty, ha="center", va="center", transform=axis.transAxes, color="gray")
    elif log and highest > 0:
        axis.set_yscale("log")
    elif key == "learning_rate":
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    elif key == "eval_samples_per_second":
        axis.set_ylim(0, highest * 1.15)
    axis.xaxis.get_major_locator().set_params(integer=True)


def _draw_figures(axis, names: list[str], runs: list[dict], korean: bool) -> None:
    axis.axis("off")
    rows = [(key, title if korean else english, form) for key, title, english, form in FIGURES
            if any(isinstance(run.get(key), int | float) for run in runs)]
    if not rows:
        return
    cells = [[format(run[key], form) if isinstance(run.get(key), int | float) else "-" for run in runs]
             for key, _, form in rows]
    heads = [name if len(name) <= 18 else f"…{name[-17:]}" for name in names]
    table = axis.table(cellText=cells, rowLabels=[title for _, title, _ in rows],
                       colLabels=heads if len(runs) > 1 else None, cellLoc="center", bbox=[0.38, 0.1, 0.62, 0.8])
    table.auto_set_font_size(False)
    table.set_fontsize(12 if len(runs) <= 2 else 10)
    for cell in table.get_celld().values():
        cell.set_edgecolor("lightgray")


def _drawable(text: str, fonts: list[str]) -> str:
    from matplotlib import font_manager

    known = set()
    for font in fonts:
        known |= set(font_manager.get_font(font_manager.findfont(font)).get_charmap())
    return "".join(char if ord(char) in known else "?" for char in text).replace("$", r"\$")


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m utils.report", description="학습 곡선을 PNG 하나에 겹쳐 그린다.")
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run.json이 든 폴더. finetune-lora.py가 만든다")
    parser.add_argument("--output", help="쓸 PNG. 기본: 폴더가 하나면 그 안의 curves.png, 여럿이면 ./curves.png")
    options = parser.parse_args(argv)
    runs = [(Path(folder).as_posix(), read_run(folder)) for folder in options.run_dirs]
    default = Path(options.run_dirs[0]) / CURVES_FILE if len(runs) == 1 else Path(CURVES_FILE)
    return draw_curves(runs, Path(options.output or default))


if __name__ == "__main__":
    from utils.cli import EXIT_USAGE
    from utils.console import use_utf8

    use_utf8()
    try:
        print(f"그렸다: {main()}")
    except UsageError as error:
        print(f"오류: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
