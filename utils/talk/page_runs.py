"""페이지에서 학습의 결과를 보여 주는 두 탭: 얼마나 배웠나, 학습 기록."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import gradio as gr

from utils import report
from utils.errors import UsageError
from utils.record import FIGURES, MODELS
from utils.talk import scorecards, scores
from utils.talk.answerer import Answerer, describe

MAX_CHOICES = 200
MAX_QUESTIONS = 50
HEADERS = ["지표", *(model.title for model in MODELS), "차이"]
SHOWN_SETTINGS = ("base_model", "data_path", "num_train_epochs", "batch_size", "micro_batch_size", "learning_rate",
                  "cutoff_len", "val_set_size", "train_on_inputs", "lora_r", "lora_alpha", "lora_dropout",
                  "lora_target_modules", "prompt_template", "seed")
NO_RUN = "학습한 폴더가 없다. 이 탭은 `--peft_root`에 run.json이 있을 때 쓸 수 있다."
NO_BASE = "비교할 기반 모델이 없다. 이 탭은 어댑터를 얹은 채로(`--peft_root`) 열었을 때 쓸 수 있다."


@dataclass
class Results:
    """보여 줄 학습들과, 검증 질문을 읽는 방법. `load`는 처음 필요할 때 한 번만 부른다."""

    runs: dict[str, dict] = field(default_factory=dict)
    load: Callable[[], scores.Validation] | None = None
    _loaded: scores.Validation | None = None

    def validation(self) -> scores.Validation:
        if self._loaded is None:
            self._loaded = self.load()
        return self._loaded

    def question(self, number: object) -> scores.Question:
        """`number`번째 검증 질문. 브라우저가 보낸 번호이므로 범위를 다시 본다."""
        questions = self.validation().questions
        if not isinstance(number, int) or not 0 <= number < len(questions):
            raise UsageError("검증 질문을 고른다")
        return questions[number]


def results_tabs(answerer: Answerer, results: Results) -> None:
    """지금 만드는 페이지에 두 탭을 더한다."""
    with gr.Tab("얼마나 배웠나") as learned:
        if results.load is None or not answerer.can_compare:
            gr.Markdown(NO_RUN if results.load is None else NO_BASE)
        else:
            _learned(answerer, results, learned)
        for name, run in results.runs.items():
            if rows := scorecards.table(run):
                gr.Dataframe(rows, headers=list(scorecards.HEADERS), datatype="str", interactive=False, buttons=[],
                             label=f"{name}의 성적표", elem_classes="scorecard")
    with gr.Tab("학습 기록") as record:
        if results.runs:
            _record(results.runs, record)
        else:
            gr.Markdown(NO_RUN + " 여러 학습을 겹쳐 보려면 `--run_dirs 폴더,폴더`를 적는다.")


def _learned(answerer: Answerer, results: Results, tab: gr.Tab) -> None:
    gr.Markdown("학습에 쓰지 않은 질문에 기반 모델과 학습한 모델이 한 답을 비교한다. "
                "늘 가장 그럴듯한 토큰을 고른다(temperature 0).")
    pick = gr.Dropdown([], label="검증 질문", elem_id="question", interactive=True)
    ask = gr.Button("두 모델에게 묻기", variant="primary", elem_id="ask-both")
    with gr.Row():
        reference, base, tuned = (
            gr.Textbox(label=label, lines=6, max_lines=20, interactive=False, min_width=220, elem_id=name)
            for label, name in (("기준 답", "reference"), ("기반 모델", "learned-base"),
                                ("학습한 모델", "learned-tuned")))
    with gr.Row():
        count = gr.Slider(1, MAX_QUESTIONS, value=5, step=1, label="몇 개의 질문으로 잴까", elem_id="count", scale=3,
                          min_width=240)
        measure = gr.Button("재기", variant="primary", elem_id="measure", scale=1, min_width=100)
        stop = gr.Button("멈추기", variant="stop", elem_id="measure-stop", scale=1, min_width=100)
        export = gr.Button("CSV로 내려받기", elem_id="csv", scale=1, min_width=160)
    status = gr.Textbox(show_label=False, label="상태", interactive=False, container=False, elem_id="learned-status",
                        elem_classes="status")
    table = gr.Dataframe(headers=HEADERS, datatype="str", interactive=False, elem_id="scores", buttons=[])
    csv = gr.Textbox(visible="hidden", elem_id="csv-text")

    def fill():
        try:
            validation = results.validation()
        except UsageError as error:
            return gr.update(), str(error)
        choices = [(scores.plain_question(question, answerer.prompter)[:80], number)
                   for number, question in enumerate(validation.questions[:MAX_CHOICES])]
        changed = " 데이터가 학습한 뒤에 바뀌었다." if validation.changed else ""
        return gr.update(choices=choices, value=0), f"검증 질문 {len(validation.questions):,}개.{changed}"

    async def show_one(number, request: gr.Request):
        try:
            question = results.question(number)
            answers = scores.make_answers(question, answerer.context, request.session_hash)
            answerer.submit(*answers)
        except UsageError as error:
            yield "", "", "", str(error)
            return
        async for ahead in answerer.follow(*answers):
            last = next((answer for answer in answers if not answer.finish_reason), answers[-1])
            yield question.reference, answers[0].text, answers[1].text, describe(last, ahead)

    async def score(number, request: gr.Request):
        rows = []
        try:
            if not isinstance(number, int) or not 1 <= number <= MAX_QUESTIONS:
                raise UsageError(f"질문의 수는 1에서 {MAX_QUESTIONS}까지다")
            questions = results.validation().questions[:number]
            for question in questions:
                yield gr.update(), gr.update(), f"{len(rows)}/{len(questions)}번째까지 쟀다"
                answers = scores.make_answers(question, answerer.context, request.session_hash)
                answerer.submit(*answers)
                async for _ in answerer.follow(*answers):
                    pass
                if any(answer.finish_reason in ("cancelled", "error") for answer in answers):
                    break
                rows.append(scores.make_row(question, answers, answerer.prompter))
                yield scores.table(rows), scores.to_csv(rows), gr.update()
            yield gr.update(), gr.update(), f"질문 {len(rows)}개로 쟀다. ↑는 클수록, ↓는 작을수록 좋다"
        except UsageError as error:
            yield gr.update(), gr.update(), str(error)

    def leave(request: gr.Request):
        answerer.leave(request.session_hash)

    tab.select(fill, None, [pick, status], api_visibility="private")
    ask.click(show_one, pick, [reference, base, tuned, status], concurrency_limit=None, show_progress="hidden",
              api_visibility="private")
    measure.click(score, count, [table, csv, status], concurrency_limit=None, show_progress="hidden",
                  api_visibility="private")
    stop.click(leave, concurrency_limit=None, show_progress="hidden", api_visibility="private")
    export.click(None, csv, js="(text) => lite.exportCsv(text)", api_visibility="private")


def _record(runs: dict[str, dict], tab: gr.Tab) -> None:
    names = list(runs)
    chosen = gr.CheckboxGroup(names, value=names[:2], label="겹쳐 볼 학습", elem_id="runs")
    curves = gr.HTML(elem_id="curves")
    table = gr.Dataframe(interactive=False, datatype="str", elem_id="run-table", buttons=[], max_height=1000)

    def draw(picked: list[str]):
        shown = [name for name in names if name in picked] or names[:1]
        return curves_html([(name, runs[name]) for name in shown]), run_table({name: runs[name] for name in shown})

    for trigger in (tab.select, chosen.change):
        trigger(draw, chosen, [curves, table], show_progress="hidden", api_visibility="private")


def curves_html(runs: Sequence[tuple[str, dict]]) -> str:
    """곡선의 그림을 담은 HTML. 디스크에 쓰지 않는다."""
    picture = io.BytesIO()
    report.draw_curves(runs, picture)
    return f'<img alt="학습 곡선" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">'


def run_table(runs: dict[str, dict]) -> dict:
    """학습마다 한 열: 결과(loss, 속도, 최대 VRAM)와 설정."""
    rows = []
    for figure in FIGURES:
        rows.append([figure.title, *(figure.shown(run) or "-" for run in runs.values())])
    for key in SHOWN_SETTINGS:
        values = (run.get("settings", {}).get(key, "-") for run in runs.values())
        rows.append([key, *(", ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in values)])
    return {"headers": ["항목", *runs], "data": rows}
