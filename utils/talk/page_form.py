"""한 번 묻기 탭: Instruction과 Input을 적고 답 하나를 받는다. 비교하면 두 모델이 차례로 답한다."""

from collections.abc import Sequence

import gradio as gr

from utils.errors import UsageError
from utils.talk import guard
from utils.talk.answerer import Answer, describe
from utils.talk.models import Models
from utils.talk.page_learned import Results
from utils.talk.page_reply import EMPTY, LIVE, alert, compared, submit, title_of, told
from utils.talk.page_settings import main_sliders, more_settings, read_sampling, status_line
from utils.turns import find_placeholder

NO_INPUT = "Input이 비어 있어 {0} 자리가 글자 그대로 전해졌어요"


def form_tab(models: Models, results: Results, model: gr.Dropdown, other: gr.Dropdown) -> None:
    """지금 만드는 탭에 칸과 일을 놓는다. `model`과 `other`는 페이지 위의 고르는 칸이다."""
    context = models.default.answerer.context
    with gr.Row(elem_id="form-row"):
        with gr.Column(scale=3, min_width=280):
            instruction = gr.Textbox(label="Instruction", lines=4, max_lines=12, max_length=guard.MAX_CHARS,
                                     elem_id="instruction",
                                     placeholder="질문을 적어 주세요. {x}처럼 적은 자리에는 Input이 들어가요")
            input = gr.Textbox(label="Input", lines=2, max_lines=8, max_length=guard.MAX_CHARS, elem_id="input",
                               placeholder="없어도 돼요")
            with gr.Row(elem_id="buttons"):
                send = gr.Button("보내기", variant="primary", elem_id="submit", min_width=90)
                compare = gr.Button("비교하기", elem_id="compare", min_width=90, visible=model.visible)
                stop = gr.Button("멈추기", variant="stop", elem_id="stop", min_width=90, visible=False)
                clear = gr.Button("지우기", elem_id="clear", min_width=90)
        with gr.Column(scale=2, min_width=280, elem_id="form-settings"):
            controls = main_sliders(context)
            with gr.Accordion("더 많은 설정", open=False, elem_id="more"):
                controls += more_settings(context)
    with gr.Row(equal_height=True):
        with gr.Column(min_width=280):
            output, status = _output("Output", "output", "status")
        with gr.Column(min_width=280, visible=False) as beside:
            base_output, base_status = _output("Output", "base-output", "base-status")
    examples = gr.Dataset(components=[instruction, input], samples=[list(example) for example in results.examples],
                          label="예시 질문", elem_id="examples", headers=["Instruction", "Input"])

    asked = [instruction, input, *controls, model, other]
    shown = [output, status, beside, base_output, base_status, send, stop]

    async def answer(request: gr.Request, *values):
        async for update in _ask(models, False, values, request.session_hash):
            yield update

    async def answer_both(request: gr.Request, *values):
        async for update in _ask(models, True, values, request.session_hash):
            yield update

    def leave(request: gr.Request):
        models.default.answerer.leave(request.session_hash)
        return _swap(False)

    def clear_all(request: gr.Request):
        models.default.answerer.leave(request.session_hash, clear=True)
        return "", "", *_shown()

    for button, respond in ((send.click, answer), (instruction.submit, answer), (compare.click, answer_both)):
        event = button(respond, asked, shown, **LIVE)
        event.then(None, [instruction, input, output, status, base_output], js="(...row) => lite.remember(...row)",
                   api_visibility="private")
    examples.click(lambda row: row, examples, [instruction, input], **LIVE)
    stop.click(leave, None, [send, stop], **LIVE)
    clear.click(clear_all, None, [instruction, input, *shown], **LIVE)


async def _ask(models: Models, both: bool, values: Sequence, session: str):
    """질문을 줄에 세우고, 답이 자라는 대로 화면의 값을 내놓는다. 비교하면 같은 시드로 잇달아 답한다."""
    instruction, input, *numbers, name, other = values
    try:
        instruction, input = instruction or "", input or ""  # 손대지 않은 칸은 None이다
        guard.check_text(Instruction=instruction, Input=input)
        if not instruction.strip():
            raise UsageError(EMPTY)
        sampling = read_sampling(numbers)
        picked = compared(models, name, other) if both else [models.choose(name)]
        answers = [Answer(choice.answerer.ask(instruction, input), sampling, choice.tuned, session=session)
                   for choice in picked]
        submit(picked, answers)
    except UsageError as error:
        yield _shown(status=alert(told(error)))
        return
    slot = find_placeholder(instruction)
    note = f"{NO_INPUT.format(slot)} · " if slot and not input else ""
    titles = [title_of(choice.name) for choice in picked]
    first, last = answers[0], answers[-1]
    async for ahead in picked[0].answerer.follow(*answers):
        ends = [answer.text.rstrip() if answer.finish_reason else answer.text for answer in answers]
        waits = f"{titles[0]} 모델이 먼저 답하는 중" if not first.finish_reason else describe(last, ahead)
        yield _shown(gr.update(value=ends[0], label=titles[0]), note + describe(first, ahead), both,
                     gr.update(value=ends[-1], label=titles[-1]) if both else "", waits if both else "",
                     busy=not last.finish_reason)
    if first.cleared:  # Gradio는 이벤트가 끝날 때 마지막 값을 다시 보낸다. 그 값이 비어 있어야 글이 되살아나지 않는다
        yield _shown()


def _shown(text="", status="", both: bool = False, base_text="", base_status: str = "", busy: bool = False) -> tuple:
    """화면에 보이는 값들. `both`면 옆의 답도 보인다."""
    status = gr.update(value=status, elem_classes="status") if isinstance(status, str) else status
    return text, status, gr.update(visible=both), base_text, base_status, *_swap(busy)


def _swap(busy: bool) -> tuple[dict, dict]:
    """답하는 동안에는 보내기 자리에 멈추기가 선다."""
    return gr.update(visible=not busy), gr.update(visible=busy)


def _output(label: str, output_id: str, status_id: str) -> tuple[gr.Textbox, gr.Textbox]:
    return (gr.Textbox(label=label, lines=11, max_lines=11, interactive=False, buttons=["copy"], elem_id=output_id),
            status_line(status_id))
