"""bench_train.py의 마지막 줄(JSON)을 막대그림으로 그린다.

    python tests/bench/chart_train.py bench.log assets/bench-train.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(source: str, target: str) -> None:
    results = json.loads(Path(source).read_text(encoding="utf-8").splitlines()[-1])
    plain, default, lean = results["default"]["plain"], results["default"]["ours"], results["lean"]["ours"]
    plain5, capped5 = results["5.8b"]["plain"], results["5.8b"]["ours"]
    bars = [("1.3b plain", plain), ("1.3b ours", default), ("1.3b ours, lean", lean), ("5.8b plain", plain5),
            ("5.8b ours, 5 GB cap", capped5)]
    colors = ["#b8bcc4", "#2f6fde", "#79a6f2", "#b8bcc4", "#2f6fde"]
    panels = [("tokens_per_s", "tokens / s", "{:,.0f}"), ("reserved_gb", "reserved VRAM, GB", "{:.2f}"),
              ("kernel_us_per_token", "GPU kernel time, us / token", "{:.1f}")]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), sharey=True)
    for axis, (key, title, form) in zip(axes, panels, strict=True):
        values = [result[key] for _, result in bars]
        axis.barh([name for name, _ in bars], values, color=colors)
        axis.set_title(title, fontsize=11)
        axis.set_xlim(0, max(values) * 1.22)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_xticks([])
        for row, value in enumerate(values):
            axis.text(value, row, " " + form.format(value), va="center", fontsize=10)
    axes[0].invert_yaxis()  # 축을 함께 쓰므로 한 번만 뒤집는다
    note = f"{results['device']}, torch {results['torch']}, batch 16 x 1,024 tokens, QLoRA r 8, dropout on"
    figure.text(0.99, 0.01, note, ha="right", fontsize=8, color="#666666")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
