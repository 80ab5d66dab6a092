"""학습의 곡선 그림(curves.png): 한 번의 기록도, 겹쳐 보는 여러 번의 기록도 run.json에서 그린다.

`python -m utils.report train/lora-e3/b16 train/lora-e5/b16`은 두 학습의 곡선을 그림 하나에 겹친다.
"""

import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from utils import cli, environment
from utils.console import say
from utils.errors import UsageError, first_line
from utils.helptext import asks_help
from utils.paths import find_input, shown
from utils.record import CURVES_FILE, FIGURES, read_run

FONT_PACKAGE = "koreanize_matplotlib"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PLACES = (("loss", "eval_loss", "figures"), ("learning_rate", "grad_norm", "figures"))
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """곡선 하나의 자리: history의 열, 제목, 세로가 로그 축인지."""

    key: str
    title: str
    log: bool = False


PANELS = (
    Panel("loss", "학습 loss"),
    Panel("eval_loss", "검증 loss (답의 토큰 평균)"),
    Panel("learning_rate", "학습률"),
    Panel("grad_norm", "기울기 크기", log=True),
)
# 선호 쌍의 학습이 있으면 그 자리에 대신 그릴 곡선
PAIR_PANELS = {"eval_loss": Panel("eval_loss", "검증 loss (쌍의 평균)"),
               "learning_rate": Panel("eval_reward_accuracy", "검증 쌍에서 고른 답의 보상이 더 높은 비율")}


def draw_curves(runs: Sequence[tuple[str, dict]], png_path: Path | BinaryIO) -> Path | BinaryIO:
    """학습 곡선을 PNG로 그린다. 여러 학습이면 한 축에 겹친다. 글꼴에 없는 글자는 네모 대신 물음표가 된다.

    Args:
        runs: (이름, `write_run`에 준 dict)들.
        png_path: 쓸 파일이나 메모리의 스트림. 그대로 돌려준다.

    Raises:
        UsageError: 한글 글꼴의 패키지가 없다.
    """
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    files = [korean_font(), Path(font_manager.findfont("DejaVu Sans"))]
    font_manager.fontManager.addfont(files[0])
    fonts = [font_manager.FontProperties(fname=file).get_name() for file in files]
    with matplotlib.rc_context({"font.family": fonts, "font.size": 12, "axes.unicode_minus": False,
                                "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                                "axes.spines.right": False}):
        figure = Figure(figsize=(15, 8), dpi=110, layout="constrained")
        axes = figure.subplot_mosaic(PLACES, width_ratios=(1, 1, 0.9))
        names = [_drawable(name, files) for name, _ in runs]
        instead = PAIR_PANELS if any("reward_accuracy_after" in run for _, run in runs) else {}
        for place in PANELS:
            panel, axis = instead.get(place.key, place), axes[place.key]
            axis.set_title(panel.title, fontsize=14)
            axis.set_xlabel("step")
            _draw_panel(axis, panel, [_with_start(run) for _, run in runs])
        _draw_figures(axes["figures"], names, [run for _, run in runs])
        if len(runs) > 1:
            figure.legend(axes["loss"].get_lines()[: len(runs)], names, loc="outside lower center",
                          ncols=min(len(runs), 3), frameon=False)
        else:
            figure.suptitle(names[0], fontsize=15)
        figure.savefig(png_path)
    return png_path


def korean_font() -> Path:
    """패키지로 설치된 나눔고딕의 파일. 어느 컴퓨터에서나 같은 그림이 된다.

    패키지를 부르지 않고 자리만 찾는다. 부르면 matplotlib의 설정을 통째로 바꾸고, Python 3.12부터 없는 distutils를 쓴다.

    Raises:
        UsageError: 패키지가 없다.
    """
    spec = importlib.util.find_spec(FONT_PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError(f"한글 글꼴의 패키지 {FONT_PACKAGE}이 없다. {environment.INSTALL}을 실행한다")
    return Path(spec.origin).with_name("fonts") / "NanumGothic.ttf"


def points(history: Sequence[dict], key: str) -> tuple[list[int], list[float]]:
    """history에서 `key`가 유한한 숫자인 줄만 골라 (step들, 값들)로 돌려준다."""
    rows = [row for row in history if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
    return [row["step"] for row in rows], [row[key] for row in rows]


def _with_start(run: dict) -> list[dict]:
    """학습하기 전의 검증 값을 0번째 step으로 앞에 붙인 history."""
    start = {"eval_loss": run.get("eval_loss_before"), "eval_reward_accuracy": run.get("reward_accuracy_before")}
    return [{"step": 0, **start}, *run["history"]]


def _draw_panel(axis, panel: Panel, histories: list[list[dict]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    drawn, highest = 0, 0.0
    for number, history in enumerate(histories):
        steps, values = points(history, panel.key)
        color = COLORS[number % len(COLORS)]
        axis.plot(steps, values, STYLES[number % len(STYLES)], color=color, linewidth=2,
                  marker="o" if len(steps) <= 30 else None, markersize=4)
        drawn += len(steps)
        highest = max([highest, *values])
        if panel.key == "eval_loss" and values:
            _mark_best(axis, steps, values, color)
    if not drawn:
        axis.text(0.5, 0.5, "기록 없음", ha="center", va="center", transform=axis.transAxes)
    elif panel.log and highest > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))


def _mark_best(axis, steps: list[int], values: list[float], color: str) -> None:
    """검증 loss가 가장 낮은 step에 별을 찍고 그 값을 적는다."""
    best = min(range(len(values)), key=values.__getitem__)
    step, value = steps[best], values[best]
    axis.plot(step, value, "*", color=color, markersize=16)
    side = "right" if best > len(values) / 2 else "left"  # 글이 그림 밖으로 나가지 않게 한다
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
    axis.annotate(f"가장 좋은 step {step:,}: {value:.3f}", (step, value), xytext=(0, 20), fontsize=11,
                  textcoords="offset points", ha=side, color=color, bbox=ground)


def plain_number(value: float) -> str:
    """지수(1e-4) 없이 적은 수. 유효 숫자 넷까지다."""
    if not value:
        return "0"
    places = max(0, 3 - math.floor(math.log10(abs(value))))  # 소수점 아래의 자리
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _draw_figures(axis, names: list[str], runs: list[dict]) -> None:
    axis.axis("off")
    rows = [(figure.title, [figure.shown(run) or "-" for run in runs]) for figure in FIGURES
            if any(figure.shown(run) for run in runs)]
    if not rows:
        return
    heads = [name if len(name) <= 12 else f"…{name[-11:]}" for name in names]
    table = axis.table(cellText=[cells for _, cells in rows], rowLabels=[title for title, _ in rows],
                       colLabels=heads if len(runs) > 1 else None, cellLoc="center", bbox=[0.42, 0.25, 0.58, 0.5])
    table.auto_set_font_size(False)
    table.set_fontsize(12 if len(runs) <= 2 else 10)
    for cell in table.get_celld().values():
        cell.set(edgecolor="gray", facecolor="none")


def _drawable(text: str, fonts: Sequence[Path]) -> str:
    """글꼴 파일들에 없는 글자를 물음표로 바꾼 글. `$`는 수식이 아니라 글자다."""
    from matplotlib import font_manager

    known = {char for font in fonts for char in font_manager.get_font(font).get_charmap()}
    return "".join(char if ord(char) in known else "?" for char in text).replace("$", r"\$")


def overlay(
    *,
    # 그릴 것
    run_dirs: tuple[str, ...],
    # 쓸 곳
    output: str | None = None,
):
    """여러 학습의 곡선을 PNG 하나에 겹쳐 그린다.

    Args:
        run_dirs: run.json이 든 폴더들. finetune-lora.py의 output_dir다. --run_dirs 없이 이어 적어도 된다.
        output: 쓸 PNG. 적지 않으면 폴더가 하나일 때는 그 안의 curves.png, 여럿일 때는 지금 폴더의 curves.png다.

    Examples:
        python -m utils.report train/lora-e3 train/lora-e5
        python -m utils.report train/faq --output faq.png
    """
    runs = [(Path(folder).as_posix(), read_run(folder)) for folder in map(find_input, run_dirs)]
    default = Path(find_input(run_dirs[0])) / CURVES_FILE if len(runs) == 1 else Path(CURVES_FILE)
    target = Path(output or default)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(runs, target)
    except (OSError, ValueError) as error:  # matplotlib은 모르는 확장자를 ValueError로 알린다
        raise UsageError(f"그림을 쓰지 못했다: {target} ({first_line(error)}). --output에 쓸 .png를 적는다") from None
    say(f"그렸다: {shown(target)}")


def named(words: Sequence[str]) -> list[str]:
    """이름 없이 적은 폴더들을 --run_dirs의 값으로 묶은 명령줄."""
    folders = [word for before, word in pairwise(["", *words])
               if not word.startswith("-") and (not before.startswith("-") or "=" in before)]
    if not folders or asks_help(list(words)):
        return list(words)
    return [*(word for word in words if word not in folders), f"--run_dirs={folders!r}"]


if __name__ == "__main__":
    cli.run(overlay, argv=named(sys.argv[1:]))
