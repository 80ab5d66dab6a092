"""얼마나 배웠나 탭: 학습에 쓰지 않은 질문에 기반 모델과 학습한 모델이 한 답을 비교하고 잰다."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import gradio as gr

from utils.errors import UsageError
from utils.prompter import EXAMPLES
from utils.record import MODELS
from utils.talk import scorecards, scores
from utils.talk.answerer import Answerer, describe
from utils.talk.page_reply import LIVE
from utils.talk.page_runs import html_table
from utils.talk.page_settings import status_line, unchecked

MAX_CHOICES = 200
MAX_QUESTIONS = 50
HEADERS = ["지표", *(model.title for model in MODELS), "차이"]


@dataclass
class Results:
    """보여 줄 학습들과, 검증 질문을 읽는 방법. `load`는 처음 필요할 때 한 번만 부른다.

    Attributes:
        runs: 학습한 폴더의 이름 -> run.json의 내용. `load`가 있으면 첫째가 그 학습이다.
    """

    runs: dict[str, dict] = field(default_factory=dict)
    load: Callable[[], scores.Validation] | None = None
    _loaded: scores.Validation | None = None
    _loading: threading.Lock = field(default_factory=threading.Lock)

    def validation(self) -> scores.Validation:
        with self._loading:
            if self._loaded is None:
                self._loaded = self.load()
            return self._loaded

    @property
    def examples(self) -> list[tuple[str, str]]:
        """예시로 보일 (질문, Input)들: 학습의 기록에 적힌 사용자의 질문, 없으면 늘 있는 예시."""
        data = next(iter(self.runs.values())).get("data") if self.load else None
        asked = data.get("questions") if isinstance(data, dict) else None
        if not isinstance(asked, list):
            return list(EXAMPLES)
        return [(text, "") for text in asked if isinstance(text, str)] or list(EXAMPLES)

    def question(self, number: object) -> scores.Question:
        """`number`번째 검증 질문. 브라우저가 보낸 번호이므로 범위를 다시 본다."""
        questions = self.validation().questions
        if not isinstance(number, int) or not 0 <= number < len(questions):
            raise UsageError("검증 질문을 골라 주세요")
        return questions[number]


def learned_tab(answerer: Answerer, results: Results, tab: gr.Tab) -> None:
    """지금 만드는 탭에 칸과 일을 놓는다."""
    LearnedTab(answerer, results).connect(tab)
    for name, run in results.runs.items():
        if rows := scorecards.table(run):
            gr.Markdown(f"**{name}의 성적표**")
            gr.HTML(html_table(scorecards.HEADERS, rows), elem_classes="scorecard")


class LearnedTab:
    """탭의 칸들과, 누르면 하는 일."""

    def __init__(self, answerer: Answerer, results: Results):
        self.answerer, self.results = answerer, results
        gr.Markdown("학습에 쓰지 않은 질문에 기반 모델과 학습한 모델이 한 답을 비교해요. "
                    "늘 가장 그럴듯한 토큰을 골라요(Temperature 0).")
        self.place_question()
        self.place_score()

    def place_question(self) -> None:
        """질문 하나를 골라 두 모델의 답을 나란히 보는 칸."""
        self.pick = unchecked(gr.Dropdown([], label="검증 질문", elem_id="question", interactive=True))
        self.ask = gr.Button("두 모델에게 묻기", variant="primary", elem_id="ask-both")
        titles = ("모범 답", "reference"), *((model.title, f"learned-{model.name}") for model in MODELS)
        with gr.Row():
            self.answers = [gr.Textbox(label=label, lines=10, max_lines=10, interactive=False, min_width=220,
                                       elem_id=name) for label, name in titles]

    def place_score(self) -> None:
        """질문 여럿을 재는 단추와 점수의 표."""
        with gr.Row():
            self.count = gr.Slider(1, MAX_QUESTIONS, value=5, step=1, label="몇 개의 질문으로 잴까요",
                                   elem_id="count", scale=3, min_width=240)
            self.measure = gr.Button("재기", variant="primary", elem_id="measure", scale=1, min_width=100)
            self.stop = gr.Button("멈추기", variant="stop", elem_id="measure-stop", scale=1, min_width=100)
            self.export = gr.Button("CSV로 내려받기", elem_id="csv", scale=1, min_width=160)
        self.status = status_line("learned-status", None)
        self.table = gr.HTML(elem_id="scores")
        self.csv = gr.Textbox(visible="hidden", elem_id="csv-text")

    def connect(self, tab: gr.Tab) -> None:
        """칸과 단추를 하는 일에 잇는다."""
        tab.select(self.fill, None, [self.pick, self.status], api_visibility="private")
        self.ask.click(self.show_one, self.pick, [*self.answers, self.status], **LIVE)
        self.measure.click(self.score, self.count, [self.table, self.csv, self.status], **LIVE)
        self.stop.click(self.leave, **LIVE)
        self.export.click(None, self.csv, js="(text) => lite.exportCsv(text)", api_visibility="private")

    def fill(self):
        """검증 질문을 읽어 고르는 칸에 넣는다."""
        try:
            validation = self.results.validation()
        except UsageError as error:
            return gr.update(), str(error)
        choices = [(question.text[:80], number) for number, question in enumerate(validation.questions[:MAX_CHOICES])]
        changed = " 데이터나 나누는 법이 학습한 뒤에 바뀌었어요." if validation.changed else ""
        return gr.update(choices=choices, value=0), f"검증 질문 {len(validation.questions):,}개.{changed}"

    async def show_one(self, number, request: gr.Request):
        try:
            question = self.results.question(number)
            answers = scores.make_answers(question, self.answerer.context, request.session_hash)
            self.answerer.submit(*answers)
        except UsageError as error:
            yield "", "", "", str(error)
            return
        async for ahead in self.answerer.follow(*answers):
            last = next((answer for answer in answers if not answer.finish_reason), answers[-1])
            yield question.reference, *(answer.text.rstrip() for answer in answers), describe(last, ahead)

    async def score(self, number, request: gr.Request):
        rows = []
        try:
            if not isinstance(number, int) or not 1 <= number <= MAX_QUESTIONS:
                raise UsageError(f"질문의 수는 1에서 {MAX_QUESTIONS}까지예요")
            questions = self.results.validation().questions[:number]
            for question in questions:
                yield gr.update(), gr.update(), f"{len(rows)}/{len(questions)}번째까지 쟀어요"
                answers = scores.make_answers(question, self.answerer.context, request.session_hash)
                self.answerer.submit(*answers)
                async for _ in self.answerer.follow(*answers):
                    pass
                if any(answer.finish_reason in ("cancelled", "error") for answer in answers):
                    break
                rows.append(scores.make_row(question, answers))
                yield html_table(HEADERS, scores.table(rows)), scores.to_csv(rows), gr.update()
            yield gr.update(), gr.update(), f"질문 {len(rows)}개로 쟀어요. ↑는 클수록, ↓는 작을수록 좋아요"
        except UsageError as error:
            yield gr.update(), gr.update(), str(error)

    def leave(self, request: gr.Request):
        self.answerer.leave(request.session_hash)
