"""대화에 답을 더하는 일: 묻고, 자라는 답을 화면의 값으로 바꾸고, 사람이 고친 답과 엄지를 적는다."""

from collections.abc import Sequence

import gradio as gr

from utils.errors import UsageError
from utils.record import MODELS
from utils.sampling import Sampling
from utils.talk import guard
from utils.talk.answerer import Answer, TooLong, describe
from utils.talk.line import Busy
from utils.talk.models import BASE, Choice, Models
from utils.talk.page_settings import read_sampling
from utils.talk.page_turns import Said, Talk, read_talk, shorten

ALONE = ""  # 비교하지 않음
EMPTY = "질문을 적어 주세요"
BUSY = "지금은 바빠요. 기다리는 질문이 많으니 잠시 뒤에 다시 보내 주세요"
GOOD, BAD = "좋은 답으로 남겼어요", "나쁜 답으로 남겼어요"
MARKED = ". '내 기록'에서 학습 데이터로 내려받을 수 있어요"
BETTER, WORSE = (f"{side} 답이 더 낫다고 남겼어요. '내 기록'에서 선호 쌍으로 내려받을 수 있어요"
                 for side in ("이", "옆의"))
SILENT = "모델이 한 글자도 답하지 않았어요. 다시 보내거나 다르게 물어보세요"
LONG = "질문이 너무 길어요. 줄여서 다시 보내 주세요"
LIVE = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}  # 모든 이벤트의 설정


def title_of(name: str) -> str:
    """사람에게 보일 모델의 이름."""
    return MODELS[0].title if name == BASE else name


def told(error: UsageError) -> str:
    """묻지 못한 이유를 페이지의 말로."""
    return BUSY if isinstance(error, Busy) else LONG if isinstance(error, TooLong) else str(error)


async def say(models: Models, value, index: int | None, text: str | None, settings: Sequence, session: str):
    """대화에 질문을 더하거나(`index`가 None) `index`번째 질문을 고쳐 묻고, 답이 자라는 대로 화면을 내놓는다."""
    try:
        names, system, sampling = settings[:2], settings[2] or "", read_sampling(settings[3:])
        talk = read_talk(value)
        place = len(talk.said) if index is None else _question_before(talk, index)
        text = talk.said[place].text if text is None else text
        guard.check_text(질문=text, 시스템=system)
        if not text.strip():
            raise UsageError(EMPTY)
        picked = compared(models, *names) if names[1] != ALONE else [models.choose(names[0])]
        disliked = _disliked(talk, place, text)
        talk = talk.cut(place)
        talk.system, talk.model = system, " / ".join(choice.name for choice in picked)
        talk.said += [Said("user", text)]
        answers, cut = _answers(picked, talk, sampling, session)
        submit(picked, answers)
    except UsageError as error:
        kept = gr.update(value=text) if index is None else gr.skip()
        yield screen(None, status=alert(told(error)), question=kept)
        return
    answer, note = answers[0], f"앞의 대화 {cut}번은 길어서 빼고 물었어요 · " if cut else ""
    talk.said += [Said("assistant", "", draft=disliked)]
    first = True
    async for ahead in picked[0].answerer.follow(*answers):
        _fill(talk, answers)
        shown = _summary(picked, answers, ahead)
        kept = talk.cut(len(talk.said) - 1).to_json() if first else gr.skip()
        yield screen(talk, note + shown, answering() if first else gr.skip(), keep=kept)
        first = False
    if answer.cleared:  # Gradio는 이벤트가 끝날 때 마지막 값을 다시 보낸다. 그 값이 비어 있어야 글이 되살아나지 않는다
        yield screen(Talk(), question=waiting())
        return
    _fill(talk, answers, done=True)
    if talk.said[-1].text:
        yield screen(talk, note + _summary(picked, answers), waiting())
    else:  # 한 글자도 나오지 않았으면 질문을 되돌려 놓는다
        told_empty = f"{SILENT} · " if answer.finish_reason == "stop" else ""
        yield screen(talk.cut(place), alert(told_empty + describe(answer)), {**waiting(), "value": text})


def _disliked(talk: Talk, place: int, text: str) -> str:
    """같은 질문을 다시 물을 때, 나쁘다고 표시한 앞의 답. 새 답이 좋으면 둘이 선호 쌍이 된다. 없으면 빈 글이다."""
    before = talk.said[place : place + 2]
    again = len(before) == 2 and before[0].text == text
    return before[1].text if again and before[1].good is False else ""


def compared(models: Models, name: object, other: object) -> list[Choice]:
    """나란히 답할 두 모델. 비교할 모델을 고르지 않았으면 기반 모델이나 다른 어댑터와 비교한다."""
    first = models.choose(name)
    if other == ALONE or other == first.name:
        other = next((each for each in reversed(models.names) if each != first.name), first.name)
    return [first, models.choose(other)]


def submit(picked: Sequence[Choice], answers: Sequence[Answer]) -> None:
    """모델마다의 답을 함께 줄에 세운다. 잇달아 만든다."""
    picked[0].answerer.line.submit(*(choice.answerer.task(answer)
                                     for choice, answer in zip(picked, answers, strict=True)))


def _answers(picked: Sequence[Choice], talk: Talk, sampling: Sampling, session: str) -> tuple[list[Answer], int]:
    """(모델마다 만들 답, 길어서 뺀 질문의 수). 모델들은 같은 시드로 답한다.

    Raises:
        UsageError: 템플릿이 이 대화를 적지 못하거나, 마지막 질문 하나도 너무 길다.
    """
    answers, most = [], 0
    for side, choice in enumerate(picked):
        turns, cut = talk.turns(other=side > 0), 0
        while True:
            try:
                input_ids = choice.answerer.ask_talk(turns)
                break
            except TooLong:
                shorter = shorten(turns)
                if not shorter:
                    raise
                turns, cut = shorter, cut + 1
        answers.append(Answer(input_ids, sampling, choice.tuned, session=session))
        most = max(most, cut)
    return answers, most


def _fill(talk: Talk, answers: Sequence[Answer], done: bool = False) -> None:
    """지금까지 나온 글을 대화의 마지막 답에 적는다. 다 되었으면 끝의 줄바꿈을 떼고, 아직 비었으면 줄임표를 둔다."""
    texts = [answer.text.rstrip() if done else answer.text or "…" for answer in answers]
    last = talk.said[-1]
    last.text = texts[0]
    last.other = texts[1] if len(texts) > 1 else None


def _summary(picked: Sequence[Choice], answers: Sequence[Answer], ahead: int = 0) -> str:
    """답 밑에 보일 한 줄. 비교하면 먼저 답할 모델이 다 한 뒤에 다음 모델이 이어진다."""
    if len(answers) == 1:
        return describe(answers[0], ahead)
    return " ｜ ".join(f"{title_of(choice.name)}: {describe(answer, ahead)}"
                      for choice, answer in zip(picked, answers, strict=True))


def _question_before(talk: Talk, index: object) -> int:
    """`index`번째 말이거나 바로 그 앞인 질문의 자리."""
    if not isinstance(index, int) or not 0 <= index < len(talk.said):
        raise UsageError("고칠 말을 찾지 못했어요. 페이지를 새로 열어 주세요")
    return index - index % 2


def is_answer(index: object) -> bool:
    """대화의 `index`번째 말이 답인지. 질문과 답이 번갈아 있다."""
    return isinstance(index, int) and index % 2 == 1


def correct(value, index: int, text: str) -> tuple:
    """사람이 고쳐 쓴 답을 좋은 답으로 남긴다. 모델이 처음에 한 답도 비교할 수 있게 함께 남긴다."""
    talk = reread(value)
    if index >= len(talk.said) or not text.strip() or len(text) > guard.MAX_CHARS:
        return screen(talk, alert("고친 답이 비었거나 너무 길어요"))
    said = talk.said[index]
    if text != said.text:
        said.draft = said.draft or said.text
        said.text = text
        said.good = True
    return screen(talk, "고친 답을 남겼어요" + MARKED)


def mark(value, index: object, liked: object) -> tuple:
    """엄지를 답에 적는다. 다시 누르면(`liked`가 빈 글) 지운다."""
    talk = reread(value)
    if not isinstance(index, int) or not 0 <= index < len(talk.said):
        return gr.skip(), gr.skip(), gr.skip()
    said = talk.said[index]
    said.good = liked if isinstance(liked, bool) else None
    better = BETTER if said.other or said.draft else GOOD + MARKED
    worse = WORSE if said.other else BAD
    told = {True: better, False: worse, None: "표시를 지웠어요"}[said.good]
    return talk.to_json(), gr.update(feedback_value=talk.marks()), told


def reread(value) -> Talk:
    """화면에 펼 대화. 읽을 수 없으면 빈 대화다."""
    try:
        return read_talk(value)
    except UsageError:
        return Talk()


def screen(talk: Talk | None, status="", question=None, keep=None) -> tuple:
    """(브라우저에 남길 대화, 두 Chatbot, 질문 칸, 상태). `talk`가 None이면 대화는 그대로 둔다."""
    question = gr.skip() if question is None else question
    status = gr.update(value=status, elem_classes="status") if isinstance(status, str) else status
    if talk is None:
        return gr.skip(), gr.skip(), gr.skip(), question, status
    kept = talk.to_json() if keep is None else keep
    shown = gr.update(value=talk.shown(), feedback_value=talk.marks())
    return kept, shown, talk.shown(other=True), question, status


def alert(text: str) -> dict:
    return gr.update(value=text, elem_classes="status notice")


def answering() -> dict:
    return gr.update(value="", submit_btn=False, stop_btn="멈추기")


def waiting() -> dict:
    return gr.update(submit_btn="보내기", stop_btn=False)
