"""학습 설정을 잰다: 설정만 바꾸어 시드 여럿으로 가르치고, 배우지 않은 문항을 얼마나 맞히는지 본다.

    python tests/bench/bench_settings.py run GEMMA KOBEST KOALPACA --out settings.jsonl --workers 10 --minutes 6
    python tests/bench/bench_settings.py run GEMMA KOBEST KOALPACA --only epoch rank
    python tests/bench/bench_settings.py table settings.jsonl

GEMMA는 기반 모델의 폴더, KOBEST는 {COPA,SentiNeg}-{train,dev}.tsv와 BoolQ-dev.tsv가 든 폴더, KOALPACA는 textonly
파일이다. 일꾼 여럿이 카드 하나에서 함께 배우고, 하나가 끝날 때마다 한 줄을 덧붙인다. 시간이 다 되면 그만두고, 다시
부르면 남은 것부터 한다. 값진 물음부터, 줄마다 시드를 다 채우고 다음 줄로 간다. `--only`를 적으면 이름이 그렇게
시작하는 물음만, 적은 차례로 한다. 마지막 줄은 JSON이다.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from settings_questions import TARGETS, Question, Results, best, key_of, questions, values_of  # noqa: E402

LEFT_SECONDS = 30  # 시간이 다 된 다음 하던 것을 마치게 두는 시간


def end_with_parent() -> None:
    """부모가 죽임을 당하면 함께 끝낸다. 남으면 카드를 쥐고 있는다."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(pipe, options: dict) -> None:
    """일꾼 하나: 설정을 받아 결과를 돌려준다. None을 받으면 끝낸다."""
    import gc

    import torch
    from settings_lab import Lab
    from transformers.utils.logging import disable_progress_bar

    from utils.errors import UsageError

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    disable_progress_bar()
    lab = Lab(**options)
    pipe.send(None)
    while (one := pipe.recv()) is not None:
        try:
            result = lab.run(one)
        except UsageError as error:  # 발산
            result = {"error": str(error)[:200]}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-2000:]}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        pipe.send(result)


class Worker:
    """`work`를 도는 프로세스 하나. 준비가 되었을 때와 설정 하나를 마칠 때마다 `pipe`가 읽힌다.

    Attributes:
        case: 지금 배우는 설정. 준비하는 중이면 None이다.
    """

    def __init__(self, settings: dict):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.case: dict | None = None
        self.process = spawn.Process(target=work, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()

    def take(self, case: dict) -> None:
        self.case = case
        self.pipe.send(case)

    def result(self) -> dict | None:
        try:
            return self.pipe.recv()
        except EOFError:
            return {"error": "일꾼이 죽었다", "trace": ""}


def run(options: argparse.Namespace) -> None:
    out, began = Path(options.out), time.perf_counter()
    results, started, asked = read_results(out), set(), questions(options.only)
    settings = {"base": options.base, "kobest": options.kobest, "koalpaca": options.koalpaca, "rows": options.rows}
    until = began + 60 * options.minutes
    workers = [Worker(settings) for _ in range(options.workers)]
    while workers and time.perf_counter() < until + LEFT_SECONDS:
        ready = wait([worker.pipe for worker in workers], timeout=1)
        for worker in [worker for worker in workers if worker.pipe in ready]:
            case, result = worker.case, worker.result()
            if case is not None:
                line = {**case, **result}
                results[key_of(case)] = line
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                print(f"{time.perf_counter() - began:5.0f}s {brief(line)}", flush=True)
            if broken := result is not None and "trace" in result:
                print(result["trace"], flush=True)
            following = None if time.perf_counter() >= until else next_case(asked, results, started)
            if broken or following is None:
                worker.process.terminate()
                workers.remove(worker)
            if broken and case is not None:  # 어떤 상태로 남았는지 모르니 새로 부른다. 시작하다 죽었으면 다시 죽는다
                workers.append(Worker(settings))
            elif not broken and following is not None:
                started.add(key_of(following))
                worker.take(following)
    for worker in workers:
        worker.process.terminate()
    print(f"{time.perf_counter() - began:.0f}초, 모두 {len(results)}개")
    show(out)


def next_case(asked: list[Question], results: Results, started: set[str]) -> dict | None:
    """아직 시작하지 않은 첫 설정."""
    every = (one for question in asked for one in question.cases())
    return next((one for one in every if key_of(one) not in results and key_of(one) not in started), None)


def read_results(file: Path) -> Results:
    """이미 잰 것. 죽거나 실패한 것은 다시 한다."""
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = ("task", "rows", "flags", "extra", "seed")
    return {key_of({name: line[name] for name in names}): line for line in lines if "error" not in line}


def brief(line: dict) -> str:
    flags = {name: value for name, value in line["flags"].items() if name != "lora_target_modules"}
    found = {name: round(line[name], 4) for name in ("accuracy", "choice_loss", "answer_loss", "val_loss")
             if line.get(name) is not None}
    return (f"{line['task']} {line['flags']['lora_target_modules'][0]} {flags} {line['extra']} {line['rows']} "
            f"seed {line['seed']}: {found} {line.get('steps')} step {line.get('path', '')[:12]} {line.get('seconds')} "
            f"{line.get('error', '')}")


def show(file: Path) -> None:
    """물음마다의 표와, 학습률을 짧은 시험으로 고르는 것의 표."""
    results = read_results(file)
    summary: dict = {}
    for question in questions():
        if not any(key_of(one) in results for one in question.cases()):
            continue
        print(f"\n### {question.title}\n\n| | 맞힌 비율 | 고르기의 loss | 정답의 loss | 검증 loss | step | 시드 |\n"
              "| --- | --- | --- | --- | --- | --- | --- |")
        summary[question.title] = {}
        for name, one in question.rows:
            cells, kept = [], {}
            for measure, percent in (("accuracy", True), ("choice_loss", False), ("answer_loss", False),
                                     ("val_loss", False)):
                values = values_of(results, one, question.seeds, measure)
                cells.append(cell(values, percent))
                if values:
                    kept[measure] = [round(value, 5) for value in values]
            steps = values_of(results, one, question.seeds, "steps")
            print(f"| {name} | {' | '.join(cells)} | {steps[0] if steps else ''} | {len(steps)} |")
            summary[question.title][name] = kept
    if (place := best(results)) is not None:
        print(f"\nSentiNeg와 KoAlpaca에서 함께 가장 덜 뒤지는 것: {place[0]}, {place[1]:g}")
    summary["학습률 고르기"] = show_probes(results)
    print(json.dumps(summary, ensure_ascii=False))


def cell(values: list[float], percent: bool) -> str:
    """평균 ± 표준오차."""
    if not values:
        return ""
    mean = statistics.mean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{mean:.1%} ±{error:.1%}" if percent else f"{mean:.4f} ±{error:.4f}"


def show_probes(results: Results) -> dict:
    """`--learning_rate auto`가 있다면: 3%(와 10%)까지만 배운 검증 loss로 고른 학습률의 끝의 값.

    비교할 것은 하나로 정해 둔 학습률과, 표에서 가장 좋은 것이다.
    """
    print("\n### 학습률을 짧은 시험으로 고르기\n\n| 설정 | 3%에서 고른 것 | 10%에서 고른 것 | 1e-3 | 가장 좋은 것 |\n"
          "| --- | --- | --- | --- | --- |")
    found = {}
    for task, measure in (("sentineg", "accuracy"), ("koalpaca", "answer_loss"), ("boolq", "accuracy"),
                          ("copa", "accuracy")):
        question = next(each for each in questions() if each.title.lower().startswith(f"{task}: "))
        for targets in TARGETS:
            rows = {one["flags"]["learning_rate"]: one for _, one in question.rows
                    if one["flags"]["lora_target_modules"] == [targets]}
            finals = {rate: values for rate, one in rows.items()
                      if len(values := values_of(results, one, question.seeds, measure)) == len(question.seeds)}
            if not finals or 1e-3 not in finals:
                continue
            means = {rate: statistics.mean(values) for rate, values in finals.items()}
            pick: Callable = max if measure == "accuracy" else min
            top = pick(means, key=means.get)
            chosen = [picked(results, rows, finals, question.seeds, name) for name in ("probe_loss", "tenth_loss")]
            cells = [f"{text}: {value:.4f}" for text, value in
                     (*chosen, ("1e-3", means[1e-3]), (f"{top:g}", means[top]))]
            print(f"| {task} {targets} | {' | '.join(cells)} |")
            found[f"{task} {targets}"] = cells
    return found


def picked(results: Results, rows: dict, finals: dict, seeds, name: str) -> tuple[str, float]:
    """시드마다 `name`의 검증 loss가 가장 낮은 학습률들과, 그것으로 끝까지 배운 값의 평균."""
    rates, values = [], []
    for place, seed in enumerate(seeds):
        early = {rate: results[key_of({**rows[rate], "seed": seed})].get(name) for rate in finals}
        early = {rate: loss for rate, loss in early.items() if loss is not None}
        rates.append(min(early, key=early.get))
        values.append(finals[rates[-1]][place])
    return "/".join(f"{rate:g}" for rate in rates), statistics.mean(values)


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    for name in ("base", "kobest", "koalpaca"):
        runs.add_argument(name)
    runs.add_argument("--out", default="settings.jsonl")
    runs.add_argument("--workers", type=int, default=8)
    runs.add_argument("--minutes", type=float, default=6.0)
    runs.add_argument("--only", nargs="+", help="이름이 이렇게 시작하는 물음만")
    runs.add_argument("--rows", type=int, default=0, help="학습과 시험의 행을 이만큼만. 돌아가는지 볼 때")
    commands.add_parser("table").add_argument("file")
    options = parser.parse_args()
    if options.command == "run":
        run(options)
    else:
        show(Path(options.file))


if __name__ == "__main__":
    main()
