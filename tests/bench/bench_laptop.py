"""6 GB 노트북의 하루를 큰 카드에서 지난다: 빈 VRAM을 5.2 GB만 남기고, 사용자가 치는 그대로 배우고 합치고 묻는다.

    python tests/bench/bench_laptop.py --work /dev/shm/laptop --out laptop.jsonl
    python tests/bench/bench_laptop.py --shapes qwen3-0.6b --free_gb 0 --epochs 0.05    VRAM을 붙들지 않는다(CPU도 된다)

모델 폴더(모두 50 GB)는 따로 도는 프로세스들이 미리 쓰고, 합치기(CPU)는 다음 모양이 배우는 동안 한다. 단계마다 잰 것을
곧바로 JSON 한 줄로 찍고 `--out`에 더한다. 다시 부르면 `--out`에 세 단계가 다 있는 모양은 지나간다. 스크립트의 말은
work/<모양>-<층>-<단계>.log에 몇 초에 나왔는지와 함께 남는다. 실패한 단계는 그 말을 적고 다음 모양으로 간다.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from bench_scale import steady_speed  # noqa: E402
from modern import write_folder  # noqa: E402

# (모양, LoRA를 붙일 층). 적지 않은 것은 기본값이다
TRIALS = (("polyglot-ko-1.3b", None), ("polyglot-ko-1.3b", "all"), ("polyglot-ko-3.8b", None),
          ("polyglot-ko-5.8b", None), ("qwen3-0.6b", None), ("qwen3-1.7b", None), ("qwen3-4b", None),
          ("llama-1.5b", None), ("llama-2.1b", None), ("gemma3-1b", None))
DATA = ROOT / "ko-datasets/polyglot-ko-lite_textonly.json"
QUESTION = "한글은 누가 만들었어?"
WRITERS = 4  # 모델 폴더를 나란히 쓰는 프로세스의 수
WATCH_EVERY = 0.01  # 카드에 남은 양을 보는 간격(초)
TRACEBACK, RECOVERY = "Traceback", re.compile("메모리가 모자라.*다시 계산한다")
PREDICTED = re.compile(r"VRAM: .*?([\d.]+) GB\(예측 ([\d.]+) GB")
RECOMPUTED = re.compile(r"재계산 (\d+)/")
SPEED, FIRST = re.compile(r"([\d.,]+) 토큰/초 ·"), re.compile(r"첫 토큰까지 ([\d.]+)초")
LONGEST = re.compile(r"대화 길이: 질문과 답을 합쳐 ([\d,]+)토큰")


@dataclass
class Trial:
    """모양 하나와 LoRA를 붙일 층. `row`에 잰 것이 쌓인다."""

    shape: str
    targets: str | None
    work: Path
    row: dict = field(default_factory=lambda: {"tracebacks": 0, "recoveries": 0})
    merging: Future | None = None

    def __post_init__(self):
        self.name = f"{self.shape}-{self.targets or 'default'}"
        self.base = self.work / self.shape
        self.run, self.merged = self.work / f"{self.name}-run", self.work / f"{self.name}-merged"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("/tmp/laptop"))
    parser.add_argument("--shapes", default="", help="쉼표로 이은 모양. 이 차례로 간다. 적지 않으면 모두")
    parser.add_argument("--free_gb", type=float, default=5.2, help="남겨 둘 VRAM. 0이면 붙들지 않는다")
    parser.add_argument("--epochs", default="1")
    parser.add_argument("--out", type=Path, default=Path("laptop.jsonl"), help="잰 것을 한 줄씩 더할 파일")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    trials = [Trial(*each, options.work) for each in TRIALS]
    if options.shapes:
        shapes = options.shapes.split(",")
        trials = sorted((each for each in trials if each.shape in shapes), key=lambda each: shapes.index(each.shape))
    known = read_rows(options.out)
    for trial in trials:
        trial.row = known.get(trial.name, trial.row)
    try:
        walk_all([trial for trial in trials if trial.name not in known], options)
    finally:
        print_table(trials)


def read_rows(out: Path) -> dict[str, dict]:
    """모양마다 이미 잰 것. 세 단계가 다 있는 것만."""
    rows: dict[str, dict] = {}
    for line in out.read_text(encoding="utf-8").splitlines() if out.exists() else ():
        row = json.loads(line)
        rows[row["trial"]] = row if row["stage"] == "train" else rows.get(row["trial"], {}) | row
    return {name: row for name, row in rows.items() if "ask_s" in row and "error" not in row}


def walk_all(trials: list[Trial], options) -> None:
    """모양마다 배우고, 합치는 일을 곁에 맡기고, 그 앞의 모양에게 묻는다. 카드는 한 번에 한 단계만 쓴다."""
    with ProcessPoolExecutor(WRITERS, get_context("spawn")) as writers, ThreadPoolExecutor(1) as merger:
        written = {shape: writers.submit(write_once, shape, options.work / shape)
                   for shape in dict.fromkeys(trial.shape for trial in trials)}
        for before, trial in zip([None, *trials], [*trials, None], strict=True):
            held = hold_all_but(options.free_gb)  # 그 사이에 다른 프로그램이 카드를 쓰거나 놓았으면 다시 맞춘다
            if trial is not None:
                written[trial.shape].result()
                measure(trial, "train", partial(train, trial, options.epochs), options.out)
                trial.merging = merger.submit(measure, trial, "merge", partial(merge, trial), options.out)
            if before is not None:
                before.merging.result()
                measure(before, "ask", partial(ask, before), options.out)
                for left in (before.run, before.merged):
                    shutil.rmtree(left, ignore_errors=True)
            del held


def write_once(shape: str, folder: Path) -> None:
    """토크나이저를 맨 끝에 쓰므로 그것이 있으면 온전한 폴더다."""
    if not (folder / "tokenizer.json").is_file():
        write_folder(shape, folder)


def measure(trial: Trial, stage: str, work, out: Path) -> None:
    """단계 하나를 지나며 잰 것을 찍는다. 앞 단계가 실패했으면 하지 않는다."""
    if "error" in trial.row:
        return
    began = time.perf_counter()
    try:
        found = work()
    except RuntimeError as error:
        found = {"error": str(error)}
    found[f"{stage}_s"] = time.perf_counter() - began
    trial.row |= found
    line = json.dumps({"trial": trial.name, "stage": stage, **found, "tracebacks": trial.row["tracebacks"],
                       "recoveries": trial.row["recoveries"]}, ensure_ascii=False)
    print(line, flush=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def train(trial: Trial, epochs: str) -> dict:
    chosen = ("--lora_target_modules", trial.targets) if trial.targets else ()
    with Watch("train") as watch:
        text = call(trial, "train", "finetune-lora.py", "--base_model", trial.base, "--data_path", DATA, "--output_dir",
                    trial.run, "--num_train_epochs", epochs, "--batch_size", 16, "--verbose", "True", *chosen)
    report = json.loads((trial.run / "run.json").read_text(encoding="utf-8"))
    history = [entry for entry in report["history"] if "loss" in entry]
    tokens = report["data"]["train_tokens"] * float(epochs) / len(history)
    found = {"train_tokens_per_second": steady_speed(history, tokens, skip=2), "steps": len(history),
             "path": report["path"], "peak_ram_gb": report["peak_ram_gb"], **watch.found}
    if told := PREDICTED.search(text):
        recomputed = RECOMPUTED.search(report["path"])
        found |= {"vram_gb": report["peak_vram_gb"], "predicted_gb": float(told[2]),
                  "recomputed": int(recomputed[1]) if recomputed else None}
    return found


def merge(trial: Trial) -> dict:
    call(trial, "merge", "merge-lora.py", "--peft_root", trial.run, "--output_dir", trial.merged, "--verify", "False")
    return {"merged_gb": sum(file.stat().st_size for file in trial.merged.glob("*.safetensors")) / 1e9}


def ask(trial: Trial) -> dict:
    with Watch("ask") as watch:
        text = call(trial, "ask", "generate.py", "--load_4bit", "True", "--base_model", trial.merged, "--ask", QUESTION,
                    "--verbose", "True")
    found = watch.found
    for name, pattern in (("answer_tokens_per_second", SPEED), ("first_token_s", FIRST), ("longest", LONGEST)):
        if told := pattern.search(text):  # 한 토큰에 끝난 답에는 속도가 없다
            found[name] = float(told[1].replace(",", ""))
    return found


def call(trial: Trial, stage: str, script: str, *flags) -> str:
    """스크립트를 사용자처럼 부르고 한 말을 돌려준다.

    Raises:
        RuntimeError: 실패했다. 출력의 끝을 말한다.
    """
    began, lines = time.perf_counter(), []
    command = [sys.executable, "-u", str(ROOT / script), *map(str, flags)]
    with (trial.work / f"{trial.name}-{stage}.log").open("w", encoding="utf-8") as log, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
            env={**os.environ, "PYTHONIOENCODING": "utf-8"}) as process:
        for line in process.stdout:
            lines.append(line)
            log.write(f"{time.perf_counter() - began:6.1f} {line}")
            log.flush()
    text = "".join(lines)
    trial.row["tracebacks"] += text.count(TRACEBACK)
    trial.row["recoveries"] += len(RECOVERY.findall(text))
    if process.returncode:
        raise RuntimeError(f"{script} 종료 코드 {process.returncode}: {text[-600:]}")
    return text


def hold_all_but(free_gb: float):
    """카드의 여유 공간을 `free_gb`만 남기고 잡아 둔다. 돌려준 것을 버리면 놓는다."""
    import torch

    if not free_gb or not torch.cuda.is_available():
        return None
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    extra = int(torch.cuda.mem_get_info()[0] - free_gb * 1e9)
    return torch.empty(max(extra, 0), dtype=torch.uint8, device="cuda")


class Watch:
    """`with` 안에 있는 동안 카드에 남은 양을 본다.

    Attributes:
        found: `with`를 나온 다음, 더 쓰인 것의 최댓값과(CUDA context까지 센다) 남은 것의 최댓값, GB.
    """

    def __init__(self, stage: str):
        self.stage, self.found, self.seen, self.ended = stage, {}, [], threading.Event()

    def __enter__(self) -> "Watch":
        import torch

        self.thread = threading.Thread(target=self._look, args=(torch.cuda.mem_get_info,), daemon=True)
        if torch.cuda.is_available():
            self.seen.append(torch.cuda.mem_get_info()[0] / 1e9)
            self.thread.start()
        return self

    def _look(self, room) -> None:
        while not self.ended.wait(WATCH_EVERY):
            self.seen.append(room()[0] / 1e9)

    def __exit__(self, *_) -> None:
        self.ended.set()
        if self.seen:
            self.thread.join()
            self.found = {f"{self.stage}_card_gb": self.seen[0] - min(self.seen),
                          f"{self.stage}_free_gb": max(self.seen)}


def print_table(trials: list[Trial]) -> None:
    heads = ("모델(LoRA를 붙인 층)", "학습 토큰/초", "VRAM(예측) GB", "다시 계산한 층", "합치기, 초",
             "대화 토큰/초(첫 토큰, 초)", "대화의 길이(토큰)", "카드에서 쓴 것 GB: 학습, 대화", "traceback, 복구")
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for trial in trials:
        def shown(name: str, form: str = "", row: dict = trial.row) -> str:
            return format(row[name], form) if row.get(name) is not None else ""

        cells = [f"{trial.shape} ({trial.targets or '기본값'})", shown("train_tokens_per_second", ",.0f"),
                 f"{shown('vram_gb', '.2f')} ({shown('predicted_gb', '.2f')})", shown("recomputed"),
                 shown("merge_s", ".0f"),
                 f"{shown('answer_tokens_per_second', ',.0f')} ({shown('first_token_s', '.2f')})",
                 shown("longest", ",.0f"), f"{shown('train_card_gb', '.2f')}, {shown('ask_card_gb', '.2f')}",
                 f"{shown('tracebacks')}, {shown('recoveries')}"]
        print(f"| {' | '.join(cells)} | {trial.row.get('error', '')[-200:]}", flush=True)


if __name__ == "__main__":
    main()
