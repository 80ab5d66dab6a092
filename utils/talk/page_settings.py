"""탭들이 함께 쓰는 칸: 답을 고르는 슬라이더와 시드, 상태 한 줄."""

import secrets
from collections.abc import Sequence

import gradio as gr

from utils.errors import UsageError
from utils.sampling import Sampling
from utils.talk import guard

_MAIN = (("Temperature", "temperature", 0.05), ("Top p", "top_p", 0.01), ("Top k", "top_k", 1),
         ("Max tokens", "max_new_tokens", 1))
_MORE = (("반복 페널티", "repetition_penalty", 0.05),
         ("n-gram 반복 금지 (0이면 끔)", "no_repeat_ngram_size", 1))


def main_sliders(context: int, prefix: str = "") -> list[gr.Slider]:
    """늘 쓰는 슬라이더 넷. `context`는 모델이 읽을 수 있는 길이(토큰)다."""
    return [_slider(*parts, prefix, context) for parts in _MAIN]


def more_settings(context: int, prefix: str = "") -> list[gr.components.Component]:
    """가끔 쓰는 슬라이더 둘과 시드."""
    seed = gr.Textbox(label="시드", info="비우면 물을 때마다 다르게 답해요", elem_id=f"{prefix}seed", max_length=16)
    return [*(_slider(*parts, prefix, context) for parts in _MORE), seed]


def read_sampling(values: Sequence[object]) -> Sampling:
    """칸들의 값을 서버에서 다시 본다. 시드를 비웠으면 하나 뽑아, 비교하는 모델들이 같은 시드로 답하게 한다.

    Args:
        values: `main_sliders`와 `more_settings`의 차례대로.

    Raises:
        UsageError: 값이 범위를 벗어났거나 시드가 수가 아니다.
    """
    *numbers, seed = values
    seed = seed.strip() if isinstance(seed, str) else seed
    if seed in (None, ""):
        seed = secrets.randbits(32)
    elif isinstance(seed, str):
        if not seed.isdecimal():
            raise UsageError(f"시드에는 0 이상의 정수를 적어 주세요. 받은 값: {seed[:40]}")
        seed = int(seed)
    settings = {name: value for (_, name, _), value in zip((*_MAIN, *_MORE), numbers, strict=True)}
    for label, name, _ in (*_MAIN, *_MORE):
        low, high, _ = guard.BOUNDS[name]
        try:
            guard.bounded_sampling(**{name: settings[name]})
        except UsageError:
            raise UsageError(f"{label} 칸에는 {low:g}에서 {high:g} 사이의 수를 적어 주세요. "
                             f"받은 값: {str(settings[name])[:40]}") from None
    return guard.bounded_sampling(seed=seed, **settings)


def _slider(label: str, name: str, step: float, prefix: str, context: int) -> gr.Slider:
    low, high, _ = guard.BOUNDS[name]
    if name == "max_new_tokens":
        high = min(high, context)
    usual = min(getattr(Sampling(), name), high)
    element = prefix + name.replace("_", "-")
    return unchecked(gr.Slider(low, high, value=usual, step=step, label=label, elem_id=element))


def unchecked(component: gr.components.Component) -> gr.components.Component:
    """값을 보낸 그대로 받는 칸. 값은 받는 쪽이 다시 보고, Gradio의 영어 오류 대신 한국어 한 줄을 보인다."""
    component.preprocess = lambda sent: sent
    return component


def status_line(name: str, max_lines: int | None = 3) -> gr.Textbox:
    """답이나 학습의 상태를 보이는 한 줄. 길면 `max_lines`줄까지 늘고, None이면 Gradio가 정한다. `name`은 elem_id다."""
    return gr.Textbox(show_label=False, label="상태", lines=1, max_lines=max_lines, interactive=False,
                      container=False, elem_id=name, elem_classes="status")
