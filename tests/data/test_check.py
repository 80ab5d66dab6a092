"""심어 둔 잘못은 모두 찾고, 멀쩡한 데이터에서는 아무 말도 하지 않고, 고친 파일은 입력을 건드리지 않는다."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load_script

from utils import cli
from utils.data import blocks, check, columns, dataset, repair, rows
from utils.data.encoder import Encoder
from utils.errors import UsageError
from utils.model import tokenizer
from utils.prompter import Prompter

pytestmark = pytest.mark.quick

SHIPPED = ROOT / "ko-datasets" / "polyglot-ko-lite_textonly.json"
SHIPPED_COLUMNS = ROOT / "ko-datasets" / "polyglot-ko-lite.json"
KOALPACA = ROOT.parent / "shared" / "data" / "koalpaca_500.json"
END, CUTOFF, EACH = "<|endoftext|>", 2048, 8
HEAD, MARKER = "### 질문: ", "\n\n### 답변: "
finetune_lora = load_script("finetune-lora.py")


@pytest.fixture(scope="module")
def encoder(tiny_neox):
    return Encoder(tokenizer.load_tokenizer(tiny_neox), 2)


@pytest.fixture(scope="module")
def clean() -> list[tuple[str, str]]:
    """함께 든 데이터의 (질문, 답)."""
    texts = [row["text"].removesuffix(END) for _, row in rows.read_rows(SHIPPED)]
    return [tuple(text.removeprefix(HEAD).split(MARKER)) for text in texts]


def examine(path: Path, encoder, folder: Path, template: str = "default") -> dict:
    documents = dataset.load_documents(path, Prompter(template), encoder, CUTOFF, 2, str(folder), skip_bad=True)
    sides = blocks.split_by_content(documents, 5, 42)
    return {**documents.found, **check.document_faults(documents, *sides)}


def line(question: str, answer: str, end: str = END) -> str:
    return json.dumps({"text": f"{HEAD}{question}{MARKER}{answer}{end}"}, ensure_ascii=False)


def spoiled(question: str, answer: str, turn: int) -> dict[str, str]:
    """종류 -> 멀쩡한 행 하나를 그 종류로 망가뜨린 줄."""
    bare = answer.replace("\n", " ")
    garbled = (answer.encode().decode("cp1252", "replace"), answer.encode().decode("latin-1"),
               answer.encode("cp949", "ignore").decode("latin-1"), answer.encode().decode("cp949", "replace"))
    return {
        "broken": line(question, answer)[: -3 - turn],
        "missing": (json.dumps({"글": answer}), '{"text": 3}', '{"text": null}', '{"text": ["가"]}')[turn % 4],
        "empty": (line(question, ""), '{"text": ""}', line(question, "  "), '{"text": "<|endoftext|>"}')[turn % 4],
        "copied": line(question, question),
        "placeholder": line(question, ("nan", "None", "TODO", "N/A")[turn % 4]),
        "off_template": json.dumps({"text": (f"Q: {question}\nA: {answer}{END}", f"{answer}{END}")[turn % 2]}),
        "glued": line(question, f"{answer}\n\n{HEAD}다른 질문 {turn}?{MARKER}다른 답입니다."),
        "end_missing": line(question, answer, ""),
        "end_doubled": line(question, answer, (END * 2, f"{END}\n{END}", END * 3, f"{END} {END}\n")[turn % 4]),
        "end_inside": line(question, f"{bare[:9]}{END} {bare[9:]}"),
        "foreign_end": line(question, answer + ("</s>", "<|im_end|>", "[EOS]", "<eos>")[turn % 4]),
        "nfd": line(question, unicodedata.normalize("NFD", answer)),
        "mojibake": line(question, garbled[turn % 4]),
        "control": line(question, bare[:5] + ("\0", "\x1b", "\ufeff", "\x07")[turn % 4] + bare[5:]),
        "escaped": line(question, f"{bare}\\n첫째는 이렇습니다.\\n둘째는 저렇습니다."),
        "long": line(question, " ".join([answer] * 40)),
        "answer_cut": line(question + " 아주 길게" * 900, answer),
    }


# 심은 종류와 함께 보여도 옳은 종류
ALSO = {"mojibake": {"control"}, "answer_cut": {"long"}}


@pytest.fixture
def seeded(tmp_path, clean) -> tuple[Path, dict[str, set[int]]]:
    """멀쩡한 천여 줄에 잘못을 심은 파일과, 종류 -> 심은 줄의 번호."""
    kinds = list(spoiled("가", "나", 0))
    victims, good = clean[: EACH * len(kinds)], [line(*pair) for pair in clean[EACH * len(kinds) :]]
    made = [(kind, spoiled(*victims[turn * len(kinds) + at], turn)[kind])
            for turn in range(EACH) for at, kind in enumerate(kinds)]
    made += [("duplicate", text) for text in good[:EACH]]
    rng = np.random.default_rng(0)
    lines = [(None, text) for text in good]
    for index in rng.permutation(len(made)):
        lines.insert(int(rng.integers(EACH, len(lines) + 1)), made[index])
    path = tmp_path / "seeded.jsonl"
    path.write_text("\n".join(text for _, text in lines) + "\n", encoding="utf-8")
    places: dict[str, set[int]] = {}
    for number, (kind, _) in enumerate(lines, 1):
        if kind:
            places.setdefault(kind, set()).add(number)
    return path, places


def test_seeded_faults_are_all_found_and_nothing_else(seeded, encoder, monkeypatch):
    path, places = seeded
    monkeypatch.setattr(check, "N_EXAMPLES", 10**6)
    found = {kind: set(entry["rows"]) for kind, entry in examine(path, encoder, path.parent).items()}
    recall = {kind: len(found.get(kind, set()) & numbers) / len(numbers) for kind, numbers in places.items()}
    allowed = {kind: numbers | {number for other, also in ALSO.items() if kind in also for number in places[other]}
               for kind, numbers in places.items()}
    false_alarms = {kind: numbers - allowed.get(kind, set()) for kind, numbers in found.items()}
    assert len(places) >= 12
    assert recall == dict.fromkeys(places, 1.0)
    assert not any(false_alarms.values()), false_alarms


def test_same_question_on_both_sides_is_found(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(check, "N_EXAMPLES", 10**6)
    pairs = [(f"질문 {number % 150}?", f"{number}번째 답입니다.") for number in range(300)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(line(*pair) for pair in pairs), encoding="utf-8")
    documents = dataset.load_documents(path, Prompter(), encoder, CUTOFF, 2, str(tmp_path))
    train, held_out = blocks.split_by_content(documents, 20, 42)
    asked = {pairs[index][0] for index in train}
    expected = [int(index) + 1 for index in held_out if pairs[index][0] in asked]
    assert expected
    assert check.document_faults(documents, train, held_out)["overlap"]["rows"] == expected


@pytest.mark.parametrize("encoding, named", [("cp949", "CP949"), ("utf-16", "UTF-16"), ("utf-8-sig", None)])
def test_other_encodings_are_told(tmp_path, encoder, encoding, named):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(line(f"질문 {n}?", f"{n}번째 답") for n in range(9)).encode(encoding))
    told = {"encoding": {"count": 9, "rows": [], "note": named}} if named else {}  # 엑셀이 붙인 BOM은 잘못이 아니다
    assert examine(path, encoder, tmp_path) == told


@pytest.mark.parametrize("kind, row", [
    ("swapped", {"instruction": "{n}월에는 비가 많이 옵니다.", "output": "{n}월의 날씨는 어떤가요?"}),
    ("wrong_column", {"instruction": "{n}월의 날씨는 어떤가요?", "output": "https://example.org/{n}"}),
    ("wrong_column", {"prompt": "{n}월의 날씨는 어떤가요?", "completion": "2026-11-{n}"}),
    ("ignored_column", {"instruction": "{n}월은?", "output": "{n}번", "answer": "{n}월에는 비가 옵니다. " * 9}),
])
def test_column_that_looks_wrong_is_told(tmp_path, encoder, kind, row):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({name: value.format(n=n) for name, value in row.items()})
                              for n in range(10, 30)), encoding="utf-8")
    assert set(examine(path, encoder, tmp_path)) - {"unused"} == {kind}


@pytest.mark.parametrize("row, named", [
    ({"text": "좋아요", "label": 1}, "label"),
    ({"messages": [{"role": "user", "content": "가?"},
                   {"role": "assistant", "content": "나", "reasoning_content": "다"}]}, "messages의 reasoning_content"),
])
def test_what_is_not_read_is_told(tmp_path, encoder, row, named):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert examine(tmp_path / "rows.jsonl", encoder, tmp_path)["unused"]["note"] == named


@pytest.mark.parametrize("path, template", [
    (SHIPPED, "default"), (SHIPPED_COLUMNS, "default"), (SHIPPED_COLUMNS, "instruction-response"),
    pytest.param(KOALPACA, "default", marks=pytest.mark.skipif(
        not KOALPACA.exists(), reason=f"나누어 주지 않는 데이터라 이 컴퓨터에 없다: {KOALPACA}")),
])
def test_no_false_alarm_on_real_data(tmp_path, encoder, path, template):
    found = examine(path, encoder, tmp_path, template)
    assert set(found) <= {"long"}, check.short_lines(found)  # 긴 행은 이 작은 토크나이저에서 정말로 길다


def test_short_form_is_one_line_a_kind_with_row_numbers(seeded, encoder):
    path, places = seeded
    lines = check.short_lines(examine(path, encoder, path.parent))
    assert len(lines) == len(places) and all("번째 행" in each for each in lines)
    assert any("99%가 들어가는 cutoff_len은" in each for each in lines)
    assert set(places) <= set(check.KINDS)


# 고친 파일


def test_repaired_file_has_no_fault_that_can_be_mended(seeded, encoder, tmp_path):
    path, places = seeded
    before = path.read_bytes()
    done = repair.repair(path, tmp_path / "fixed.jsonl", Prompter())
    found = examine(tmp_path / "fixed.jsonl", encoder, tmp_path)
    assert set(found) <= {"copied", "off_template", "glued", "end_inside", "mojibake", "long", "answer_cut"}
    assert found["mojibake"]["count"] <= EACH // 2  # 잃어버린 글자가 있는 것은 되돌릴 수 없다
    dropped = sum(len(places[kind]) for kind in ("broken", "missing", "empty", "placeholder", "duplicate"))
    assert done.dropped == dropped
    assert done.written == len(before.splitlines()) - dropped
    assert path.read_bytes() == before and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("garbled", [
    "안녕하세요. 반갑습니다.".encode().decode("latin-1"),
    "안녕하세요. 반갑습니다.".encode("cp949").decode("latin-1"),
    "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in "안녕하세요. 반갑습니다.".encode()),
])
def test_reversible_mojibake_is_restored(garbled):
    assert repair.fix_text(garbled) == "안녕하세요. 반갑습니다."


@pytest.mark.parametrize("row", [
    {"text": "글<|endoftext|>"}, {"instruction": "가?", "input": "", "output": "나", "url": 3},
    {"messages": [{"role": "user", "content": "가?"}, {"role": "assistant", "content": "나"}]},
])
def test_good_row_is_left_as_it_is(row):
    assert repair.fix_row(row, columns.choose_form(row), Prompter()) == row


@pytest.mark.parametrize("target, named", [("seeded.jsonl", "입력 파일"), ("other.jsonl", "이미 있는"),
                                           ("x.json", "jsonl"), ("other.jsonl/x.jsonl", "쓰지 못했다")])
def test_repair_never_writes_over_a_file(seeded, tmp_path, target, named):
    (tmp_path / "other.jsonl").write_text("그대로", encoding="utf-8")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=named):
        repair.repair(seeded[0], tmp_path / target, Prompter())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_nothing_usable_leaves_no_repaired_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{bad\n', encoding="utf-8")
    with pytest.raises(UsageError, match="하나도 없"):
        repair.repair(tmp_path / "a.jsonl", tmp_path / "b.jsonl", Prompter())
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


# 명령줄


def test_check_data_shows_findings_and_the_loss_mask(capsys, tmp_path, tiny_neox, seeded):
    cli.run(finetune_lora.train, finetune_lora.RETIRED, [
        "--base_model", str(tiny_neox), "--data_path", str(seeded[0]), "--cutoff_len", "128", "--cache_dir",
        str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out"), "--train_on_inputs", "False",
        "--repair_data", str(tmp_path / "fixed.jsonl")])
    said = capsys.readouterr().out
    assert "글자가 깨진 것 같은 행" in said and "### 답변:⟦ " in said and f"{END}⟧" in said
    assert (tmp_path / "fixed.jsonl").exists() and not (tmp_path / "out").exists()
