"""학습 기록 탭: 학습한 폴더들의 곡선과, 결과와 설정의 표."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import gradio as gr

from utils import report
from utils.paths import shown
from utils.record import FIGURES

SHOWN_SETTINGS = ("base_model", "data_path", "num_train_epochs", "batch_size", "micro_batch_size", "learning_rate",
                  "cutoff_len", "val_set_size", "train_on_inputs", "lora_r", "lora_alpha", "lora_dropout",
                  "lora_target_modules", "prompt_template", "seed")


def runs_tab(runs: dict[str, dict], tab: gr.Tab) -> None:
    """지금 만드는 탭에 칸과 일을 놓는다.

    Args:
        runs: 학습한 폴더의 이름 -> run.json의 내용.
    """
    names = list(runs)
    chosen = gr.CheckboxGroup(names, value=names[:2], label="겹쳐 볼 학습", elem_id="runs", visible=len(names) > 1)
    chosen.preprocess = lambda sent: sent if isinstance(sent, list) else []
    curves = gr.HTML(elem_id="curves")
    table = gr.HTML(elem_id="run-table")

    def draw(picked: list[str]):
        shown = [name for name in names if name in picked] or names[:1]
        return curves_html([(name, runs[name]) for name in shown]), run_table({name: runs[name] for name in shown})

    for trigger in (tab.select, chosen.change):
        trigger(draw, chosen, [curves, table], show_progress="hidden", api_visibility="private")


def curves_html(runs: Sequence[tuple[str, dict]]) -> str:
    """곡선의 그림을 담은 HTML. 디스크에 쓰지 않는다. 어두운 페이지에서는 page.css가 그림을 뒤집는다."""
    picture = io.BytesIO()
    report.draw_curves(runs, picture)
    return f'<img alt="학습 곡선" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">'


def run_table(runs: dict[str, dict]) -> str:
    """학습마다 한 열: 결과(loss, 속도, 최대 VRAM)와 설정."""
    rows = []
    for figure in FIGURES:
        shown = [figure.shown(run) for run in runs.values()]
        if any(shown):
            rows.append([figure.title, *(value or "-" for value in shown)])
    for key in SHOWN_SETTINGS:
        rows.append([key, *(_setting(run, key) for run in runs.values())])
    return html_table(["항목", *runs], rows)


def _setting(run: dict, key: str) -> str:
    """설정 하나. 적지 않은 것은 도구가 고른 값이다."""
    value = run.get("settings", {}).get(key)
    if value is None:
        chosen = run.get("plan", {}).get(key)
        return "-" if chosen is None else f"{chosen} (스스로 고름)"
    if key in ("base_model", "data_path") and Path(str(value)).exists():
        return shown(str(value))
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def html_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """글이 잘리지 않고 좁으면 옆으로 밀어 보는 표. 값은 모두 글자 그대로다."""
    def line(cells: Sequence[str], tag: str) -> str:
        inside = "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    head = line(headers, "th")
    body = "".join(line(row, "td") for row in rows)
    return f'<div class="table-box"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
