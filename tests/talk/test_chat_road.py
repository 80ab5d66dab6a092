"""ShareGPT의 대화로 배운 어댑터에게 같은 대화를 물으면, 묻는 토큰은 배운 행의 앞부분이고 답은 배운 끝에서 멈춘다."""

import json
import shutil
from pathlib import Path

import numpy as np
from conftest import call_script, load_answerer
from tokenizers import AddedToken

from utils import record
from utils.data import columns, dataset, forms
from utils.data.questions import held_out_members, read_question
from utils.model.adapter import read_prompt_info
from utils.model.tokenizer import load_tokenizer
from utils.talk import scores
from utils.talk.source import find_source

TEMPLATE = Path(__file__).resolve().parents[1] / "templates_real" / "chatml.jinja"
TURN = ("<|im_start|>", "<|im_end|>")


def write_base(folder: Path, plain: Path) -> Path:
    """ChatML로 말하는 작은 모델. 더한 특수 토큰은 embedding의 남는 행에 놓인다."""
    shutil.copytree(plain, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([AddedToken(each, special=True) for each in TURN])  # Gemma처럼 이름 없는 특수 토큰이다
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8").rstrip("\n")
    tokenizer.save_pretrained(folder)
    return folder


def talk(number: int) -> dict:
    said = [("human", f"{number} 더하기 {number}는?"), ("gpt", f"{2 * number}입니다."), ("human", "다시 말해 줘"),
            ("gpt", f"{number}의 두 배, {2 * number}입니다.")]
    return {"system": "짧게 답한다.", "conversations": [{"from": name, "value": text} for name, text in said]}


def test_what_is_asked_is_the_beginning_of_what_was_learned(tmp_path, tiny_neox, capsys):
    base, data, run = write_base(tmp_path / "base", tiny_neox), tmp_path / "talks.jsonl", tmp_path / "run"
    data.write_text("\n".join(json.dumps(talk(number), ensure_ascii=False) for number in range(24)), encoding="utf-8")
    call_script(capsys, "finetune-lora.py", "--base_model", str(base), "--data_path", str(data), "--output_dir",
                str(run), "--prompt_template", "chat", "--cutoff_len", "128", "--batch_size", "4",
                "--num_train_epochs", "1", "--val_set_size", "20", "--cache_dir", str(tmp_path / "cache"))
    answerer = load_answerer(find_source(None, str(run), print), None, None, False, None, print)
    tokenizer = answerer.tokenizer
    turn_end = tokenizer.convert_tokens_to_ids(TURN[1])
    info = read_prompt_info(run)
    assert (info.end_token, info.end_token_id) == (TURN[1], turn_end)
    assert set(info.end_token_ids) == {turn_end, tokenizer.eos_token_id} == set(answerer._decoder.end_ids)

    documents = dataset.load_documents(data, answerer.prompter, answerer.encoder, 128, answerer.end_id,
                                       str(tmp_path / "cache"))
    for number in range(24):
        row = talk(number)
        turns = forms.read_row(row, columns.require_form(row, data), number + 1, data)
        tokens, learned = documents.document(number)
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        assert tokens.tolist() == list(tokenizer.apply_chat_template(messages)["input_ids"])
        starts = np.flatnonzero(np.diff(learned.astype(int), prepend=0) == 1)
        for start, place in zip(starts, (2, 4), strict=True):
            assert answerer.ask_talk(turns[:place]) == tokens[:start].tolist()
    question = read_question(documents, int(held_out_members(documents, 20, 42)[0]))
    assert question.answer[-1] == turn_end and tokenizer.decode(question.answer[:-1]).endswith("입니다.")

    validation = scores.load_validation(run, answerer, str(tmp_path / "cache"))
    assert not validation.changed
    for asked in validation.questions:
        assert "<|im_" not in asked.text and asked.text.endswith("는?") and "assistant" not in asked.text
    recorded = record.read_run(run)
    record.write_run(run, {**recorded, "data": {**recorded["data"], "validation_sha256": "다르게 나눈 행"}})
    assert scores.load_validation(run, answerer, str(tmp_path / "cache")).changed
