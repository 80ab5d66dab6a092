"""대화하는 웹 페이지: 모양, 단추가 하는 일, 서버를 여는 일."""

import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio를 부르기 전에 꺼야 한다

import gradio as gr
from starlette.middleware import Middleware

from utils.errors import UsageError
from utils.prompter import EXAMPLES
from utils.sampling import Sampling
from utils.talk import api, guard
from utils.talk.answerer import Answer, Answerer, describe
from utils.talk.models import Models
from utils.talk.page_runs import Results, results_tabs

PORTS_TRIED = 100
FONTS = ("Pretendard", "Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans KR", "Noto Sans CJK KR", "sans-serif")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Access:
    """페이지를 누구에게 어떻게 여는가. `auth`는 `사용자:암호`다."""

    server_name: str = "127.0.0.1"
    server_port: int = 7860
    share: bool = False
    auth: str | None = None
    api: bool = False


def build(answerer: Answerer, title: str, subtitle: str, results: Results) -> gr.Blocks:
    """페이지를 만든다. 아직 열지는 않는다."""
    defaults = Sampling()
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        with gr.Row():
            gr.Markdown(f"# {title}\n\n{subtitle}", elem_id="title")
            theme = gr.Button("밝게/어둡게", size="sm", scale=0, elem_id="theme-button")
        with gr.Tab("대화"):
            with gr.Row():
                with gr.Column(scale=3, min_width=280):
                    instruction = gr.Textbox(label="Instruction (질문)", lines=6, max_lines=12, autofocus=True,
                                             max_length=guard.MAX_CHARS, elem_id="instruction",
                                             placeholder="질문을 적는다. {x}처럼 적은 자리에는 Input이 들어간다.")
                    input = gr.Textbox(label="Input (입력)", lines=3, max_lines=8, max_length=guard.MAX_CHARS,
                                       elem_id="input", placeholder="없어도 된다")
                with gr.Column(scale=2, min_width=280):
                    controls = [_slider("Temperature", "temperature", 0.05, defaults.temperature),
                                _slider("Top p", "top_p", 0.01, defaults.top_p),
                                _slider("Top k", "top_k", 1, defaults.top_k),
                                _slider("Max tokens", "max_new_tokens", 1, defaults.max_new_tokens, answerer.context)]
                    with gr.Accordion("더 많은 설정", open=False):
                        controls += [
                            _slider("반복 벌점", "repetition_penalty", 0.05, defaults.repetition_penalty),
                            _slider("되풀이하지 않을 n-gram (0이면 끔)", "no_repeat_ngram_size", 1, 0),
                            gr.Number(label="seed (비우면 매번 다르다)", precision=0, minimum=0, elem_id="seed")]
            with gr.Row(elem_id="buttons"):
                submit = gr.Button("Submit (보내기)", variant="primary", elem_id="submit", min_width=120)
                compare = gr.Button("Compare (비교하기)", elem_id="compare", min_width=120,
                                    visible=answerer.can_compare)
                stop = gr.Button("Stop (멈추기)", variant="stop", elem_id="stop", min_width=120)
                clear = gr.Button("Clear (지우기)", elem_id="clear", min_width=120)
            with gr.Row():
                with gr.Column(min_width=280, visible=False) as base_column:
                    base_output, base_status = _output("기반 모델의 답", "base-output", "base-status")
                with gr.Column(min_width=280):
                    output, status = _output("Output (답)", "output", "status")
            examples = gr.Dataset(components=[instruction, input], samples=[list(example) for example in EXAMPLES],
                                  label="예시 질문", elem_id="examples", headers=["Instruction", "Input"])
        results_tabs(answerer, results)
        with gr.Tab("내 기록") as history:
            gr.Markdown("기록은 이 브라우저에만 남는다. 서버에도 디스크에도 쓰지 않는다.")
            with gr.Row():
                keep = gr.Button("내보내기 (JSON)", elem_id="history-export", min_width=120)
                forget = gr.Button("모두 지우기", variant="stop", elem_id="history-clear", min_width=120)
            gr.HTML('<div id="history-list"></div>')

        asked = [instruction, input, *controls]
        shown = [output, status, base_column, base_output, base_status]
        remembered = [instruction, input, output, status, base_output]

        async def answer(request: gr.Request, *values):
            async for update in _talk(answerer, (True,), values, request.session_hash):
                yield update

        async def answer_both(request: gr.Request, *values):
            async for update in _talk(answerer, (False, True), values, request.session_hash):
                yield update

        def leave(request: gr.Request):
            answerer.leave(request.session_hash)

        def clear_all(request: gr.Request):
            answerer.leave(request.session_hash, clear=True)
            return "", "", *_shown()

        for button, respond in ((submit.click, answer), (instruction.submit, answer), (compare.click, answer_both)):
            event = button(respond, asked, shown, concurrency_limit=None, show_progress="hidden",
                           api_visibility="private")
            event.then(None, remembered, js="(...row) => lite.remember(...row)", api_visibility="private")
        examples.click(lambda row: row, examples, [instruction, input], concurrency_limit=None,
                       show_progress="hidden", api_visibility="private")
        stop.click(leave, concurrency_limit=None, show_progress="hidden", api_visibility="private")
        clear.click(clear_all, None, [instruction, input, *shown], concurrency_limit=None,
                    show_progress="hidden", api_visibility="private")
        for trigger, action in ((theme.click, "theme"), (keep.click, "exportHistory"), (forget.click, "clearHistory"),
                                (history.select, "show"), (page.load, "start")):
            trigger(None, js=f"() => lite.{action}()", api_visibility="private")
    return page


async def _talk(answerer: Answerer, models: Sequence[bool], values: Sequence, session: str):
    """질문을 줄에 세우고, 답이 자라는 대로 화면의 값을 내놓는다. 여러 모델이면 같은 seed로 답한다."""
    instruction, input, *numbers, seed = values
    both = len(models) > 1
    try:
        guard.check_text(Instruction=instruction, Input=input)
        seed = secrets.randbits(32) if seed is None else seed
        settings = guard.bounded_sampling(seed=seed, **dict(zip(guard.BOUNDS, numbers, strict=True)))
        input_ids = answerer.ask(instruction, input)
        answers = [Answer(input_ids, settings, tuned, session=session) for tuned in models]
        answerer.submit(*answers)
    except UsageError as error:
        yield _shown(status=str(error))
        return
    tuned, base = answers[-1], answers[0]
    async for ahead in answerer.follow(*answers):
        waits = describe(tuned, ahead) if tuned.ids or tuned.finish_reason or not both else "기반 모델이 먼저 답한다"
        yield _shown(tuned.text, waits, both, base.text, describe(base, ahead)) if both else _shown(tuned.text, waits)
    if tuned.cleared:  # Gradio는 이벤트가 끝날 때 마지막 값을 다시 보낸다. 그 값이 비어 있어야 글이 되살아나지 않는다
        yield _shown()


def _shown(text: str = "", status: str = "", both: bool = False, base_text: str = "", base_status: str = "") -> tuple:
    """화면에 보이는 값들. `both`면 기반 모델의 답도 보인다."""
    return text, status, gr.update(visible=both), base_text, base_status


def _slider(label: str, name: str, step: float, value: float, most: float | None = None) -> gr.Slider:
    low, high, _ = guard.BOUNDS[name]
    high = high if most is None else min(high, most)
    slider = gr.Slider(low, high, value=min(value, high), step=step, label=label,
                       elem_id=name.replace("_", "-"))
    slider.preprocess = lambda sent: sent  # 범위는 guard가 본다. Gradio의 영어 오류 대신 한국어 한 줄이 보인다
    return slider


def _output(label: str, output_id: str, status_id: str) -> tuple[gr.Textbox, gr.Textbox]:
    return (gr.Textbox(label=label, lines=8, max_lines=30, interactive=False, buttons=["copy"], elem_id=output_id),
            gr.Textbox(show_label=False, label="상태", lines=1, max_lines=3, interactive=False, container=False,
                       elem_id=status_id, elem_classes="status"))


def free_port(server_name: str, first: int) -> int:
    """`first`부터 비어 있는 포트를 찾는다.

    Raises:
        UsageError: 이 주소에는 열 수 없거나, 빈 포트가 없다.
    """
    family = socket.AF_INET6 if ":" in server_name else socket.AF_INET
    for port in range(first, min(first + PORTS_TRIED, 65536)):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name != "nt":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((server_name, port))
                return port
            except socket.gaierror:
                raise UsageError(f"--server_name이 이 컴퓨터의 주소가 아니다: {server_name}") from None
            except OSError:
                continue
    raise UsageError(f"{server_name}의 {first}번부터 {PORTS_TRIED}개의 포트를 모두 열 수 없다. --server_port를 바꾼다")


def launch(page: gr.Blocks, models: Models, access: Access) -> tuple[str, str | None]:
    """페이지를 열고 (이 컴퓨터의 주소, 공유 주소)를 돌려준다. 기다리지는 않는다.

    Raises:
        UsageError: 포트가 없거나 공유 링크를 만들지 못했다.
    """
    guard.clean_console()
    port = free_port(access.server_name, access.server_port)
    page.queue(max_size=64, default_concurrency_limit=1, api_open=False)
    middleware = Middleware(guard.Guard, server_name=access.server_name, share=access.share, api=access.api,
                            on_leave=models.default.answerer.leave)
    font = [gr.themes.Font(name) for name in FONTS]
    _, local_url, share_url = page.launch(
        server_name=access.server_name, server_port=port, share=access.share, auth=guard.login_check(access.auth),
        auth_message="--auth로 정한 사용자와 암호를 적는다", prevent_thread_lock=True, quiet=True, inbrowser=False,
        ssr_mode=False, num_workers=0, mcp_server=False, pwa=False, enable_monitoring=False, run_history=False,
        footer_links=[], max_file_size=1, state_session_capacity=200, show_error=False,
        theme=gr.themes.Soft(primary_hue="teal", font=font, font_mono=[gr.themes.Font("monospace")]),
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        app_kwargs={"middleware": [middleware], "docs_url": None, "redoc_url": None, "openapi_url": None,
                    "routes": api.routes(models, access.auth) if access.api else []})
    if access.share and not share_url:
        raise UsageError("공유 링크를 만들지 못했다. 인터넷 연결을 본다")
    return local_url, share_url
