"""공개된 대화 템플릿마다, 배우는 토큰은 apply_chat_template의 토큰이고 물을 때의 토큰은 그 앞부분이다."""

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import build_tokenizer

from utils.chat import CannotSay
from utils.data import check, dataset
from utils.data.documents import MUTED
from utils.data.encoder import Encoder
from utils.errors import UsageError
from utils.model.tokenizer import answer_end_id, end_token_ids
from utils.prompter import Prompter, make_prompter
from utils.turns import Turn

pytestmark = pytest.mark.quick

TEMPLATES = Path(__file__).resolve().parents[1] / "templates_real"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endofturn|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[|system|]", "[|user|]", "[|assistant|]",
           "[|endofturn|]", "[INST]", "[/INST]"]
ENDS = {"chatml": ["<|im_end|>"], "chatml_marks": ["<|im_end|>"], "qwen2.5": ["<|im_end|>"], "qwen3": ["<|im_end|>"],
        "llama3": ["<|eot_id|>"], "llama3.2": ["<|eot_id|>"], "kanana": ["<|eot_id|>"],
        "gemma2": ["<end_of_turn>"], "gemma3": ["<end_of_turn>"],
        "exaone3.5": ["[|endofturn|]"], "exaone4": ["[|endofturn|]"],
        "hyperclovax": ["<|im_end|>", "<|endofturn|>"], "mistral": ["</s>"], "mistral_first": ["</s>"]}
WITH_BOS = ("llama3", "llama3.2", "kanana", "gemma2", "gemma3", "mistral", "mistral_first")
WITHOUT_SYSTEM = ("gemma2", "mistral")  # 거절하거나, 답이 있으면 system을 말없이 버린다
# 앞의 답이 다음 차례에서 다른 글이 된다: 생각을 지우거나 끝 토큰이 달라진다
REWRITES = ("qwen3", "hyperclovax")
PLAIN = [Turn("user", "하늘은 왜 파란가요?"), Turn("assistant", "햇빛이 흩어집니다.\n\n- 파란 빛\n"),
         Turn("user", "  그럼 노을은? \n"), Turn("assistant", "붉은 빛이 남습니다. 끝<end>"),
         Turn("user", "3 더하기 4는?"), Turn("assistant", "7")]
PAIR = ("요약해 줘", "긴 글", "짧은 글")
TALKS = {"한 번": PLAIN[:2], "세 번": PLAIN, "system": [Turn("system", "짧게 답한다."), *PLAIN[:4]]}


def load_tokenizer(name: str, folder: Path):
    return equip(build_tokenizer(folder), (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n"))


def equip(tokenizer, template: str):
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL, "bos_token": "<s>"})
    tokenizer.add_tokens(["<think>", "</think>"])
    if "eos_token" in template:
        tokenizer.eos_token = "</s>"
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: load_tokenizer(name, folder / name) for name in ENDS}


def messages(turns) -> list[dict]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def whole(tokenizer, turns, **settings) -> list[int]:
    """transformers가 만드는 대화 전체의 토큰."""
    return list(tokenizer.apply_chat_template(messages(turns), **settings)["input_ids"])


def stage(tokenizer, template: dict | None = None):
    prompter = make_prompter(template or {"name": "chat"}, tokenizer)
    return prompter, Encoder(tokenizer, answer_end_id(tokenizer, prompter))


def asked(prompter, encoder, turns) -> list[int]:
    return encoder.encode_asked(prompter.talk(turns)[0])


def learned_runs(marks: list[int]) -> list[tuple[int, int]]:
    """배우는 자리들의 [시작, 끝)."""
    edges = [at for at in range(len(marks) + 1) if (marks[at - 1 : at] == [1]) != (marks[at : at + 1] == [1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", ENDS)
def test_a_row_is_the_whole_talk_and_asking_is_its_beginning(tokenizers, name, talk):
    tokenizer, turns = tokenizers[name], TALKS[talk]
    prompter, encoder = stage(tokenizer)
    if talk == "system" and name in WITHOUT_SYSTEM:
        with pytest.raises(CannotSay, match="system"):
            prompter.talk(turns)
        return
    documents = encoder.encode_batch(prompter.talk(turns))
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    assert len(documents) == (len(answers) if name in REWRITES else 1)
    ends = tokenizer.convert_tokens_to_ids(ENDS[name])
    found = []
    for tokens, marks in documents:
        for start, end in learned_runs(marks):
            place = answers[len(found)]
            found.append(place)
            if name in REWRITES:
                assert tokens == whole(tokenizer, turns[: place + 1])
            assert tokens[:start] == asked(prompter, encoder, turns[:place])
            assert tokens[:start] == whole(tokenizer, turns[:place], add_generation_prompt=True)
            said = tokenizer.decode(tokens[start : end - len(ends)])
            assert said.removeprefix("<think>\n\n</think>\n\n").strip() == turns[place].text.strip()
            assert tokens[end - len(ends) : end] == ends
    assert found == answers
    assert documents[-1][0] == whole(tokenizer, turns)
    for tokens, _ in documents:
        assert tokens.count(tokenizer.bos_token_id) == (1 if name in WITH_BOS else 0)


def test_the_mask_is_that_of_the_generation_marks_without_what_follows_the_end(tokenizers):
    tokenizer = tokenizers["chatml_marks"]
    prompter, encoder = stage(tokenizer)
    theirs = tokenizer.apply_chat_template(messages(PLAIN), return_assistant_tokens_mask=True)
    (tokens, marks), = encoder.encode_batch(prompter.talk(PLAIN))
    newline = tokenizer.encode("\n")
    expected = [int(kept) and not (token in newline and before == tokenizer.convert_tokens_to_ids("<|im_end|>"))
                for kept, token, before in zip(theirs["assistant_masks"], tokens, [None, *tokens], strict=False)]
    assert tokens == list(theirs["input_ids"]) and marks == expected and sum(marks) == sum(
        theirs["assistant_masks"]) - 3


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "exaone4"])
def test_thinking_on_and_off_asks_what_was_learned(tokenizers, name, thinking):
    """켜면 생각이 든 답을, 끄면 빈 생각 뒤의 답을 배운다. 물을 때도 그 자리에서 묻는다."""
    tokenizer = tokenizers[name]
    prompter, encoder = stage(tokenizer, {"name": "chat", "enable_thinking": thinking})
    thoughts = "<think>\n빛의 길을 본다.\n</think>\n\n" if thinking else ""
    turns = [turn if turn.role == "user" else Turn("assistant", thoughts + turn.text) for turn in PLAIN]
    documents = encoder.encode_batch(prompter.talk(turns))
    assert documents[-1][0] == whole(tokenizer, turns)
    for number, (tokens, marks) in enumerate(documents if len(documents) > 1 else documents * 3):
        runs = learned_runs(marks)
        start, end = runs[0] if len(documents) > 1 else runs[number]
        prompt = asked(prompter, encoder, turns[: 2 * number + 1])
        assert tokens[:start] == prompt == whole(tokenizer, turns[: 2 * number + 1], add_generation_prompt=True,
                                                 enable_thinking=thinking)
        assert ("빛의 길" in tokenizer.decode(tokens[start:end])) == thinking


def test_thinking_is_chosen_in_a_template_file(tokenizers, tmp_path):
    path = tmp_path / "quiet.json"
    path.write_text('{"name": "chat", "enable_thinking": false}', encoding="utf-8")
    prompter = make_prompter(str(path), tokenizers["qwen3"])
    assert prompter.template == {"name": "chat", "enable_thinking": False}
    assert prompter.prompt("가?").endswith("<think>\n\n</think>\n\n")
    path.write_text('{"name": "chat", "enable_thinking": "off"}', encoding="utf-8")
    with pytest.raises(UsageError, match="enable_thinking"):
        make_prompter(str(path), tokenizers["qwen3"])


DATED = """{{ bos_token }}오늘: {{ strftime_now("%Y.%m.%d") }}
{% for message in messages %}[INST]{{ message.content }}[/INST]{% endfor %}"""


def test_a_template_that_writes_today_says_one_day(tokenizers, tmp_path):
    """배운 글과 물을 때의 글이 날마다 달라지지 않게 날짜를 하나로 정해 담는다."""
    tokenizer = equip(build_tokenizer(tmp_path / "dated"), DATED)
    before = datetime.date.today()
    today = make_prompter("chat", tokenizer)
    assert today.template["date"] in (before.isoformat(), datetime.date.today().isoformat())
    learned = make_prompter({"name": "chat", "date": "2024-07-26"}, tokenizer)
    assert "오늘: 2024.07.26\n" in learned.prompt("가?") and "오늘: 2024.07.26\n" in learned.talk(PLAIN[:1])[0][0][0]
    assert make_prompter(learned.template, tokenizer).prompt("가?") == learned.prompt("가?") != today.prompt("가?")
    assert make_prompter("chat", tokenizer, date="2024-07-26").template == learned.template
    assert make_prompter({"name": "chat", "date": "2025-01-02"}, tokenizer, "2024-07-26").template["date"][:4] == "2025"
    with pytest.raises(UsageError, match="date"):
        make_prompter({"name": "chat", "date": "어제"}, tokenizer)
    assert make_prompter(learned.template, tokenizers["llama3"]).template == {"name": "chat"}


def test_an_answer_with_thoughts_is_not_taught_without_them(tokenizers):
    prompter, _ = stage(tokenizers["qwen3"], {"name": "chat", "enable_thinking": False})
    with pytest.raises(CannotSay, match="enable_thinking"):
        prompter.talk([PLAIN[0], Turn("assistant", "<think>\n빛\n</think>\n\n흩어진다")])


def test_weight_zero_is_read_and_only_the_rest_is_learned(tokenizers):
    muted = [Turn(turn.role, turn.text, learned=place != 1) for place, turn in enumerate(PLAIN)]
    for name in ENDS:
        prompter, encoder = stage(tokenizers[name])
        documents = encoder.encode_batch(prompter.talk(muted))
        assert sum(len(learned_runs(marks)) for _, marks in documents) == 2
        assert documents[-1][0] == whole(tokenizers[name], muted)
        assert all(MUTED in marks for _, marks in documents)


def test_one_document_an_answer_never_learns_a_question_twice(tokenizers):
    """질문까지 배울 때에도 앞의 글은 그 글이 마지막이던 문서에서만 배운다."""
    prompter, encoder = stage(tokenizers["qwen3"])
    for number, (tokens, marks) in enumerate(encoder.encode_batch(prompter.talk(PLAIN))):
        taught = tokenizers["qwen3"].decode([token for token, mark in zip(tokens, marks, strict=True) if mark != MUTED])
        assert [turn.text.strip() in taught for turn in PLAIN[::2]] == [place == number for place in range(3)]


@pytest.mark.parametrize("name", ENDS)
def test_special_tokens_written_in_a_text_stay_text(tokenizers, name):
    tokenizer = tokenizers[name]
    prompter, encoder = stage(tokenizer)
    written = f"끝 토큰은 {ENDS[name][0]}이고 {tokenizer.bos_token}로 시작합니다"
    turns = [Turn("user", f"{written}?"), Turn("assistant", f"{written}.")]
    (tokens, marks), = encoder.encode_batch(prompter.talk(turns))
    plain, = encoder.encode_batch(prompter.talk(PLAIN[:2]))
    special = set(tokenizer.all_special_ids)
    assert [token for token in tokens if token in special] == [token for token in plain[0] if token in special]
    assert tokenizer.decode(tokens).count(written) == 2
    (start, _), = learned_runs(marks)
    assert tokens[:start] == asked(prompter, encoder, turns[:1])


def test_a_boundary_that_merges_is_cut_in_training_and_in_asking(tmp_path):
    """답이 줄바꿈으로 시작하면 BPE가 묻는 글의 끝과 합친다. 그래도 물을 때의 토큰이 배운 토큰의 앞부분이다."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(["가\n\n\n나\n\n다"] * 9, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = equip(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>"),
                      (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8").rstrip("\n"))
    prompter, encoder = stage(tokenizer)
    turns = [Turn("user", "가"), Turn("assistant", "\n\n나"), Turn("user", "다"), Turn("assistant", "\n라")]
    (tokens, marks), = encoder.encode_batch(prompter.talk(turns))
    assert tokens != whole(tokenizer, turns) and tokenizer.decode(tokens) == tokenizer.decode(whole(tokenizer, turns))
    for number, (start, _) in enumerate(learned_runs(marks)):
        assert tokens[:start] == asked(prompter, encoder, turns[: 2 * number + 1])
        if number == 0:
            assert tokens[:start] == whole(tokenizer, turns[:1], add_generation_prompt=True)


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama3", "chatml"])
def test_a_sentencepiece_tokenizer_gives_the_same_tokens(scheme, name):
    """글의 처음에만 공백을 붙이는 토크나이저에서도 묻는 토큰은 배운 토큰의 앞부분이다."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.train_from_iterator([turn.text for turn in PLAIN], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False))
    tokenizer = equip(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>"),
                      (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n"))
    prompter, encoder = stage(tokenizer)
    (tokens, marks), = encoder.encode_batch(prompter.talk(PLAIN))
    assert tokens == whole(tokenizer, PLAIN) and len(learned_runs(marks)) == 3
    for number, (start, _) in enumerate(learned_runs(marks)):
        turns = PLAIN[: 2 * number + 1]
        assert tokens[:start] == asked(prompter, encoder, turns) == whole(tokenizer, turns, add_generation_prompt=True)


HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
CHANGED = {
    "raises": "{{ raise_exception('받지 않는다\n둘째 줄') }}",
    "undefined": "{{ messages.nothing.here }}",
    "syntax": "{% if",
    "drops the question": "{% for m in messages if m.role != 'user' %}{{ m.content }}<|im_end|>{% endfor %}",
    "drops the system": "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}",
    "upper": HEAD + "{{ m.content | upper }}<|im_end|>{% endfor %}",
    "drops the answer": "{% for m in messages if m.role != 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}",
    "other prompt": HEAD + "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[INST]{% endif %}",
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_template_that_cannot_say_a_talk_is_refused_in_one_line(tmp_path, name):
    tokenizer = equip(build_tokenizer(tmp_path), CHANGED[name])
    prompter, _ = stage(tokenizer)
    with pytest.raises(CannotSay, match="prompt_template default") as error:
        prompter.talk([Turn("system", "be brief"), Turn("user", "what is it?"), Turn("assistant", "an answer")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("turns", [PLAIN[:2], PLAIN])
def test_a_template_that_ignores_the_generation_prompt_is_asked_with_its_header(tmp_path, turns):
    tokenizer = equip(build_tokenizer(tmp_path), HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}")
    prompter, encoder = stage(tokenizer)
    (tokens, marks), = encoder.encode_batch(prompter.talk(turns))
    assert tokens == whole(tokenizer, turns)
    for number, (start, _) in enumerate(learned_runs(marks)):
        assert tokens[:start] == asked(prompter, encoder, turns[: 2 * number + 1])
        assert tokenizer.decode(tokens[:start]).endswith("<|im_start|>assistant\n")


def test_a_template_without_an_end_token_learns_the_tokenizers_end(tmp_path):
    tokenizer = equip(build_tokenizer(tmp_path), "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                                                 "{% if add_generation_prompt %}assistant: {% endif %}")
    prompter, encoder = stage(tokenizer)
    documents = encoder.encode_batch(prompter.talk(PLAIN))
    assert len(documents) == 3 and prompter.end_tokens == []
    for number, (tokens, marks) in enumerate(documents):
        (start, end), = learned_runs(marks)
        assert tokens[:start] == asked(prompter, encoder, PLAIN[: 2 * number + 1])
        assert tokens[-1] == tokenizer.eos_token_id and end == len(tokens)
        assert tokenizer.decode(tokens[start:-1]) == f" {PLAIN[2 * number + 1].text}"


def load(path, tokenizer, rows: list[dict], cutoff_len: int = 512, **settings):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    prompter, encoder = stage(tokenizer)
    return dataset.load_documents(path, prompter, encoder, cutoff_len, answer_end_id(tokenizer, prompter),
                                  str(path.parent / "cache"), **settings)


def test_texts_written_with_another_template_are_said_with_the_chat_template(tokenizers, tmp_path):
    tokenizer = tokenizers["chatml"]
    rows = [{"text": Prompter("default").prompt(*PAIR[:2]) + PAIR[2] + "<|endoftext|>"}, {"text": "그냥 글"}]
    documents = load(tmp_path / "a.jsonl", tokenizer, rows)
    question, context, answer = PAIR
    said = [Turn("user", f"{question}\n\n{context}"), Turn("assistant", answer)]
    assert documents.document(0)[0].tolist() == whole(tokenizer, said)
    assert documents.found == {"off_template": {"count": 1, "rows": [2]}}


def test_a_row_the_template_refuses_is_named_and_counted(tokenizers, tmp_path):
    rows = [{"messages": messages(PLAIN[:2])}, {"messages": messages([Turn("system", "짧게"), *PLAIN[:2]])}]
    with pytest.raises(UsageError, match="a.jsonl의 2번째 행.*System role not supported.*system을 첫 질문에") as error:
        load(tmp_path / "a.jsonl", tokenizers["gemma2"], rows)
    assert "\n" not in str(error.value)
    documents = load(tmp_path / "a.jsonl", tokenizers["gemma2"], rows, skip_bad=True)
    assert documents.found == {"template": {"count": 1, "rows": [2]}} and len(documents) == 1


@pytest.mark.parametrize("name", ["chatml", "gemma3", "exaone4"])
def test_a_long_talk_is_the_whole_talk_without_its_first_exchanges(tokenizers, tmp_path, name):
    turns = [Turn("system", "짧게"), *(turn for number in range(900) for turn in (
        Turn("user", f"{number}번?"), Turn("assistant", f"{number}번째 답")))]
    tokens = load(tmp_path / "a.jsonl", tokenizers[name], [{"messages": messages(turns)}], 200).document(0)[0].tolist()
    for kept in range(1, 20):
        if tokens == whole(tokenizers[name], [turns[0], *turns[-2 * kept :]]):
            break
    assert len(tokens) <= 200 < len(whole(tokenizers[name], [turns[0], *turns[-2 * (kept + 1) :]]))


def test_each_answer_of_a_long_talk_keeps_the_exchanges_that_fit_before_it(tokenizers, tmp_path):
    tokenizer = tokenizers["qwen3"]
    turns = [turn for number in range(30) for turn in (
        Turn("user", f"{number}번?"), Turn("assistant", f"{number}번째 답"))]
    rows = [{"messages": messages(turns)}, {"messages": messages(PLAIN[:2])}]
    documents = load(tmp_path / "a.jsonl", tokenizer, rows, 150)
    assert len(documents) == 31 and documents.found["divided"]["rows"] == documents.found["cut_talk"]["rows"] == [1]
    assert len(set(documents.digests.tolist())) == 2  # 한 행의 문서들은 학습과 검증의 같은 쪽에 놓인다
    assert "duplicate" not in check.document_faults(documents, np.arange(31), np.arange(0))
    for place in range(30):
        tokens = documents.document(place)[0].tolist()
        fitting = [whole(tokenizer, turns[2 * start : 2 * place + 2]) for start in range(place + 1)]
        assert tokens == next(ids for ids in fitting if len(ids) <= 150)


def test_every_end_of_the_template_is_an_end_of_serving(tokenizers):
    for name, tokenizer in tokenizers.items():
        prompter, _ = stage(tokenizer)
        ends = tokenizer.convert_tokens_to_ids(ENDS[name])
        assert prompter.end_tokens == ENDS[name] and answer_end_id(tokenizer, prompter) == ends[0]
        assert {tokenizer.eos_token_id, *ends} <= set(end_token_ids(tokenizer, None))


@pytest.mark.parametrize("name", ENDS)
def test_a_preference_pair_asks_what_serving_asks(tokenizers, tmp_path, name):
    said = [("user", "물은 몇 도에서 끓나요?"), ("assistant", "100도입니다."), ("user", "높은 산에서는?")]
    talk = [{"role": role, "content": text} for role, text in said]
    row = {"prompt": talk, "chosen": "더 낮습니다.", "rejected": "몰라."}
    prompter, encoder = stage(tokenizers[name])
    documents = load(tmp_path / "pairs.jsonl", tokenizers[name], [row])
    assert documents.pairs and len(documents) == 2
    question = asked(prompter, encoder, [Turn(*turn) for turn in said])
    for index, answer in enumerate((row["chosen"], row["rejected"])):
        tokens, learned = documents.document(index)
        assert tokens[:len(question)].tolist() == question
        assert learned_runs(learned.astype(int).tolist())[0][0] == len(question)
        assert tokenizers[name].decode(tokens[learned], skip_special_tokens=True).strip().endswith(answer)
