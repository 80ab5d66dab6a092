"""대화 탭: 여러 번 주고받고, 고쳐 묻고, 다시 답하고, 두 모델을 나란히 본다."""

import gradio as gr

from utils.talk import guard
from utils.talk.models import Models
from utils.talk.page_learned import Results
from utils.talk.page_reply import ALONE, LIVE, correct, is_answer, mark, reread, say, screen, title_of, waiting
from utils.talk.page_settings import main_sliders, more_settings, status_line, unchecked
from utils.talk.page_turns import Talk, plain
from utils.turns import Turn, filled

HEIGHT = "max(200px, calc(100dvh - 340px))"  # 질문과 보내기가 첫 화면에 함께 보이는 높이


def talk_tab(models: Models, results: Results, page: gr.Blocks, tabs: gr.Tabs, model: gr.Dropdown,
             other: gr.Dropdown) -> None:
    """지금 만드는 탭에 칸과 일을 놓는다. `model`과 `other`는 페이지 위의 고르는 칸이다."""
    TalkTab(models, results).connect(page, tabs, model, other)


class TalkTab:
    """탭의 칸들과, 누르면 하는 일."""

    def __init__(self, models: Models, results: Results):
        self.models = models
        # 암호는 정해 두어야 서버를 다시 열어도 읽는다. 지키는 것은 브라우저다
        self.talk = gr.BrowserState(None, storage_key="polyglot-ko-lite-talk", secret="browser-only")
        self.place_chat(results)
        self.place_settings()
        self.reopen = gr.Button(visible="hidden", elem_id="reopen")
        self.shown = [self.talk, self.chat, self.beside, self.question, self.status]

    def place_chat(self, results: Results) -> None:
        """대화와 나란히 볼 대화, 예시 질문, 질문 칸."""
        with gr.Row(elem_id="talk-row"):
            self.chat = _chatbot("chat", label=title_of(self.models.default.name), editable="all", show_label=False,
                                 min_width=280)
            self.beside = _chatbot("chat-other", visible=False, min_width=280)
        with gr.Row(elem_id="talk-bar"):
            self.fresh = gr.Button("새 대화", size="sm", scale=0, min_width=80, elem_id="talk-new")
            self.chips = gr.Dataset(components=[gr.Textbox(render=False)], samples=chips_of(results),
                                    label="예시 질문", show_label=False, layout="gallery", elem_id="chips",
                                    container=False)
        self.question = gr.Textbox(show_label=False, label="질문", lines=1, max_lines=4, autofocus=True,
                                   elem_id="talk-question", max_length=guard.MAX_CHARS, submit_btn="보내기",
                                   container=False, placeholder="질문 (Enter 보내기 · Shift+Enter 줄바꿈)")
        self.status = status_line("talk-status")

    def place_settings(self) -> None:
        """접어 둔 설정: 시스템 글과 답을 고르는 칸들."""
        context = self.models.default.answerer.context
        with gr.Accordion("설정", open=False, elem_id="talk-settings"):
            self.system = gr.Textbox(label="시스템 글", info="대화의 맨 앞에 두고 모델이 늘 따르게 할 말이에요",
                                     lines=2, max_lines=6, max_length=guard.MAX_CHARS, elem_id="system")
            with gr.Row():
                self.controls = main_sliders(context, "talk-")
            with gr.Row():
                self.controls += more_settings(context, "talk-")

    def connect(self, page: gr.Blocks, tabs: gr.Tabs, model: gr.Dropdown, other: gr.Dropdown) -> None:
        """칸과 단추를 하는 일에 잇는다."""
        asked = [model, other, self.system, *self.controls]
        self.question.submit(self.send, [self.talk, self.question, *asked], self.shown, **LIVE)
        self.chat.retry(self.retry, [self.talk, *asked], self.shown, **LIVE)
        self.chat.edit(self.edit, [self.talk, *asked], self.shown, **LIVE)
        self.chat.undo(undo, self.talk, self.shown, **LIVE)
        self.chat.like(like, self.talk, [self.talk, self.chat, self.status], **LIVE)
        self.question.stop(self.stop, None, self.question, **LIVE)
        self.fresh.click(self.renew, None, self.shown, **LIVE)
        self.chips.click(lambda row: row[0], self.chips, self.question, **LIVE)
        other.change(columns, other, [self.chat, self.beside], **LIVE)
        model.change(lambda picked: gr.update(label=title_of(picked)), model, self.chat, **LIVE)
        page.load(open_talk, self.talk, [*self.shown, self.system], **LIVE)
        self.reopen.click(open_talk, self.talk, [*self.shown, self.system], js="() => lite.chosen()", **LIVE)
        self.reopen.click(lambda: gr.update(selected="talk"), None, tabs, **LIVE)
        self.talk.change(None, self.talk, js="(talk) => lite.keep(talk)", api_visibility="private")

    async def send(self, request: gr.Request, value, text, *settings):
        async for update in say(self.models, value, None, text or "", settings, request.session_hash):
            yield update

    async def retry(self, event: gr.RetryData, request: gr.Request, value, *settings):
        async for update in say(self.models, value, event.index, None, settings, request.session_hash):
            yield update

    async def edit(self, event: gr.EditData, request: gr.Request, value, *settings):
        """고쳐 쓴 답은 좋은 답으로 남기고, 고쳐 쓴 질문은 다시 묻는다."""
        if is_answer(event.index):
            yield correct(value, event.index, plain(event.value))
            return
        async for update in say(self.models, value, event.index, plain(event.value), settings, request.session_hash):
            yield update

    def renew(self, request: gr.Request):
        self.models.default.answerer.leave(request.session_hash, clear=True)
        return screen(Talk(), question=waiting())

    def stop(self, request: gr.Request):
        self.models.default.answerer.leave(request.session_hash)
        return waiting()


def undo(value):
    """마지막 질문과 답을 빼고, 그 질문을 질문 칸에 되돌려 놓는다."""
    said = reread(value)
    place = said.last_question()
    text = said.said[place].text if said.said else ""
    return screen(said.cut(place), question=gr.update(value=text))


def like(event: gr.LikeData, value):
    return mark(value, event.index, event.liked)


def open_talk(value):
    """저장된 대화를 편다. 답을 받지 못한 마지막 질문은 질문 칸에 되돌려 놓는다."""
    talk = reread(value)
    question = gr.skip()
    if len(talk.said) % 2 and talk.said[-1].text:
        question = gr.update(value=talk.said[-1].text)
        talk = talk.cut(len(talk.said) - 1)
    return *screen(talk, question=question), talk.system or gr.skip()


def columns(picked):
    """나란히 볼 모델을 골랐으면 대화가 두 열이다."""
    side = gr.update(visible=False) if picked == ALONE else gr.update(visible=True, label=title_of(picked))
    return gr.update(show_label=picked != ALONE), side


def pickers(models: Models) -> tuple[gr.Dropdown, gr.Dropdown]:
    """답할 모델과, 나란히 비교할 모델."""
    named = [(title_of(name), name) for name in models.names]
    several = len(models.tuned) > 1 or models.default.answerer.can_compare
    model = gr.Dropdown(named, value=models.default.name, label="답할 모델", elem_id="model", visible=several,
                        min_width=150, filterable=False)
    other = gr.Dropdown([("비교하지 않기", ALONE), *named], value=ALONE, label="나란히 비교", elem_id="other",
                        visible=several, min_width=150, filterable=False)
    return unchecked(model), unchecked(other)  # 있는 이름인지는 Models가 본다


def _chatbot(name: str, **options) -> gr.Chatbot:
    """HTML과 그림을 그리지 않는 Chatbot. 글은 `page_turns.inert`를 지나온다."""
    return gr.Chatbot(elem_id=name, height=HEIGHT, layout="bubble", buttons=["copy"], latex_delimiters=[],
                      sanitize_html=True, allow_tags=False, placeholder="무엇이든 물어보세요", **options)


def chips_of(results: Results) -> list[list[str]]:
    """질문 칸 위에 보일 예시 질문들."""
    return [[filled(Turn("user", question, input=context))[0]] for question, context in results.examples]
