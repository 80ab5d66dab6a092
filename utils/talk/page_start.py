"""학습하기 탭: 데이터와 기반 모델을 골라 검사하고, 보이는 명령 그대로 학습을 시작해 따라가고, 멈추고, 이어 한다."""

import gradio as gr

from utils.console import shown_command
from utils.errors import UsageError
from utils.talk.order import Order, base_models, data_files, free_name, short, template_names
from utils.talk.page_reply import LIVE
from utils.talk.page_settings import status_line, unchecked
from utils.talk.runs import Runs

EVERY = 2.0  # 진행을 다시 읽는 간격(초)
EPOCHS, TEMPLATE = 5, "default"
INTRO = ("학습은 따로 도는 프로세스예요. 브라우저나 이 페이지를 닫아도 이어져요. "
         "이 페이지가 올린 모델도 VRAM을 쓰므로, 모자라면 페이지를 끄고 아래의 명령을 콘솔에서 실행하세요.")


def start_tab(runs: Runs, tab: gr.Tab) -> None:
    """지금 만드는 탭에 칸과 일을 놓는다. 이 컴퓨터에서만 열린 페이지에서만 부른다."""
    gr.Markdown(INTRO)
    with gr.Row():
        data = _picker("데이터 파일", "start-data")
        base = _picker("기반 모델", "start-base")
    with gr.Row():
        name = gr.Textbox(label="이름 (train 폴더 아래에 만들어요)", max_length=60, elem_id="start-name", min_width=160)
        epochs = gr.Number(label="epoch", value=EPOCHS, elem_id="start-epochs", min_width=80)
        template = _picker("템플릿", "start-template", template_names(), TEMPLATE)
    command = gr.Textbox(label="실행할 명령", lines=2, interactive=False, buttons=["copy"], elem_id="start-command")
    with gr.Row():
        check = gr.Button("데이터와 계획 보기", elem_id="start-check", min_width=140)
        go = gr.Button("학습 시작", variant="primary", elem_id="start-go", min_width=120)
    plan = gr.Textbox(label="데이터의 검사와 계획", lines=3, max_lines=24, interactive=False, elem_id="start-plan")
    run = _picker("따라갈 학습", "start-run")
    status = status_line("start-status", None)
    log = gr.Textbox(label="학습의 로그", lines=6, max_lines=20, interactive=False, elem_id="start-log")
    with gr.Row():
        stop = gr.Button("멈추기 (저장하고)", variant="stop", elem_id="start-stop", min_width=120, interactive=False)
        resume = gr.Button("이어 하기", elem_id="start-resume", min_width=120, interactive=False)
    talk = gr.Textbox(label="끝난 학습과 대화하는 명령", interactive=False, buttons=["copy"], elem_id="start-talk",
                      visible=False)
    clock = gr.Timer(EVERY, active=False)

    asked, followed = [data, base, name, epochs, template], [status, log, stop, resume, talk]

    def fill(*chosen):
        """고를 것들을 다시 읽는다. 이미 고른 것은 그대로 둔다."""
        lists = data_files(), base_models(), runs.names()
        *picked, named = chosen
        updates = [gr.update(choices=names, value=value or next(iter(names), None))
                   for names, value in zip(lists, picked, strict=True)]
        return *updates, named or free_name(runs.home), gr.Timer(active=True)

    def preview(*values):
        try:
            return shown_command(runs.command(Order.checked(*values)))
        except UsageError as error:
            return str(error)

    def look(*values):
        yield "검사하는 중이에요. 데이터가 크면 오래 걸려요"
        try:
            yield runs.check(Order.checked(*values))
        except UsageError as error:
            yield str(error)

    def begin(*values):
        try:
            order = Order.checked(*values)
            runs.start(order)
        except UsageError as error:
            return gr.update(), str(error), gr.update()
        return gr.update(choices=runs.names(), value=order.name), "준비하는 중", free_name(runs.home)

    def halt(picked):
        return _said(lambda: runs.stop(picked), "멈추라고 했어요. 하던 step을 마치고 저장해요")

    def go_on(picked):
        return _said(lambda: runs.resume(picked), "이어 하는 중")

    opened = tab.select(fill, [data, base, run, name], [data, base, run, name, clock], **LIVE)
    opened.then(preview, asked, command, **LIVE)
    for field in asked:
        field.change(preview, asked, command, **LIVE)
    check.click(look, asked, plan, **LIVE)
    go.click(begin, asked, [run, status, name], **LIVE)
    stop.click(halt, run, status, **LIVE)
    resume.click(go_on, run, status, **LIVE)
    clock.tick(lambda picked: follow(runs, picked), run, followed, **LIVE)
    run.change(lambda picked: follow(runs, picked), run, followed, **LIVE)


def follow(runs: Runs, name: object) -> tuple:
    """화면의 값: 상태 한 줄, 로그, 멈추기와 이어 하기를 누를 수 있는지, 대화하는 명령."""
    try:
        progress = runs.progress(name)
    except UsageError:
        return "", "", gr.update(interactive=False), gr.update(interactive=False), gr.update(visible=False)
    words = ["python", "generate.py", "--peft_root", short(runs.home / str(name))]
    return (progress.line, progress.log, gr.update(interactive=progress.state == "running"),
            gr.update(interactive=progress.state == "stopped"),
            gr.update(value=shown_command(words), visible=progress.state == "finished"))


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
