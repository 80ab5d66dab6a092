"""선호 쌍은 열 이름으로 안다: 공개된 꼴을 모두 읽고, 두 답은 잇달은 두 문서가 되고, 섞이거나 어긋난 것은 말한다."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

from utils.data import blocks, check, columns, dataset, forms, rendered
from utils.data.encoder import Encoder
from utils.data.questions import held_out_members, read_question
from utils.data.repair import repair
from utils.data.talks import BadTurns
from utils.errors import UsageError
from utils.model.tokenizer import load_tokenizer
from utils.prompter import Prompter

pytestmark = pytest.mark.quick

ASKED, GOOD, BAD = "하늘은 왜 파란가요?", "빛이 흩어지기 때문입니다.", "몰라."


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


HH = "\n\nHuman: 물은?\n\nAssistant: 끓습니다.\n\nHuman: {0}\n\nAssistant: {1}"
SIMPLE = [("user", ASKED, ""), ("assistant", None, "")]
LONGER = [("user", "물은?", ""), ("assistant", "끓습니다.", ""), *SIMPLE]
FORMS = {
    "prompt": ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD}, SIMPLE),
    "대화의 목록": ({"prompt": [user(ASKED)], "chosen": [said(GOOD)], "rejected": [said(BAD)]}, SIMPLE),
    "messages와 글": ({"messages": [user("물은?"), said("끓습니다."), user(ASKED)], "chosen": GOOD, "rejected": BAD},
                      LONGER),
    "messages와 목록": ({"messages": [user(ASKED)], "chosen": [said(GOOD)], "rejected": [said(BAD)]}, SIMPLE),
    "대화 전체": ({"chosen": [user(ASKED), said(GOOD)], "rejected": [user(ASKED), said(BAD)]}, SIMPLE),
    "ultrafeedback": ({"prompt": ASKED, "prompt_id": "7", "chosen": [user(ASKED), said(GOOD)],
                       "rejected": [user(ASKED), said(BAD)], "messages": [user(ASKED), said(GOOD)]}, SIMPLE),
    "Anthropic HH": ({"chosen": HH.format(ASKED, GOOD), "rejected": HH.format(ASKED, BAD)}, LONGER),
    "orca": ({"system": "친절하게", "question": ASKED, "chosen": GOOD, "rejected": BAD},
             [("system", "친절하게", ""), *SIMPLE]),
    "지시와 맥락": ({"instruction": "요약해 줘.", "input": "긴 글", "chosen": GOOD, "rejected": BAD},
                    [("user", "요약해 줘.", "긴 글"), ("assistant", None, "")]),
    "ShareGPT": ({"conversations": [{"from": "human", "value": ASKED}], "chosen": {"from": "gpt", "value": GOOD},
                  "rejected": {"from": "gpt", "value": BAD}}, SIMPLE),
    "history": ({"질문": ASKED, "좋은 답": GOOD, "나쁜 답": BAD, "history": [["물은?", "끓습니다."]]}, LONGER),
    "CSV의 칸": ({" Prompt": ASKED, "CHOSEN": json.dumps([said(GOOD)]), "Rejected": BAD}, SIMPLE),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_two_talks_that_differ_in_the_last_answer(name):
    row, expected = FORMS[name]
    form = columns.require_form(row, "파일")
    assert form.is_preference
    for turns, answer in zip(forms.read_pair(row, form, 1, "파일"), (GOOD, BAD), strict=True):
        assert [(turn.role, turn.text, turn.input) for turn in turns] == [
            (role, answer if text is None else text, context) for role, text, context in expected]
        assert [turn.learned for turn in turns if turn.role == "assistant"][:-1] == [False] * (len(expected) // 2 - 1)
        assert turns[-1].learned


@pytest.mark.parametrize("row, reason", [
    ({"prompt": ASKED, "chosen": GOOD, "rejected": ""}, "rejected 열이 없거나 비었다"),
    ({"chosen": GOOD, "rejected": BAD}, "질문의 열이 없다"),
    ({"chosen": [user("가?"), said(GOOD)], "rejected": [user("나?"), said(BAD)]}, "서로 다르다"),
    ({"chosen": [user(ASKED)], "rejected": [user(ASKED)]}, "assistant의 글로 끝나지 않는다"),
    ({"prompt": "다른 질문", "chosen": [user(ASKED), said(GOOD)], "rejected": [user(ASKED), said(BAD)]},
     "chosen의 대화에 없다"),
    ({"messages": "글", "chosen": GOOD, "rejected": BAD}, "목록이 아니다"),
    ({"chosen": "\n\nHuman: 가?", "rejected": "\n\nHuman: 가?"}, "끝나지 않는다"),
])
def test_unreadable_pairs_name_the_row_and_the_cure(row, reason):
    with pytest.raises(BadTurns, match=reason) as found:
        forms.read_pair(row, columns.require_form(row, "f.jsonl"), 3, "f.jsonl")
    assert "f.jsonl의 3번째 행" in str(found.value) and "--repair_data" in str(found.value)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def load(tiny_neox, tmp_path):
    """행들을 파일로 써서 읽은 문서들."""
    def read(rows, cutoff_len: int = 64, skip_bad: bool = False):
        tokenizer = load_tokenizer(str(tiny_neox))
        source = write(tmp_path / f"rows{len(list(tmp_path.iterdir()))}.jsonl", rows)
        return dataset.load_documents(source, Prompter(), Encoder(tokenizer, 2), cutoff_len, 2, str(tmp_path),
                                      skip_bad=skip_bad)

    return read


PAIRS = [{"prompt": f"{n} 더하기 {n}는?", "chosen": f"{2 * n}입니다.", "rejected": f"{2 * n}."} for n in range(40)]


def test_a_pair_is_two_documents_that_never_part(load, tiny_neox):
    documents = load(PAIRS)
    assert documents.pairs and len(documents) == 80
    train, held_out = blocks.split_by_content(documents, 20, 42)
    for members in (train, held_out):
        assert np.array_equal(members[0::2] + 1, members[1::2]) and not (members[0::2] % 2).any()
    tokenizer = load_tokenizer(str(tiny_neox))
    packed = blocks.PairedDataset(documents, train, 128, 2, 0.1, seed=42)
    assert sorted(np.concatenate(packed.blocks)) == sorted(train) and max(map(len, packed.blocks)) > 2
    for index, members in enumerate(packed.blocks):
        block = packed[index]
        starts = [*torch.nonzero(block["position_ids"] == 0)[:, 0].tolist(), 128]
        assert (~block["reference"].isnan()).tolist() == [slot < len(members) for slot in
                                                          range(len(block["reference"]))]
        for place, member in enumerate(members):
            row = PAIRS[documents.numbers[member] - 1]
            own = slice(starts[place], starts[place + 1])
            learned = block["labels"][own][block["labels"][own] >= 0].tolist()
            answer = row["rejected" if member % 2 else "chosen"]
            assert learned == [*tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], 2]
            assert block["input_ids"][own][:documents.lengths()[member]].tolist()[-len(learned):] == learned
    asked = [read_question(documents, member) for member in held_out_members(documents, 20, 42)]
    assert len(asked) == len(held_out) // 2 and all(row.answer[-1] == 2 for row in asked)


def test_long_pairs_are_left_out_whole(load):
    documents = load([*PAIRS, {"prompt": "길게", "chosen": "가" * 60, "rejected": "나" * 60}])
    kept = blocks.fitting_pairs(documents, np.arange(len(documents)))
    assert kept.tolist() == list(range(80))
    found = check.document_faults(documents, kept, kept[:0])
    assert found["long_pair"]["count"] == 1 and found["long_pair"]["rows"] == [41] and "long" not in found


def test_mixed_files_are_refused_in_one_line(load):
    ordinary = {"prompt": "가?", "completion": "나."}
    for rows in ([*PAIRS[:3], ordinary], [ordinary, PAIRS[0]],
                 [{**PAIRS[0], "completion": None}, {**ordinary, "chosen": None, "rejected": ""}]):
        with pytest.raises(UsageError, match="선호 쌍과 보통 행이 섞여 있다.*번째") as found:
            load(rows)
        assert "\n" not in str(found.value)


def test_the_data_check_knows_pairs(load, tiny_neox):
    rows = [*PAIRS[:6], {**PAIRS[0], "chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]},
            {**PAIRS[7], "rejected": PAIRS[7]["chosen"]}, PAIRS[2], {**PAIRS[8], "chosen": " "},
            *({**row, "chosen": row["chosen"] + " 자세히 말하면 이렇습니다." * 5} for row in PAIRS[9:12])]
    documents = load(rows, cutoff_len=200, skip_bad=True)
    assert len(documents) == 2 * 11  # 같은 두 답과 빈 답은 배우지 않는다
    found = {**documents.found, **check.document_faults(documents, np.arange(22), np.arange(0))}
    assert found["same_pair"] == {"count": 1, "rows": [8]} and found["swapped_pair"] == {"count": 1, "rows": [7]}
    assert found["duplicate"] == {"count": 1, "rows": [9]} and found["empty"]["rows"] == [10]
    assert "평균" in found["length_bias"]["note"] and "unlearned" not in found
    assert "length_bias" not in load(PAIRS).found  # 몇 글자의 차이다
    lines = rendered.rendered_lines(documents, load_tokenizer(str(tiny_neox)), train_on_inputs=True)
    assert "고른 답" in lines[0] and any("버린 답" in line for line in lines) and "⟦ 0입니다." in "".join(lines)


def test_a_file_of_equal_answers_has_nothing_to_learn(load):
    with pytest.raises(UsageError, match="고른 답과 버린 답이 같아"):
        load([{**row, "rejected": row["chosen"]} for row in PAIRS[:3]])


def test_repair_keeps_usable_pairs(tmp_path):
    rows = [PAIRS[1], {**PAIRS[2], "chosen": "\ufeff" + PAIRS[2]["chosen"] + "</s>"}, PAIRS[1],
            {**PAIRS[3], "rejected": ""}, {**PAIRS[4], "rejected": PAIRS[4]["chosen"]}]
    done = repair(write(tmp_path / "bad.jsonl", rows), tmp_path / "good.jsonl", Prompter())
    assert (done.written, done.changed, done.dropped) == (2, 1, 3)
    lines = (tmp_path / "good.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == PAIRS[1:3]


def test_the_page_exports_what_is_read():
    """"내 기록"의 선호 쌍과 같은 열이다. `pairsOf`가 적는 행을 그대로 읽는다."""
    script = (ROOT / "utils/talk/page.js").read_text(encoding="utf-8")
    body = script[script.index("const pairsOf"):script.index("const save =")]
    assert all(f"{name}: " in body for name in ("prompt", "chosen", "rejected"))
    row = {"prompt": [{"role": "system", "content": "짧게"}, user("물은?"), said("끓습니다."), user(ASKED)],
           "chosen": [said(GOOD)], "rejected": [said(BAD)]}
    chosen, rejected = forms.read_pair(row, columns.require_form(row, "파일"), 1, "파일")
    assert [turn.text for turn in chosen] == ["짧게", "물은?", "끓습니다.", ASKED, GOOD] and rejected[-1].text == BAD
