"""학습하기 탭의 살아 있는 loss 곡선: 작은 SVG. 빛깔은 page.css가 밝은 페이지와 어두운 페이지에 맞춘다."""

from collections.abc import Mapping

from utils.report import plain_number
from utils.talk.runlog import RunLog

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 28, 24  # 축의 글이 놓일 둘레
MOST = 400  # 그리는 점의 수


def curve_svg(log: RunLog) -> str:
    """로그의 학습 loss와 검증 loss. 아직 한 step도 없으면 빈 글이다."""
    values = [*log.losses.values(), *log.evals.values()]
    if not log.losses:
        return ""
    low, high = min(values), max(values)
    high = high if high > low else low + 1
    last = max(log.total, log.step, 1)

    def across(step: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / last, 1)

    def down(loss: float) -> float:
        share = (high - loss) / (high - low)  # 위에서부터
        return round(TOP + (HEIGHT - TOP - BOTTOM) * share, 1)

    def line(points: Mapping[int, float], kind: str) -> str:
        every = -(-len(points) // MOST)  # 올림
        places = [(across(step), down(loss)) for step, loss in sorted(points.items())[::every]]
        drawn = " ".join(f"{x},{y}" for x, y in places)
        curve = f'<polyline class="{kind}" points="{drawn}"/>'
        if kind == "train" and len(places) > 1:
            return curve
        return curve + "".join(f'<circle class="{kind}" cx="{x}" cy="{y}" r="3"/>' for x, y in places)

    marks = []
    for loss in (low, (low + high) / 2, high):
        y = down(loss)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{plain_number(loss)}</text>')
    for step, anchor in ((0, "start"), (last, "end")):
        marks.append(f'<text x="{across(step)}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:,} step</text>')
    legend = f'<text class="train" x="{LEFT}" y="16">● 학습 loss</text>'
    if log.evals:
        legend += f'<text class="eval" x="{LEFT + 110}" y="16">● 검증 loss</text>'
    lines = line(log.losses, "train") + (line(log.evals, "eval") if log.evals else "")
    said = f"학습 loss 곡선: {log.step:,}/{last:,} step, loss {log.losses[log.step]:.3f}"
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">{"".join(marks)}{legend}{lines}</svg>')
