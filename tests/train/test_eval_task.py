"""학습하며 청한 시험(`--eval_task`)의 성적은 저장한 어댑터를 다시 읽은 `generate.py --eval`의 성적과 같다."""

import json
import re

from conftest import call_script

from utils import record

N_ITEMS = 24


def write_kobest(folder):
    """KoBEST의 TSV 꼴인 SentiNeg와 COPA. SentiNeg의 3분의 1이 부정이다."""
    folder.mkdir()
    senti = [f"{n}\t{n}에 {n}을 더하면 {2 * n}입니다\t{int(n % 3 > 0)}" for n in range(N_ITEMS)]
    copa = [f"{n}\t물이 {n}도에서 끓었다.\t{('원인', '결과')[n % 2]}\t{n}을 더했다.\t한글을 만들었다.\t{n % 3 // 2 + 1}"
            for n in range(N_ITEMS)]
    (folder / "SentiNeg-test.tsv").write_text("\n".join(["ID\tText\tLabel", *senti]), encoding="utf-8")
    (folder / "COPA-dev.tsv").write_text("\n".join(["ID\tsentence\tquestion\t1\t2\tAnswer", *copa]), encoding="utf-8")
    return folder


def test_the_score_asked_for_at_training_is_that_of_the_saved_adapter(tiny_neox, tmp_path, capsys):
    kobest, run = write_kobest(tmp_path / "kobest"), tmp_path / "run"
    data = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"문장: {n}에 {n}을 더하면 {2 * n}입니다 긍부정:", "output": "긍정"} for n in range(40)]
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    said = call_script(capsys, "finetune-lora.py", "--base_model", str(tiny_neox), "--data_path", str(data),
                       "--output_dir", str(run), "--num_train_epochs", "3", "--batch_size", "4", "--cutoff_len", "128",
                       "--learning_rate", "0.02", "--eval_task", str(kobest))
    scores = record.read_run(run)["scorecard"]
    assert f"시험의 문항 {2 * N_ITEMS}개를 두 모델이 푼다" in said
    assert [(score["name"], score["items"]) for score in scores] == [("copa", N_ITEMS), ("sentineg", N_ITEMS)]
    assert any(score["right"]["base"] != score["right"]["tuned"] for score in scores)

    again = call_script(capsys, "generate.py", "--peft_root", str(run), "--load_4bit", "True", "--eval", str(kobest))
    assert record.read_run(run)["scorecard"] == [{**score, "seconds": new["seconds"]} for score, new in
                                                 zip(scores, record.read_run(run)["scorecard"], strict=True)]
    for score in scores:
        line = f"{score['accuracy']['tuned']:.1%} ±{score['standard_error']['tuned']:.1%}"
        for printed in (said, again):
            assert re.search(rf"KoBEST {score['title'].split()[1]} {N_ITEMS}문항.*{re.escape(line)}", printed)
