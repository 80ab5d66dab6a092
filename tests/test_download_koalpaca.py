"""KoAlpaca를 바꾸는 스크립트는 학습과 같은 글을 쓰고, 실패하면 한 줄을 말하고 아무 파일도 남기지 않는다."""

import json

import pytest
from conftest import pieces_of, run_script

from utils.data import columns, forms, rows
from utils.data.texts import END_TOKEN
from utils.prompter import Prompter

SCRIPT = "ko-datasets/download-koalpaca.py"
ROWS = [{"instruction": f"{n}월은 왜 추운가요?", "output": f"해가 {n}시간만 뜹니다.\n\n### 덧붙임: 참고", "url": "x"}
        for n in range(5)]


def write_source(path):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_received_file_becomes_the_text_that_training_reads(tmp_path, suffix):
    output = tmp_path / "새 폴더" / "out.json"
    done = run_script(SCRIPT, "--source", str(write_source(tmp_path / f"a{suffix}")), "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "5행" in done.stdout
    written = list(rows.read_rows(output))
    prompter = Prompter()
    assert [row["text"] for _, row in written] == [
        prompter.prompt(row["instruction"], "") + row["output"] + END_TOKEN for row in ROWS]
    read_back = [prompter.talk(forms.read_row(row, columns.choose_form(row), number, output))
                 for number, row in written]
    assert read_back == [[[pieces_of(prompter, row["instruction"], "", row["output"])]] for row in ROWS]
    assert [file.name for file in output.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize("source, named", [
    (None, "hub에서 데이터를 받지 못했다"), ("beomi/none-such-data-set", "hub에서 데이터를 받지 못했다"),
    ("none.jsonl", "없다"), ("half.json", "3번째 행"), ("half.parquet", "parquet"), ("empty.jsonl", "비었다"),
    ("other.jsonl", "question"), ("blank.jsonl", "하나도 없다"),
])
def test_failure_is_one_line_and_leaves_the_old_file(tmp_path, source, named):
    whole = write_source(tmp_path / "whole.json").read_text(encoding="utf-8")
    (tmp_path / "half.json").write_text(whole[: len(whole) // 2], encoding="utf-8")
    parquet = write_source(tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(parquet[: len(parquet) // 2])
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "other.jsonl").write_text('{"question": "가"}', encoding="utf-8")
    (tmp_path / "blank.jsonl").write_text('{"instruction": "가", "output": ""}', encoding="utf-8")
    output = tmp_path / "out.json"
    output.write_text("옛 파일", encoding="utf-8")
    before = sorted(file.name for file in tmp_path.iterdir())
    named_source = () if source is None else ("--source", source if "/" in source else str(tmp_path / source))
    done = run_script(SCRIPT, *named_source, "--output", str(output), cold=True,
                      env={"HF_HOME": str(tmp_path.parent / "hf")})
    assert done.returncode == 2
    assert done.stderr.startswith("오류: ") and done.stderr.count("\n") == 1 and named in done.stderr, done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    assert output.read_text(encoding="utf-8") == "옛 파일"
