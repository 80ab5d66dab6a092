"""템플릿은 질문을 글자 하나 바꾸지 않고 글로 만들고, 그 글은 다시 질문과 답으로 나뉜다."""

import json
import re

import pytest
from conftest import ROOT, pieces_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from utils.chat import ChatPrompter
from utils.errors import UsageError
from utils.prompter import TEMPLATES, Prompter, make_prompter, unwrap
from utils.turns import Turn, fill_placeholder, shift_space

pytestmark = pytest.mark.quick

NAMES = sorted(file.stem for file in TEMPLATES.glob("*.json"))
GOOD = {"name": "n", "prompt_no_input": "Q: {instruction}\nA: ", "prompt_input": "Q: {instruction}\nI: {input}\nA: ",
        "answer_marker": "\nA:"}


def fuzz(n: int):
    return settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_template_follows_the_schema(name):
    prompter = Prompter(name)
    assert prompter.name == name
    assert set(prompter.template) == {"name", "description", "prompt_no_input", "prompt_input", "answer_marker"}
    assert f"`{name}`" in (TEMPLATES / "README.md").read_text(encoding="utf-8")


def test_readme_names_every_key():
    schema = (TEMPLATES / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{key}` |" in schema for key in Prompter().template)


def test_default_template_renders_the_shipped_text_form():
    texts = [json.loads(line)["text"] for line in
             (ROOT / "ko-datasets" / "polyglot-ko-lite_textonly.json").read_text(encoding="utf-8").splitlines()]
    columns = [json.loads(line) for line in
               (ROOT / "ko-datasets" / "polyglot-ko-lite.json").read_text(encoding="utf-8").splitlines()]
    prompter = Prompter()
    for text, row in zip(texts, columns, strict=True):
        assert prompter.prompt(row["instruction"], row["input"]) + row["output"] + "<|endoftext|>" == text
        assert prompter.split(text.removesuffix("<|endoftext|>")) == pieces_of(prompter, *(
            row[key] for key in ("instruction", "input", "output")))


@pytest.mark.parametrize("instruction, given_input, question", [
    ("{x}가 뭐지?", "AI", "AI가 뭐지?"), ("{}와 {y}", "나", "나와 나"), ("{x}", r"\1 {y} \g<0>", r"\1 {y} \g<0>"),
    ("{x}가 뭐지?", "", "{x}가 뭐지?"), ("{instruction}?", "{input}", "{input}?"),
])
def test_placeholder_is_filled_literally(instruction, given_input, question):
    assert Prompter().prompt(instruction, given_input) == f"### 질문: {question}\n\n### 답변: "


def test_input_without_a_placeholder_is_kept():
    assert Prompter().prompt("요약해 줘", "긴 글") == "### 질문: 요약해 줘\n\n### 맥락: 긴 글\n\n### 답변: "


@pytest.mark.parametrize("answer", ["짧다", "### 1. 개요\n\n### 답변: 다시", "  앞 공백", "", "{instruction}"])
@pytest.mark.parametrize("name", NAMES)
def test_text_is_split_at_the_first_marker(name, answer):
    prompter = Prompter(name)
    assert prompter.split(prompter.prompt("질문\n\n빈 줄") + answer) == pieces_of(prompter, "질문\n\n빈 줄", "", answer)


@pytest.mark.parametrize("context", ["", "딸린\n\n글"])
@pytest.mark.parametrize("answer", ["짧다", "### 1. 개요\n\n### 답변: 다시\n\n### 맥락: 끝", ""])
@pytest.mark.parametrize("name", NAMES)
def test_a_rendered_text_is_unwrapped_into_its_turns(name, answer, context):
    text = Prompter(name).prompt("질문\n\n빈 줄", context) + answer
    assert unwrap(text) == [Turn("user", "질문\n\n빈 줄", input=context), Turn("assistant", answer)]


def test_other_texts_are_not_unwrapped():
    assert unwrap("그냥 글\n\n### 답변: 답") is None and unwrap("### 질문: 가") is None


def test_text_without_the_marker_is_not_split():
    assert Prompter().split("그냥 글") is None


@given(instruction=st.text(max_size=40), context=st.text(max_size=20), answer=st.text(max_size=40),
       name=st.sampled_from(NAMES))
@fuzz(600)
def test_pieces_join_into_the_rendered_text_and_split_gives_them_back(instruction, context, answer, name):
    prompter = Prompter(name)
    prompt, rest = pieces_of(prompter, instruction, context, answer)
    text = prompter.prompt(instruction, context) + answer
    assert prompt + rest == text and not prompt.endswith(" ")
    assert instruction in prompt or "{" in instruction
    assume(prompter.answer_marker not in instruction + context and not re.search(r"\{.*\}", instruction, re.DOTALL))
    assert prompter.split(text) == (prompt, rest)


@given(instruction=st.text(alphabet="가나{}\\$1 ", max_size=12), given_input=st.text(alphabet="다{}\\g<0>", max_size=8))
@fuzz(400)
def test_filling_never_fails_and_keeps_the_rest(instruction, given_input):
    filled = fill_placeholder(instruction, given_input)
    assert filled == given_input.join(re.split(r"\{[^{}]*\}", instruction))


@given(prompt=st.text(max_size=9), answer=st.text(max_size=9))
@fuzz(200)
def test_shifting_the_space_keeps_the_text(prompt, answer):
    assert "".join(shift_space(prompt, answer)) == prompt + answer


@pytest.mark.parametrize("change", [
    {"name": None}, {"name": 3}, {"prompt_no_input": "Q\nA: "}, {"prompt_input": "Q: {instruction}\nA: "},
    {"prompt_no_input": "Q: {instruction} {input}\nA: "}, {"answer_marker": ""}, {"answer_marker": "  "},
    {"answer_marker": "\nB:"}, {"prompt_input": ["{instruction}"]}, {"prompt_no_input": "Q: {instruction}\nA: 끝"},
])
def test_bad_template_is_refused(change):
    with pytest.raises(UsageError, match="템플릿"):
        Prompter({**GOOD, **change})
    with pytest.raises(UsageError, match="템플릿"):
        Prompter({key: value for key, value in GOOD.items() if key not in change})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b'"x"', b"null", "{}".encode("utf-16"), b"\xff\xfe\xff"])
def test_broken_template_file_is_refused(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="템플릿"):
        make_prompter(str(path))


def test_unknown_template_names_the_known_ones():
    with pytest.raises(UsageError, match="instruction-output.*chat"):
        make_prompter("none")


def test_chat_needs_a_tokenizer_that_can_talk(tiny_neox):
    from utils.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_neox)
    with pytest.raises(UsageError, match="default"):
        make_prompter("chat", tokenizer)
    tokenizer.chat_template = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")
    prompter = make_prompter({"name": "chat"}, tokenizer)
    assert isinstance(prompter, ChatPrompter)
    talk = [Turn("user", "{x}는?", input="나"), Turn("assistant", "답")]
    assert prompter.talk(talk) == [[("<user>나는?</user><assistant>", "답")]]
    assert prompter.prompt("요약", "글") == "<user>요약\n\n글</user><assistant>"


@pytest.mark.parametrize("template", ["{{ raise_exception('system이 있어야 한다\n둘째 줄') }}", "{{ a.b.c }}", "{% if"])
def test_a_chat_template_that_raises_is_one_line(tiny_neox, template):
    from utils.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_neox)
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match="--prompt_template default") as error:
        make_prompter("chat", tokenizer).prompt("가?")
    assert "\n" not in str(error.value)


values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=12) | st.sampled_from(
    [*GOOD.values(), "{instruction}", "{input}", "{instruction}{input}\nA:"]),
    lambda each: st.lists(each, max_size=2) | st.dictionaries(st.text(max_size=3), each, max_size=2), max_leaves=4)


@given(content=st.dictionaries(st.sampled_from([*GOOD, "x"]), values, max_size=5).map(
    lambda some: {**GOOD, **some}) | values, cut=st.integers(0, 400), use_cut=st.booleans())
@fuzz(1500)
def test_any_template_file_is_used_or_refused(tmp_path_factory, content, cut, use_cut):
    path = tmp_path_factory.getbasetemp() / "fuzz-template.json"
    text = json.dumps(content)
    path.write_text(text[:cut] if use_cut else text, encoding="utf-8")
    try:
        prompter = Prompter(str(path))
    except UsageError as error:
        assert "템플릿" in str(error)
    else:
        assert prompter.prompt("가", "나").count("나") == 1
