"""6 GB 노트북의 하루를 큰 카드에서 지난다: 빈 VRAM을 5.2 GB만 남기고, 사용자가 치는 그대로 배우고 합치고 묻는다.

    python tests/bench/bench_laptop.py --work /tmp/laptop
    python tests/bench/bench_laptop.py --shapes qwen3-0.6b --free_gb 0     VRAM을 붙들지 않는다(CPU에서도 돈다)

표와, 마지막 줄의 JSON. 실패한 단계는 그 말을 적고 다음 모양으로 간다.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from modern import SHAPES, write_folder  # noqa: E402

# (모양, LoRA를 붙일 층). 적지 않은 것은 기본값이다
TRIALS = (("polyglot-ko-1.3b", None), ("polyglot-ko-1.3b", "all"), ("polyglot-ko-3.8b", None),
          ("polyglot-ko-5.8b", None), ("qwen3-0.6b", "all"), ("qwen3-1.7b", "all"), ("qwen3-4b", "all"),
          ("llama-1.5b", "all"), ("llama-2.1b", "all"), ("gemma3-1b", "all"))
QUESTION = "한글은 누가 만들었어?"
RECOVERY, TRACEBACK = re.compile("메모리가 모자라.*다시 계산한다"), "Traceback"
PREDICTED = re.compile(r"VRAM: .*?([\d.]+) GB\(예측 ([\d.]+) GB")
SPEED, FIRST = re.compile(r"([\d.,]+) 토큰/초 ·"), re.compile(r"첫 토큰까지 ([\d.]+)초")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", default="/tmp/laptop")
    parser.add_argument("--data", default=str(ROOT / "ko-datasets/polyglot-ko-lite_textonly.json"), help="줄마다 한 행")
    parser.add_argument("--rows", type=int, default=300, help="데이터의 앞에서 쓸 행")
    parser.add_argument("--shapes", default="", help="쉼표로 이은 모양. 적지 않으면 모두")
    parser.add_argument("--free_gb", type=float, default=5.2, help="남겨 둘 VRAM. 0이면 붙들지 않는다")
    parser.add_argument("--epochs", default="1")
    options = parser.parse_args()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    lines = Path(options.data).read_text(encoding="utf-8").splitlines()[: options.rows]
    (work / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    trials = [trial for trial in TRIALS if not options.shapes or trial[0] in options.shapes.split(",")]
    rows = []
    for index, (shape, targets) in enumerate(trials):
        base = work / shape
        if index == 0 or trials[index - 1][0] != shape:
            write_folder(shape, base)
        held = hold_all_but(options.free_gb)
        context = SHAPES[shape]["max_position_embeddings"]
        rows.append({"shape": shape, "context": context, "targets": targets or "기본값",
                     **walk(base, work, options.epochs, targets)})
        del held
        if index == len(trials) - 1 or trials[index + 1][0] != shape:
            shutil.rmtree(base)
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    print_table(rows)
    print(json.dumps(rows, ensure_ascii=False))


def hold_all_but(free_gb: float):
    """카드의 여유 공간을 `free_gb`만 남기고 잡아 둔다. 돌려준 것을 버리면 놓는다."""
    import torch

    if not free_gb or not torch.cuda.is_available():
        return None
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    extra = int(torch.cuda.mem_get_info()[0] - free_gb * 1e9)
    return torch.empty(max(extra, 0), dtype=torch.uint8, device="cuda")


def walk(base: Path, work: Path, epochs: str, targets: str | None) -> dict:
    """세 단계를 지난다. 멈춘 단계가 있으면 `error`에 그 말의 끝이 있다."""
    run, merged = work / "run", work / "merged"
    for left in (run, merged):
        shutil.rmtree(left, ignore_errors=True)
    chosen = ("--lora_target_modules", targets) if targets else ()
    row: dict = {"tracebacks": 0, "recoveries": 0}
    try:
        text = call(row, "finetune-lora.py", "--base_model", base, "--data_path", work / "rows.jsonl",
                    "--output_dir", run, "--num_train_epochs", epochs, *chosen)
        report = json.loads((run / "run.json").read_text(encoding="utf-8"))
        row |= {"train_tokens_per_second": report["tokens_per_second"], "vram_gb": report["peak_vram_gb"],
                "steps": report["plan"]["steps"]}
        if found := PREDICTED.search(text):
            row["predicted_gb"] = float(found[2])
        began = time.perf_counter()
        call(row, "merge-lora.py", "--peft_root", run, "--output_dir", merged, "--verify", "False")
        row["merge_s"] = time.perf_counter() - began
        text = call(row, "generate.py", "--load_4bit", "True", "--peft_root", run, "--ask", QUESTION)
        if found := SPEED.search(text):  # 한 토큰에 끝난 답에는 속도가 없다
            row["answer_tokens_per_second"] = float(found[1].replace(",", ""))
        if found := FIRST.search(text):
            row["first_token_s"] = float(found[1])
    except RuntimeError as error:
        row["error"] = str(error)
    return row


def call(row: dict, script: str, *flags) -> str:
    """스크립트를 사용자처럼 부르고 한 말을 돌려준다.

    Raises:
        RuntimeError: 실패했다. 출력의 끝을 말한다.
    """
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], capture_output=True,
                          encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    text = done.stdout + done.stderr
    row["tracebacks"] += text.count(TRACEBACK)
    row["recoveries"] += len(RECOVERY.findall(text))
    if done.returncode:
        raise RuntimeError(f"{script} 종료 코드 {done.returncode}: {text[-600:]}")
    return text


def print_table(rows: list[dict]) -> None:
    print("\n| 모양 | LoRA | 학습 토큰/초 | VRAM(예측) GB | 병합 초 | 답 토큰/초(첫 토큰) | traceback, 메모리 부족 |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        if "error" in row:
            print(f"| {row['shape']} | {row['targets']} | {row['error'].splitlines()[-1]} | | | | "
                  f"{row['tracebacks']}, {row['recoveries']} |")
            continue
        print(f"| {row['shape']} | {row['targets']} | {row['train_tokens_per_second']:,.0f} | "
              f"{row['vram_gb'] or 0:.2f}({row.get('predicted_gb', 0):.2f}) | {row['merge_s']:.1f} | "
              f"{row.get('answer_tokens_per_second', 0):,.0f}({row.get('first_token_s', 0):.2f}) | "
              f"{row['tracebacks']}, {row['recoveries']} |")


if __name__ == "__main__":
    main()
