"""성적표: 보기를 하나씩 따로 잰 transformers의 로그 가능도로 고른 것과 같고, 토큰은 학습과 같다."""

import json
import math
import queue

import pytest
import torch
from conftest import pieces_of
from tiny import add_head
from transformers import AutoModelForCausalLM

from utils import console
from utils.data.encoder import Encoder
from utils.data.exams import Exam, Item, load_exams
from utils.decode import likelihood, scorecard
from utils.decode.scorecard import Score
from utils.model.tokenizer import end_token_id, load_tokenizer
from utils.prompter import Prompter

pytestmark = pytest.mark.quick
CONTEXT = 56


@pytest.fixture(scope="module")
def tokenizer(tiny_neox):
    return load_tokenizer(str(tiny_neox))


@pytest.fixture(scope="module")
def models(tiny_neox) -> dict:
    """이름 -> 모델. 둘째는 출력 행렬이 달라 다른 보기를 고른다."""
    found = {}
    for name, seed in (("base", 0), ("tuned", 1)):
        model = AutoModelForCausalLM.from_pretrained(tiny_neox, dtype=torch.float32).eval()
        torch.manual_seed(seed)
        model.get_output_embeddings().weight.data.normal_(0, 0.3)
        found[name] = model
    return found


@pytest.fixture(scope="module")
def exams(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("exams")
    rows = {
        "copa": [{"premise": f"물이 {n}도에서 끓었다.", "question": ("원인", "결과")[n % 2],
                  "alternative_1": f"{n}에 {n}을 더했다.", "alternative_2": "한글을 만들었다.", "label": n % 2}
                 for n in range(12)],
        "hellaswag": [{"context": f"{n}에 3을 더하면", **{f"ending_{k}": f"{n * k}입니다." * k for k in range(1, 5)},
                       "label": n % 4} for n in range(12)],
        "boolq": [{"paragraph": f"높은 산에서는 물이 {n}도에서 끓습니다. " * 3, "question": "끓나요?", "label": n % 2}
                  for n in range(12)],
    }
    for name, part in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in part]
        (folder / f"{name}-test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def asker(models: dict):
    return lambda name, pairs, told: likelihood.measure(models[name], pairs, told=told)


def totals(model, tokenizer, item: Item, prompter, text: str) -> list[float]:
    """보기마다 한 번씩 따로 부른 forward로 잰 로그 가능도. 토큰도 여기서 따로 만든다."""
    found = []
    for option in item.options:
        if prompter is None:
            # lm-evaluation-harness: 문맥 끝의 공백을 보기로 옮기고, 이은 글의 토큰을 문맥의 토큰 수에서 가른다
            context = tokenizer(text.rstrip())["input_ids"]
            answer = tokenizer(f"{text} {option}")["input_ids"][len(context):]
        else:
            context = tokenizer(prompter.prompt(text).rstrip(" "))["input_ids"]
            answer = tokenizer(" " + option)["input_ids"]
        whole = (context + answer)[-(CONTEXT + 1):]  # 마지막 토큰은 읽지 않으므로 하나를 더 둔다(lm-evaluation-harness)
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
        at = range(len(whole) - len(answer), len(whole))
        found.append(sum(float(scores[place - 1, whole[place]]) for place in at))
    return found


@pytest.mark.parametrize("prompter", [None, Prompter()], ids=["plain", "template"])
def test_accuracy_is_what_choosing_one_by_one_gives(models, tokenizer, exams, prompter):
    end_id = end_token_id(tokenizer)
    lines = []
    loaded = load_exams(str(exams), prompter)
    scores = scorecard.measure(asker(models), ("base", "tuned"), loaded, Encoder(tokenizer, end_id), end_id, CONTEXT,
                               lines.append)
    assert [score.name for score in scores] == ["boolq", "copa", "hellaswag", "hellaswag_norm"]
    assert len(lines) == 4 and len({score.right["base"] for score in scores}) > 1
    for exam, texts in zip(loaded, load_exams(str(exams), None), strict=True):
        for name, model in models.items():
            each = [totals(model, tokenizer, item, prompter, plain.text)
                    for item, plain in zip(exam.items, texts.items, strict=True)]
            chosen = [values.index(max(values)) for values in each]
            right = sum(pick == item.answer for pick, item in zip(chosen, exam.items, strict=True))
            assert next(score for score in scores if score.name == exam.name).right[name] == right
            if exam.by_length:
                shares = [[value / len(option) for value, option in zip(values, item.options, strict=True)]
                          for values, item in zip(each, exam.items, strict=True)]
                right = sum(part.index(max(part)) == item.answer
                            for part, item in zip(shares, exam.items, strict=True))
                assert scores[-1].right[name] == right


def test_a_row_without_options_is_right_only_to_the_end(models, tokenizer, tmp_path):
    """탐욕적으로 만든 답이 끝 토큰까지 정답인 행만 맞힌 것이다."""
    model, end_id = models["base"], end_token_id(tokenizer)
    prompter, encoder = Prompter(), Encoder(tokenizer, end_id)
    item = Item(("3",), 0, ([pieces_of(prompter, "물은?", "", "3")],))
    (context, answer), = scorecard.encode(item, encoder, end_id)
    assert answer[-1] == end_id
    assert context + answer == encoder.encode_batch([[pieces_of(prompter, "물은?", "", "3")]])[0][0]
    value = likelihood.measure(model, [(context, answer)])[0]
    exam = Exam("x", "x", [item])
    score, = scorecard.measure(asker(models), ("base",), [exam], encoder, end_id, CONTEXT, lambda line: None)
    assert score.right == {"base": int(value.greedy)}


def test_the_text_begins_with_the_head_like_the_harness(tokenizer, tiny_neox):
    headed = add_head(load_tokenizer(tiny_neox))
    item = Item(("가", "나다"), 0, text="물은 ")
    pairs = scorecard.encode(item, Encoder(headed, 2), 2)
    context = headed("물은")["input_ids"]
    assert pairs == [(context, headed(f"물은  {option}")["input_ids"][len(context):]) for option in item.options]
    assert context[0] == 1 != tokenizer("물은")["input_ids"][0]


@pytest.mark.parametrize("question, answer, kept", [(CONTEXT - 1, 2, (CONTEXT - 1, 2)), (CONTEXT, 2, (CONTEXT - 1, 2)),
                                                    (3, CONTEXT, (1, CONTEXT)), (3, CONTEXT + 9, (1, CONTEXT))])
def test_only_what_the_model_cannot_read_is_cut(question, answer, kept):
    """글은 앞에서부터, 정답은 뒤에서부터 자른다. 읽는 것은 마지막 토큰을 뺀 CONTEXT토큰까지다."""
    pair = list(range(question)), list(range(100, 100 + answer))
    asked, answered = scorecard.fitted(pair, CONTEXT)
    assert (len(asked), len(answered)) == kept
    assert asked == pair[0][question - kept[0]:] and answered == pair[1][:kept[1]]


def test_says_how_many_questions_were_cut(models, tokenizer):
    items = [Item(("가", "나"), 0, text=text) for text in ("물은", "물은 높은 산에서 끓는다. " * 20)]
    lines = []
    score, = scorecard.measure(asker(models), ("base",), [Exam("x", "시험", items)], Encoder(tokenizer, 2), 2, CONTEXT,
                               lines.append)
    assert score.cut == 1 and lines[0].endswith("길어서 앞을 자른 문항 1개")


def test_a_long_exam_says_how_far_it_is(models, tokenizer, monkeypatch):
    monkeypatch.setattr(console, "SAY_EVERY", 0.01)
    said, told_lines = queue.Queue(), []

    def ask(name, pairs, told):
        told(len(pairs))
        told_lines.append(said.get(timeout=60))  # 한 줄을 말할 때까지 오래 걸리는 계산
        return likelihood.measure(models["base"], pairs)

    exam = Exam("x", "시험", [Item(("가", "나"), 0, text="물은")])
    scorecard.measure(ask, ("base", "tuned"), [exam], Encoder(tokenizer, 2), 2, CONTEXT, said.put)
    assert told_lines[0].strip() == "시험 보기 2/4개를 쟀다"


def test_standard_error_is_that_of_the_mean():
    right = [1] * 30 + [0] * 70
    mean = sum(right) / 100
    expected = math.sqrt(sum((each - mean) ** 2 for each in right) / 99) / 10
    score = Score("x", "시험", 100, {"base": 30}, 1.0)
    assert score.error("base") == pytest.approx(expected) and score.share("base") == 0.3
    assert score.line() == "시험 100문항(1.0초): 30.0% ±4.6%"
    both = Score("x", "시험", 100, {"base": 30, "tuned": 90}, 1.0)
    assert both.line() == "시험 100문항(1.0초): 기반 모델 30.0% ±4.6%, 학습한 모델 90.0% ±3.0%"
    assert score.as_dict()["accuracy"] == {"base": 0.3}
