"""브라우저가 들고 있는 대화를 다시 보고, 고치고, 글자 그대로 보이게 하는 규칙."""

import pytest

from utils.errors import UsageError
from utils.talk.page_settings import read_sampling
from utils.talk.page_turns import MAX_TALK, Said, Talk, inert, plain, read_talk, shorten

pytestmark = pytest.mark.quick


def talk(*texts: str, system: str = "") -> Talk:
    return Talk("abc", system, "run", [Said("assistant" if place % 2 else "user", text)
                                       for place, text in enumerate(texts)])


def test_talk_survives_the_browser():
    kept = talk("질문", "답", system="짧게")
    kept.said[1].good, kept.said[1].draft = True, "처음의 답"
    assert read_talk(kept.to_json()) == kept
    assert read_talk(None) == Talk()


@pytest.mark.parametrize("value", [
    [], "글", {"said": 3}, {"said": [{"role": "user"}]}, {"said": [{"role": "assistant", "text": "답"}]},
    {"said": [{"role": "user", "text": 1}]}, {"said": [{"role": "user", "text": "가", "good": "예"}]}, {"모름": 1},
    {"id": "가" * 65}, {"system": "가" * 9000}, {"said": [{"role": "user", "text": "가" * (MAX_TALK + 1)}]}])
def test_strange_talks_are_refused(value):
    with pytest.raises(UsageError):
        read_talk(value)


def test_other_model_reads_its_own_answers():
    kept = talk("질문", "왼쪽 답", "둘째")
    kept.said[1].other = "오른쪽 답"
    assert [turn.text for turn in kept.turns()] == ["질문", "왼쪽 답", "둘째"]
    assert [turn.text for turn in kept.turns(other=True)] == ["질문", "오른쪽 답", "둘째"]


@pytest.mark.parametrize("other, shown", [(None, "왼쪽 답"), ("", "(빈 답)"), ("오른쪽 답", "오른쪽 답")])
def test_an_empty_answer_of_the_other_model_is_shown_empty(other, shown):
    """기반 모델이 한 글자도 답하지 않았을 때 학습한 모델의 답이 그 자리에 보였다."""
    kept = talk("질문", "왼쪽 답")
    kept.said[1].other = other
    assert read_talk(kept.to_json()) == kept
    assert kept.shown(other=True)[1]["content"][0]["text"] == shown
    assert kept.shown()[1]["content"][0]["text"] == "왼쪽 답"


def test_long_talks_lose_their_oldest_pair_and_keep_the_system():
    turns = talk("하나", "답", "둘", "답", "셋", system="짧게").turns()
    shorter = shorten(turns)
    assert [turn.text for turn in shorter] == ["짧게", "둘", "답", "셋"]
    assert [turn.text for turn in shorten(shorter)] == ["짧게", "셋"]
    assert shorten(shorten(shorter)) == []


@pytest.mark.parametrize("text", ["<b>가</b>", "![가](나)", "```mermaid\n가\n```", "a < b", "<!-- 가 -->", "가나다"])
def test_inert_text_is_the_same_text(text):
    shown = inert(text)
    assert plain(shown) == text
    assert plain([{"type": "text", "text": shown}]) == text
    assert not any(live in shown for live in ("<b", "</", "<!", "![", "```mermaid"))


def test_empty_seed_is_drawn_and_wrong_ones_are_refused():
    values = [0.7, 0.9, 40, 16, 1.0, 0]
    assert read_sampling([*values, ""]).seed != read_sampling([*values, None]).seed
    assert read_sampling([*values, " 7 "]).seed == 7
    for seed in ("-1", "하나", "1.5", "9" * 30, True, [1]):
        with pytest.raises(UsageError):
            read_sampling([*values, seed])


@pytest.mark.parametrize(("place", "value", "label"), [(0, 99, "Temperature"), (1, 0, "Top p"), (3, "셋", "Max tokens"),
                                                       (5, None, "n-gram")])
def test_a_setting_out_of_its_bounds_is_named_as_the_page_names_it(place, value, label):
    values = [0.7, 0.9, 40, 16, 1.0, 0, ""]
    values[place] = value
    with pytest.raises(UsageError, match=f"{label}.*적어 주세요"):
        read_sampling(values)
