"""README.md의 학습의 표(이 도구, Unsloth, 흔한 방법)를 막대그림으로 그린다.

    python tests/bench/chart_train.py tests/bench/README.md assets/bench-train.png
"""

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEADING = "| 학습 | 이 도구"
RIVALS = {"plain": "#b8bcc4", "Unsloth": "#8b95a7", "ours": "#2f6fde"}
PANELS = ("tokens / s", "{:,.0f}"), ("VRAM, GB", "{:.2f}")
NUMBER = re.compile(r"[\d,]+(?:\.\d+)?")


def read_rows(text: str) -> dict[str, dict[str, tuple[float, float]]]:
    """표의 줄마다 {누구: (토큰/초, GB)}. 세 쪽이 모두 있는 줄만이다."""
    lines = text[text.index(HEADING) :].splitlines()[2:]
    rows = {}
    for line in lines[: next(index for index, line in enumerate(lines) if not line.startswith("|"))]:
        name, ours, vram, unsloth, plain = (cell.strip() for cell in line.strip("|").split("|"))
        cells = {"plain": plain, "Unsloth": unsloth, "ours": f"{ours}; {vram}"}
        if all(cells.values()):
            rows[name.replace("`", "")] = {who: numbers(cell) for who, cell in cells.items()}
    return rows


def numbers(cell: str) -> tuple[float, float]:
    """"44,065; 3.01 GB(3.05)" -> (44065, 3.01)."""
    speed, vram = NUMBER.findall(re.sub(r", (?=\d+(?:\.\d+)? GB)", "; ", cell))[:2]
    return float(speed.replace(",", "")), float(vram)


def main(source: str, target: str) -> None:
    rows = read_rows(Path(source).read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 1 + 1.1 * len(rows)), sharey=True)
    for axis, (index, (title, form)) in zip(axes, enumerate(PANELS), strict=True):
        for place, (who, color) in enumerate(RIVALS.items()):
            values = [row[who][index] for row in rows.values()]
            heights = [line + (place - 1) * 0.27 for line in range(len(rows))]
            axis.barh(heights, values, height=0.25, color=color, label=who)
            for height, value in zip(heights, values, strict=True):
                axis.text(value, height, " " + form.format(value), va="center", fontsize=9)
        axis.set_title(title, fontsize=11)
        axis.set_xlim(0, axis.get_xlim()[1] * 1.12)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_xticks([])
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].invert_yaxis()  # 축을 함께 쓰므로 한 번만 뒤집는다
    axes[1].legend(frameon=False, loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
