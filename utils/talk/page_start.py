"""학습하기 탭: 데이터와 기반 모델을 골라 검사하고, 보이는 명령 그대로 학습을 시작해 따라가고, 멈추고, 이어 한다."""

import gradio as gr

from utils.console import shown_command
from utils.errors import UsageError
from utils.talk.opened import Opened
from utils.talk.order import Order, base_models, data_files, free_name, template_names
from utils.talk.page_curve import curve_svg
from utils.talk.page_reply import LIVE
from utils.talk.page_settings import status_line, unchecked
from utils.talk.runs import Runs

EVERY = 2.0  # 도는 학습을 보는 동안 진행을 다시 읽는 간격(초)
SHOWN_LINES = 16
EPOCHS, TEMPLATE = 5, "default"
INTRO = ("학습은 따로 도는 프로세스예요. 브라우저나 이 페이지를 닫아도 이어져요. "
         "이 페이지가 올린 모델도 VRAM을 쓰므로, 모자라면 페이지를 끄고 아래의 명령을 콘솔에서 실행하세요.")


def start_tab(runs: Runs, tab: gr.Tab, tabs: gr.Tabs) -> None:
    """지금 만드는 탭에 칸과 일을 놓는다. 이 컴퓨터에서만 열린 페이지에서만 부른다. `tabs`는 이 탭이 든 탭들이다."""
    StartTab(runs, tab.label).connect(tab, tabs)


class StartTab:
    """탭의 칸들과, 누르면 하는 일."""

    def __init__(self, runs: Runs, label: str):
        self.runs = runs
        self.label = label
        self.pages = Opened()
        gr.Markdown(INTRO)
        self.place_order()
        self.place_buttons()
        self.place_progress()
        self.clock, self.here = gr.Timer(EVERY, active=False), gr.State(False)
        self.asked = [self.data, self.base, self.name, self.epochs, self.template]

    def place_order(self) -> None:
        """무엇을 배울지 고르는 칸과, 그대로 실행할 명령."""
        with gr.Row():
            self.data = _picker("데이터 파일", "start-data")
            self.base = _picker("기반 모델", "start-base")
        with gr.Row():
            self.name = gr.Textbox(label="이름 (train 폴더 아래에 만들어요)", max_length=60, elem_id="start-name",
                                   min_width=160)
            self.epochs = gr.Number(label="epoch", value=EPOCHS, elem_id="start-epochs", min_width=80)
            self.template = _picker("템플릿", "start-template", template_names(), TEMPLATE)
        self.command = gr.Textbox(label="실행할 명령", lines=2, max_lines=8, interactive=False, buttons=["copy"],
                                  elem_id="start-command")

    def place_buttons(self) -> None:
        """검사하고 시작하고 멈추는 단추와, 그 상태."""
        with gr.Row():
            self.check = gr.Button("데이터와 계획 보기", elem_id="start-check", min_width=140)
            self.go = gr.Button("학습 시작", variant="primary", elem_id="start-go", min_width=120)
        self.plan = gr.Textbox(label="데이터의 검사와 계획", lines=3, max_lines=24, interactive=False,
                               elem_id="start-plan", visible=False)
        with gr.Row(equal_height=True):
            self.status = status_line("start-status", None)
            self.stop = gr.Button("멈추기 (저장하고)", variant="stop", elem_id="start-stop", scale=0, min_width=160,
                                  visible=False)
            self.resume = gr.Button("이어 하기", variant="primary", elem_id="start-resume", scale=0, min_width=160,
                                    visible=False)

    def place_progress(self) -> None:
        """따라가는 학습의 로그와 곡선, 끝나면 여는 대화."""
        with gr.Column(visible=False) as self.following:
            with gr.Row(equal_height=True):
                self.log = gr.Textbox(label="학습의 로그", lines=10, max_lines=SHOWN_LINES, interactive=False,
                                      elem_id="start-log", min_width=280)
                with gr.Column(min_width=280):
                    self.curve = gr.HTML(elem_id="start-curve")
            with gr.Row(equal_height=True):
                self.talk = gr.Textbox(label="끝난 학습과 대화하는 명령", interactive=False, buttons=["copy"],
                                       elem_id="start-talk")
                self.enter = gr.Button("대화 페이지 열기", variant="primary", elem_id="start-open", scale=0,
                                       min_width=160)
            self.link = gr.Markdown(elem_id="start-link")
            self.run = _picker("따라갈 학습", "start-run")

    def connect(self, tab: gr.Tab, tabs: gr.Tabs) -> None:
        """칸과 단추를 하는 일에 잇는다."""
        shown = [self.following, self.status, self.log, self.curve, self.stop, self.resume, self.talk, self.enter,
                 self.clock]
        choices = [self.data, self.base, self.run, self.name]
        opened = tab.select(self.fill, choices, [*choices, self.here], **LIVE)
        opened.then(self.preview, self.asked, self.command, **LIVE).then(
            self.follow, [self.run, self.here], shown, **LIVE)
        tabs.select(self.leave, None, [self.here, self.clock], **LIVE)
        for field in self.asked:
            field.change(self.preview, self.asked, self.command, **LIVE)
        self.check.click(self.look, self.asked, self.plan, **LIVE)
        self.go.click(self.begin, self.asked, [self.run, self.status, self.name, self.clock], **LIVE)
        self.stop.click(self.halt, self.run, self.status, **LIVE)
        self.resume.click(self.go_on, self.run, [self.status, self.clock], **LIVE)
        self.enter.click(self.open_talk, self.run, self.link, **LIVE)
        self.run.change(lambda: "", None, self.link, **LIVE)
        for trigger in (self.clock.tick, self.run.change):
            trigger(self.follow, [self.run, self.here], shown, **LIVE)

    def fill(self, *chosen):
        """고를 것들을 다시 읽는다. 이미 고른 것은 그대로 둔다."""
        lists = data_files(), base_models(), self.runs.names()
        *picked, named = chosen
        updates = [gr.update(choices=names, value=value or next(iter(names), None))
                   for names, value in zip(lists, picked, strict=True)]
        return *updates, named or free_name(self.runs.home), True

    def leave(self, event: gr.SelectData):
        """다른 탭을 고르면 도는 학습을 다시 읽지 않는다."""
        return (gr.skip(), gr.skip()) if event.value == self.label else (False, clock_of(False))

    def preview(self, *values):
        try:
            return shown_command(self.runs.command(Order.checked(*values)))
        except UsageError as error:
            return str(error)

    def look(self, *values):
        yield gr.update(value="검사하는 중이에요. 데이터가 크면 오래 걸려요", visible=True)
        try:
            yield self.runs.check(Order.checked(*values))
        except UsageError as error:
            yield str(error)

    def begin(self, *values):
        try:
            order = Order.checked(*values)
            self.runs.start(order)
        except UsageError as error:
            return gr.update(), str(error), gr.update(), gr.update()
        return (gr.update(choices=self.runs.names(), value=order.name), "준비하는 중", free_name(self.runs.home),
                clock_of(True))

    def halt(self, picked):
        return _said(lambda: self.runs.stop(picked), "멈추라고 했어요. 하던 step을 마치고 저장해요")

    def go_on(self, picked):
        return _said(lambda: self.runs.resume(picked), "이어 하는 중"), clock_of(True)

    def open_talk(self, picked):
        yield "모델을 올리고 있어요. 큰 모델이면 몇 분이 걸려요"
        try:
            url = self.pages.url_of(self.runs.folder(picked))
            yield f"[{url}]({url})에서 대화할 수 있어요. 이 페이지를 끄면 함께 꺼져요"
        except UsageError as error:
            yield str(error)

    def follow(self, picked, watching):
        return follow(self.runs, picked, watching)


def follow(runs: Runs, name: object, watching: bool = True) -> tuple:
    """화면의 값: 따라갈 것이 있는지, 상태 한 줄, 로그, 곡선, 멈추기, 이어 하기, 대화하는 명령, 대화 열기, 다시
    읽을지.

    Args:
        watching: 이 탭을 보고 있는지. 아니면 도는 학습이어도 다시 읽지 않는다.
    """
    try:
        progress = runs.progress(name)
    except UsageError:
        return gr.update(visible=False), "", "", "", *[gr.update(visible=False)] * 4, clock_of(False)
    words = ["python", *Opened.command(runs.home / str(name))[1:]]
    finished = progress.state == "finished"
    return (gr.update(visible=True), progress.line, "\n".join(progress.log.lines[-SHOWN_LINES:]),
            curve_svg(progress.log), gr.update(visible=progress.state == "running"),
            gr.update(visible=progress.state == "stopped"),
            gr.update(value=shown_command(words), visible=finished), gr.update(visible=finished),
            clock_of(watching and progress.state == "running"))


def clock_of(active: bool) -> dict:
    """다시 읽는 시계를 켜거나 끈다."""
    return gr.update(active=active)


def _said(act, done: str) -> str:
    try:
        act()
    except UsageError as error:
        return str(error)
    return done


def _picker(label: str, name: str, choices: list[str] | None = None, value: str | None = None) -> gr.Dropdown:
    """고르거나 적는 칸. 값은 `Order`가 다시 본다."""
    return unchecked(gr.Dropdown(choices or [], value=value, label=label, allow_custom_value=True, elem_id=name,
                                 min_width=220))
