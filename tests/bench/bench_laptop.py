"""6 GB 노트북의 하루를 큰 카드에서 지난다: 빈 VRAM을 5.2 GB만 남기고, 사용자가 치는 그대로 배우고 합치고 묻는다.

    python tests/bench/bench_laptop.py --work /dev/shm/laptop --out laptop.jsonl
    python tests/bench/bench_laptop.py --shapes qwen3-0.6b --free_gb 0 --epochs 0.05    VRAM을 붙들지 않는다(CPU도 된다)

모델 폴더는 따로 도는 프로세스들이 미리 쓰고, 합치기(CPU)는 다음 모양이 배우는 동안 한다. 단계마다 잰 것을 곧바로 JSON
한 줄로 찍고 `--out`에 더한다. 다시 부르면 `--out`에 세 단계가 다 있는 모양은 지나간다. 스크립트의 말은
work/<모양>-<층>-<단계>.log에 몇 초에 나왔고 카드를 얼마나 썼는지와 함께 남는다. 실패한 단계는 그 말을 적고 다음
모양으로 간다.
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

# (모양, LoRA를 붙일 층). 적지 않은 것은 기본값이다. 값진 것부터다
TRIALS = (("polyglot-ko-1.3b", None), ("qwen3-1.7b", None), ("llama-1.5b", None), ("gemma3-1b", None),
          ("polyglot-ko-1.3b", "all"), ("qwen3-4b", None), ("polyglot-ko-5.8b", None), ("llama-2.1b", None),
          ("polyglot-ko-3.8b", None), ("qwen3-0.6b", None))
QUESTION = "한글은 누가 만들었어?"
WRITERS = 4  # 모델 폴더를 나란히 쓰는 프로세스의 수
WATCH_EVERY = 0.01  # 카드에 남은 양을 보는 간격(초)
# 학습이 한 말의 시작 -> 그 말로 끝난 단계. 단계마다 카드에서 쓴 것의 최댓값을 적는다
ENDS = {"모델:": "load", "학습 길:": "check", "결과": "train", "어댑터:": "answers"}
RECOVERY, TRACEBACK = re.compile("메모리가 모자라.*다시 계산한다"), "Traceback"
PREDICTED = re.compile(r"VRAM: .*?([\d.]+) GB\(예측 ([\d.]+) GB")
PLANNED, RECOMPUTED = re.compile(r"블록, 재계산 (\d+)층"), re.compile(r"재계산 (\d+)/")
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

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.targets or 'default'}"

    @property
    def is_done(self) -> bool:
        return "ask_s" in self.row and "error" not in self.row

    @property
    def base(self) -> Path:
        return self.work / self.shape

    @property
    def run(self) -> Path:
        return self.work / f"{self.name}-run"

    @property
    def merged(self) -> Path:
        return self.work / f"{self.name}-merged"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", default="/tmp/laptop")
    parser.add_argument("--data", default=str(ROOT / "ko-datasets/polyglot-ko-lite_textonly.json"))
    parser.add_argument("--shapes", default="", help="쉼표로 이은 모양. 이 차례로 간다. 적지 않으면 모두")
    parser.add_argument("--free_gb", type=float, default=5.2, help="남겨 둘 VRAM. 0이면 붙들지 않는다")
    parser.add_argument("--epochs", default="1")
    parser.add_argument("--out", default=None, help="잰 것을 한 줄씩 더할 파일")
    options = parser.parse_args()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    trials = [Trial(shape, targets, work) for shape, targets in TRIALS]
    if options.shapes:
        shapes = options.shapes.split(",")
        trials = sorted((each for each in trials if each.shape in shapes), key=lambda each: shapes.index(each.shape))
    recall(trials, options.out)
    try:
        walk_all([trial for trial in trials if not trial.is_done], options)
    finally:
        print_table(trials)


def recall(trials: list[Trial], out: str | None) -> None:
    """`out`에 세 단계가 다 있는 모양의 잰 것을 되찾는다."""
    rows: dict[str, dict] = {}
    for line in Path(out).read_text(encoding="utf-8").splitlines() if out and Path(out).exists() else ():
        stage = json.loads(line)
        rows[stage["trial"]] = stage if stage["stage"] == "train" else rows.get(stage["trial"], {}) | stage
    for trial in trials:
        if "ask_s" in (row := rows.get(trial.name, {})) and "error" not in row:
            trial.row = row


def walk_all(trials: list[Trial], options) -> None:
    """모양마다 배우고, 합치는 일을 곁에 맡기고, 그 앞의 모양에게 묻는다. 카드는 한 번에 한 단계만 쓴다."""
    held = None
    shapes = list(dict.fromkeys(trial.shape for trial in trials))
    with ProcessPoolExecutor(WRITERS, get_context("spawn")) as writers, ThreadPoolExecutor(1) as merger:
        written = {shape: writers.submit(write_once, shape, Path(options.work) / shape) for shape in shapes}
        before: Trial | None = None
        for index, trial in enumerate(trials):
            began = time.perf_counter()
            written[trial.shape].result()
            trial.row["waited_s"] = time.perf_counter() - began
            del held  # 그 사이에 다른 프로그램이 카드를 쓰거나 놓았으면 다시 맞춘다
            held = hold_all_but(options.free_gb)
            measure(trial, "train", partial(train, trial, options), options.out)
            last = all(later.shape != trial.shape for later in trials[index + 1:])
            trial.merging = merger.submit(measure, trial, "merge", partial(merge, trial, last), options.out)
            if before is not None:
                finish(before, options.out)
            before = trial
        if before is not None:
            finish(before, options.out)
    del held


def write_once(shape: str, folder: Path) -> None:
    """토크나이저를 맨 끝에 쓰므로 그것이 있으면 온전한 폴더다."""
    if not (folder / "tokenizer.json").is_file():
        write_folder(shape, folder)


def finish(trial: Trial, out: str | None) -> None:
    """합치기를 기다려 합친 모델에게 묻는다."""
    trial.merging.result()
    measure(trial, "ask", partial(ask, trial), out)
    for left in (trial.run, trial.merged):
        shutil.rmtree(left, ignore_errors=True)


def measure(trial: Trial, stage: str, work, out: str | None) -> None:
    """단계 하나를 지나며 잰 것을 찍는다. 앞 단계가 실패했으면 하지 않는다."""
    if "error" in trial.row:
        return
    began = time.perf_counter()
    try:
        found = work()
    except RuntimeError as error:
        found = {"error": str(error)}
    found[f"{stage}_s"] = time.perf_counter() - began
    trial.row.update(found)
    line = json.dumps({"trial": trial.name, "stage": stage, **found, "tracebacks": trial.row["tracebacks"],
                       "recoveries": trial.row["recoveries"]}, ensure_ascii=False)
    print(line, flush=True)
    if out:
        with Path(out).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def train(trial: Trial, options) -> dict:
    chosen = ("--lora_target_modules", trial.targets) if trial.targets else ()
    with Watch() as watch:
        text = call(trial, "train", watch, "finetune-lora.py", "--base_model", trial.base, "--data_path", options.data,
                    "--output_dir", trial.run, "--num_train_epochs", options.epochs, "--batch_size", 16,
                    "--verbose", "True", *chosen)
    report = json.loads((trial.run / "run.json").read_text(encoding="utf-8"))
    history = [entry for entry in report["history"] if "loss" in entry]
    tokens = report["data"]["train_tokens"] * float(options.epochs) / len(history)
    found = {"train_tokens_per_second": steady_speed(history, tokens, skip=2), "steps": len(history),
             "path": report["path"], "loop_s": report["train_seconds"], "peak_ram_gb": report["peak_ram_gb"],
             **watch.found("train")}
    if told := PREDICTED.search(text):
        planned, done = PLANNED.search(text), RECOMPUTED.search(report["path"])
        found |= {"vram_gb": report["peak_vram_gb"], "predicted_gb": float(told[2]),
                  "planned_layers": int(planned[1]) if planned else 0, "recomputed": int(done[1]) if done else None}
    return found


def merge(trial: Trial, last: bool) -> dict:
    """합친다. 이 모양을 더 배우지 않으면 기반 모델을 지운다."""
    call(trial, "merge", None, "merge-lora.py", "--peft_root", trial.run, "--output_dir", trial.merged, "--verify",
         "False")
    size = sum(file.stat().st_size for file in trial.merged.glob("*.safetensors"))
    if last:
        shutil.rmtree(trial.base)
    return {"merged_gb": size / 1e9}


def ask(trial: Trial) -> dict:
    with Watch() as watch:
        text = call(trial, "ask", watch, "generate.py", "--load_4bit", "True", "--base_model", trial.merged, "--ask",
                    QUESTION, "--verbose", "True")
    found = watch.found("ask")
    for name, pattern in (("answer_tokens_per_second", SPEED), ("first_token_s", FIRST), ("longest", LONGEST)):
        if told := pattern.search(text):  # 한 토큰에 끝난 답에는 속도가 없다
            found[name] = float(told[1].replace(",", ""))
    return found


def call(trial: Trial, stage: str, watch: "Watch | None", script: str, *flags) -> str:
    """스크립트를 사용자처럼 부르고 한 말을 돌려준다. 줄마다 몇 초에 나왔고 그때까지 카드를 얼마나 썼는지 남긴다.

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
            used = watch.told(line) if watch else 0.0
            log.write(f"{time.perf_counter() - began:6.1f} {used:5.2f} {line}")
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
    """`with` 안에 있는 동안 카드에서 더 쓰인 것의 최댓값을 잰다. CUDA context까지 센다."""

    def __enter__(self) -> "Watch":
        import torch

        self.most, self.recent, self.free, self.ended = 0, 0, 0, threading.Event()
        self.thread, self.step, self.peaks = None, 0.0, {}
        if torch.cuda.is_available():
            self.thread = threading.Thread(target=self._look, args=(torch.cuda.mem_get_info,), daemon=True)
            self.thread.start()
        return self

    def _look(self, room) -> None:
        free = room()[0]
        while not self.ended.wait(WATCH_EVERY):
            left = room()[0]
            used, self.free = free - left, max(self.free, left)
            self.most, self.recent = max(self.most, used), max(self.recent, used)

    def told(self, line: str) -> float:
        """앞의 줄부터 이 줄까지 쓴 것의 최댓값(GB)."""
        used, self.recent = self.recent / 1e9, 0
        self.step = max(self.step, used)
        for start, name in ENDS.items():
            if line.startswith(start):
                self.peaks[f"{name}_peak_gb"], self.step = self.step, 0.0
        return used

    def __exit__(self, *_) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join()

    def found(self, stage: str) -> dict:
        if self.thread is None:
            return {}
        return {f"{stage}_card_gb": self.most / 1e9, f"{stage}_free_gb": self.free / 1e9, **self.peaks}


def print_table(trials: list[Trial]) -> None:
    print("\n| 모양 | LoRA | 학습 토큰/초 | VRAM(예측) GB, 재계산한 층 | 카드에서 쓴 것 GB: 학습, 대화 | 병합 초 | "
          "답 토큰/초(첫 토큰) | traceback, 메모리 부족 |")
    print("|---|---|---|---|---|---|---|---|")
    for trial in trials:
        row = trial.row
        cells = [trial.shape, trial.targets or "기본값", shown(row, "train_tokens_per_second", ",.0f"),
                 f"{shown(row, 'vram_gb', '.2f')}({shown(row, 'predicted_gb', '.2f')}), {row.get('recomputed', '')}",
                 f"{shown(row, 'train_card_gb', '.2f')}, {shown(row, 'ask_card_gb', '.2f')}",
                 shown(row, "merge_s", ".1f"),
                 f"{shown(row, 'answer_tokens_per_second', ',.0f')}({shown(row, 'first_token_s', '.2f')})",
                 f"{row['tracebacks']}, {row['recoveries']}"]
        print(f"| {' | '.join(cells)} |" + (f" {row['error'].splitlines()[-1]}" if "error" in row else ""), flush=True)


def shown(row: dict, name: str, form: str) -> str:
    return format(row[name], form) if row.get(name) is not None else ""


if __name__ == "__main__":
    main()
