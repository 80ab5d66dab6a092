"""대화하는 웹 페이지: 탭의 차례, 빛깔, 서버를 여는 일."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio를 부르기 전에 꺼야 한다

import gradio as gr
from gradio import queueing
from starlette.middleware import Middleware

from utils.errors import UsageError
from utils.talk import api, exposure, guard, page_turns
from utils.talk.models import Models
from utils.talk.page_form import form_tab
from utils.talk.page_history import history_tab
from utils.talk.page_learned import Results, learned_tab
from utils.talk.page_runs import runs_tab
from utils.talk.page_start import start_tab
from utils.talk.page_talk import pickers, talk_tab
from utils.talk.runs import Runs

PORTS_TRIED = 100
FONTS = ("Pretendard", "Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans KR", "Noto Sans CJK KR", "sans-serif")
HERE = Path(__file__).parent
# Gradio의 한국어에 빠졌거나 어색한 말. 영어 브라우저에서도 한국어로 보인다
KOREAN = {"chatbot.copy_message": "복사", "chatbot.copied_message": "복사했어요", "chatbot.retry": "다시 답하기",
          "chatbot.undo": "마지막 질문 되돌리기", "chatbot.edit": "고쳐 쓰기", "chatbot.submit": "고친 글 보내기",
          "chatbot.cancel": "그만두기", "chatbot.like": "좋은 답", "chatbot.dislike": "나쁜 답",
          "common.loading": "여는 중"}


@dataclass(frozen=True)
class Access:
    """페이지를 누구에게 어떻게 여는가. `auth`는 `사용자:암호`다."""

    server_name: str = "127.0.0.1"
    server_port: int = 7860
    share: bool = False
    auth: str | None = None
    api: bool = False

    @property
    def is_private(self) -> bool:
        """이 컴퓨터에서만 들어올 수 있는가. 프로세스를 시작하는 일은 이때만 연다."""
        return exposure.is_loopback(self.server_name) and not self.share


def build(models: Models, title: str, results: Results, runs: Runs | None = None) -> gr.Blocks:
    """페이지를 만든다. 아직 열지는 않는다. 보여 줄 것이 없는 탭은 만들지 않는다.

    Args:
        runs: 페이지에서 시작한 학습들. None이면 학습하기 탭이 없다.
    """
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        with gr.Row(elem_id="top"):
            gr.Markdown(f"# {page_turns.inert(title)}", elem_id="title")
            model, other = pickers(models)
            theme = gr.Button("밝게/어둡게", size="sm", scale=0, min_width=100, elem_id="theme-button")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("대화", id="talk"):
                talk_tab(models, results, page, tabs, model, other)
            with gr.Tab("한 번 묻기", id="form"):
                form_tab(models, results, model, other)
            if results.load is not None and models.default.answerer.can_compare:
                with gr.Tab("얼마나 배웠나", id="learned") as learned:
                    learned_tab(models.default.answerer, results, learned)
            if results.runs:
                with gr.Tab("학습 기록", id="runs") as record:
                    runs_tab(results.runs, record)
            if runs is not None:
                with gr.Tab("학습하기", id="start") as start:
                    start_tab(runs, start, tabs)
            with gr.Tab("내 기록", id="history") as history:
                history_tab(history)
        theme.click(None, js="() => lite.theme()", api_visibility="private")
        page.load(None, js="() => lite.start()", api_visibility="private")
    return page


def free_port(server_name: str, first: int) -> int:
    """`first`부터 비어 있는 포트를 찾는다.

    Raises:
        UsageError: 이 주소에는 열 수 없거나, 빈 포트가 없다.
    """
    if problem := exposure.address_problem(server_name):
        raise UsageError(problem)
    family = socket.AF_INET6 if ":" in server_name else socket.AF_INET
    for port in range(first, min(first + PORTS_TRIED, 65536)):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name != "nt":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((server_name, port))
                return port
            except OSError:
                continue
    raise UsageError(f"{server_name}의 {first}번부터 {PORTS_TRIED}개의 포트를 모두 열 수 없다. --server_port를 바꾼다")


class Opened(NamedTuple):
    """열린 페이지의 주소: 이 컴퓨터의 것과, 청했으면 공유하는 것."""

    local: str
    shared: str | None


def launch(page: gr.Blocks, models: Models, access: Access) -> Opened:
    """페이지를 연다. 닫히기를 기다리지는 않는다.

    Raises:
        UsageError: 포트가 없거나 공유 링크를 만들지 못했다.
    """
    guard.clean_console()
    queueing.traceback = guard.OneLineErrors  # 콘솔에 낯선 사람의 실수가 수십 줄로 쌓이지 않는다
    port = free_port(access.server_name, access.server_port)
    page.queue(max_size=64, default_concurrency_limit=1, api_open=False)
    middleware = Middleware(guard.Guard, server_name=access.server_name, share=access.share, api=access.api,
                            on_leave=models.default.answerer.leave)
    _, local_url, share_url = page.launch(
        server_name=access.server_name, server_port=port, share=access.share, auth=guard.login_check(access.auth),
        auth_message="사용자 이름과 암호를 적어 주세요", prevent_thread_lock=True, quiet=True, inbrowser=False,
        ssr_mode=False, num_workers=0, mcp_server=False, pwa=False, enable_monitoring=False, run_history=False,
        footer_links=[], max_file_size=1, state_session_capacity=200, show_error=False,
        theme=_theme(), i18n=gr.I18n(ko=KOREAN, en=KOREAN),
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        app_kwargs={"middleware": [middleware], "docs_url": None, "redoc_url": None, "openapi_url": None,
                    "routes": api.routes(models, access.auth) if access.api else []})
    if access.share and not share_url:
        raise UsageError("공유 링크를 만들지 못했다. 인터넷 연결을 본다")
    return Opened(local_url, share_url)


def _theme() -> gr.themes.Base:
    """글과 바탕의 명암비가 4.5를 넘고, 칸과 단추의 테두리가 밝은 바탕에서도 보이는 빛깔."""
    theme = gr.themes.Soft(primary_hue="teal", font=[gr.themes.Font(name) for name in FONTS],
                           font_mono=[gr.themes.Font("monospace")])
    return theme.set(
        input_border_width="1px", input_border_color="*neutral_400", input_border_color_dark="*neutral_600",
        button_border_width="1px", button_secondary_border_color="*neutral_400",
        button_secondary_border_color_hover="*neutral_600", button_secondary_border_color_dark="transparent",
        button_secondary_background_fill_hover_dark="*neutral_500", button_primary_border_color="transparent",
        button_primary_border_color_dark="transparent",
        color_accent="*primary_700", checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700", slider_color="*primary_600",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white", button_primary_text_color_dark="white",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        block_label_background_fill_dark="*primary_800", block_title_background_fill_dark="*primary_800",
        block_label_text_color="*primary_800", block_label_text_color_dark="*neutral_100",
        block_title_text_color="*primary_800", block_title_text_color_dark="*neutral_100",
        input_placeholder_color="*neutral_600", input_placeholder_color_dark="*neutral_300")
