"""배움의 지표는 알려진 값과 같고, 검증 질문은 학습이 떼어 둔 바로 그 행이다."""

import csv
import io
import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from utils import record
from utils.decode.decoder import Decoder
from utils.errors import UsageError
from utils.model import adapter, loader
from utils.model.tokenizer import end_token_id, load_tokenizer
from utils.prompter import Prompter
from utils.sampling import Sampling
from utils.talk import scorecards, scores
from utils.talk.answerer import Answer, Answerer

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("hypothesis, reference, expected", [
    ("고양이가 매트 위에 앉아 있다.", "고양이가 매트 위에 앉아 있다.", 100.0),
    ("", "무엇이든", 0.0),
    ("abc", "하나도 같지 않다", 0.0),
    ("딥러닝은 인공 신경망을 쓰는 기계 학습이다.",
     "딥러닝은 여러 층의 인공 신경망으로 배우는 기계 학습의 한 갈래입니다.", 26.9861),
    ("하늘은 파랗다", "하늘이 파란 원인은 빛의 산란 때문입니다", 6.8394),
    ("the cat sat on the mat", "the cat is on the mat", 64.5779),
    ("가나", "가나다라마바사아자차", 18.7166),
])
def test_chrf_matches_sacrebleu(hypothesis, reference, expected):
    assert scores.chrf(hypothesis, reference) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("text, share", [("한글만 있다", 1.0), ("", 0.0), ("ab가나", 0.5), ("ㅋㅋ12", 0.5)])
def test_hangul_share(text, share):
    assert scores.hangul_share(text) == share


def test_repetition_counts_repeated_four_grams():
    assert scores.repetition([1, 2, 3]) == 0
    assert scores.repetition(list(range(50))) == 0
    assert scores.repetition([7] * 103) == pytest.approx(0.99)


def test_echo_is_the_longest_copied_part_of_the_question():
    assert scores.echo("하늘은 왜 파란색이야? 하늘은 왜", "하늘은 왜 파란색이야?") == 1
    assert scores.echo("빛이 흩어지기 때문이다", "") == 0
    assert scores.echo("가나다 xyz", "가나다라마바") == pytest.approx(0.5)


@pytest.fixture(scope="module")
def answerer(talk_run):
    config = adapter.read_adapter_config(talk_run)
    base = config["base_model_name_or_path"]
    tokenizer = load_tokenizer(base)
    model = adapter.load_adapter(loader.load_base(base, loader.choose_device()), talk_run)
    end_id = end_token_id(tokenizer)
    return Answerer(Decoder(model, tokenizer, (end_id,)), tokenizer, Prompter(), end_id, print, can_compare=True)


def test_validation_questions_are_the_held_out_rows(answerer, talk_run):
    validation = scores.load_validation(talk_run, answerer)
    assert 1 <= len(validation.questions) < 40 and not validation.changed
    for question in validation.questions:
        number = question.text.split()[0]
        assert question.text == f"{number} 더하기 {number}는?"
        double = 2 * int(number)
        assert question.reference == f"{number}에 {number}를 더하면 {double}입니다. {number}의 두 배와 같습니다."
        assert question.input_ids == answerer.ask(question.text)


def test_changed_data_is_seen_by_its_content(answerer, talk_run, tmp_path):
    """행의 수가 그대로여도 글이 한 자 바뀌면 안다."""
    run = record.read_run(talk_run)
    text = Path(run["settings"]["data_path"]).read_text(encoding="utf-8")
    for name, content in (("same", text), ("other", text.replace("더하면", "보태면", 1))):
        folder, data = tmp_path / name, tmp_path / f"{name}{Path(run['settings']['data_path']).suffix}"
        folder.mkdir()
        data.write_text(content, encoding="utf-8")
        record.write_run(folder, {**run, "settings": {**run["settings"], "data_path": str(data)},
                                  "data": {**run["data"], "sha256": sha256(text.encode()).hexdigest()}})
        assert scores.load_validation(folder, answerer).changed is (name == "other")


def test_a_run_without_its_settings_is_named(answerer, talk_run, tmp_path):
    record.write_run(tmp_path, {"history": record.read_run(talk_run)["history"]})
    with pytest.raises(UsageError, match=r"run\.json에 학습의 설정"):
        scores.load_validation(tmp_path, answerer)


def test_evaluate_gives_scores_and_a_csv_that_reads_back(answerer, talk_run):
    questions = scores.load_validation(talk_run, answerer).questions[:2]
    rows = list(scores.evaluate(answerer, questions))
    assert rows[0].answers["base"].text != rows[0].answers["tuned"].text
    text = scores.to_csv(rows)
    assert text.startswith("\ufeff")
    head, *lines = csv.reader(io.StringIO(text.removeprefix("\ufeff")))
    assert len(lines) == 2 and len(head) == len(lines[0]) == 4 + 2 * len(scores.METRICS)
    assert lines[0][2] == rows[0].answers["base"].text
    assert [row[0].split("(")[0].rstrip(" ↑↓") for row in scores.table(rows)] == [
        "스스로 멈춤", "chrF", "한글 비율", "반복", "질문 되풀이"]


def test_scores_stay_between_0_and_100(answerer):
    question = scores.Question("질문", "답", [5])
    for text in ("", "�", "답", "질문 질문 질문", "a" * 500):
        answer = Answer([5], Sampling(), text=text, ids=[1] * len(text), finish_reason="stop")
        assert all(0 <= value <= 100 for value in scores.score(answer, question).values())


def test_scorecard_compares_both_models_and_stays_in_the_run(answerer, talk_run, tmp_path):
    """내 행의 성적표: 두 모델이 같은 문항에서 고른 것이 따로 잰 것과 같고, run.json과 페이지의 표에 남는다."""
    run_dir = tmp_path / "run"
    shutil.copytree(talk_run, run_dir)
    file = tmp_path / "mine.jsonl"
    rows = [{"instruction": f"{n} 더하기 {n}는?", "output": f"{2 * n}입니다.",
             "options": [f"{2 * n}입니다.", f"{2 * n + 1}입니다.", f"{2 * n + 2}입니다."]} for n in range(30)]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    said = []
    (score,) = scorecards.measure(answerer, str(file), run_dir, True, None, said.append)
    for name in ("base", "tuned"):
        right = 0
        for row in rows:
            pairs = []
            for option in row["options"]:
                asked = answerer.ask(row["instruction"])
                pairs.append((asked, answerer.encoder.encode_prompt(" " + option)))
            totals = [answerer.likelihoods(name, [pair])[0].total for pair in pairs]
            right += totals.index(max(totals)) == 0
        assert score.right[name] == right
    assert score.items == 30 and 0 < score.right["base"] + score.right["tuned"] < 60
    assert any("기반 모델" in line and "학습한 모델" in line for line in said)
    assert record.read_run(run_dir)["scorecard"] == [score.as_dict()]
    (shown,) = scorecards.table(record.read_run(run_dir))
    assert shown[:2] == ["mine.jsonl", "30"] and shown[2].startswith(f"{score.share('base'):.1%}")
    scorecards.measure(answerer, str(file), run_dir, True, None, said.append)  # 다시 재면 바뀐다
    assert len(record.read_run(run_dir)["scorecard"]) == 1
    part = tmp_path / "SentiNeg-dev.jsonl"
    part.write_text(json.dumps({"sentence": "좋다", "label": 1}, ensure_ascii=False), encoding="utf-8")
    scorecards.measure(answerer, str(part), run_dir, True, None, said.append)
    assert scorecards.table(record.read_run(run_dir))[1][0] == "KoBEST SentiNeg · SentiNeg-dev.jsonl"


@pytest.mark.parametrize("scorecard", [5, None, [5], [{"x": 1}], [{"name": "copa", "title": "COPA", "items": 5}]])
@pytest.mark.parametrize("exact", [5, {"rows": 0, "base": 0, "tuned": 0}, {"rows": 2}])
def test_a_scorecard_edited_by_hand_never_closes_the_page(scorecard, exact, answerer, talk_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(talk_run, run_dir)
    run = {**record.read_run(run_dir), "scorecard": scorecard, "exact": exact}
    record.write_run(run_dir, run)
    assert scorecards.table(run) == []
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"instruction": "?", "output": "가"}, ensure_ascii=False), encoding="utf-8")
    scorecards.measure(answerer, str(file), run_dir, True, None, print)
    assert [row[0] for row in scorecards.table(record.read_run(run_dir))] == ["mine.jsonl"]


@pytest.mark.parametrize("changed", [{"cutoff_len": "x"}, {"seed": None}, {"val_set_size": "5"}, {"data_path": 5}])
def test_settings_edited_by_hand_are_one_line(changed, answerer, talk_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(talk_run, run_dir)
    run = record.read_run(run_dir)
    record.write_run(run_dir, {**run, "settings": {**run["settings"], **changed}})
    with pytest.raises(UsageError, match="학습의 설정"):
        scores.load_validation(run_dir, answerer)
