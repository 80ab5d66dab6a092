"""transformers의 causal LM 구조마다 작은 모델을 만들어 4비트 학습, 병합, 대화를 지나는지 센다.

    python tests/bench/count_model_types.py            모든 구조. 표와, 마지막 줄의 JSON
    python tests/bench/count_model_types.py llama bart  이 구조만. 한 말과 traceback까지 보인다

구조 하나가 멈추거나 죽어도 나머지는 센다: torch를 한 번 불러온 프로세스를 구조마다 갈라(fork) 돌린다. Linux에서만 돈다.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

SECONDS = 300  # 구조 하나에 쓰는 가장 긴 시간
WORKERS = 2
NAMES = {"pass": "같다", "fallback": "느린 길로 내려가 같다", "refused_start": "데이터를 읽기 전에 거절",
         "refused_check": "첫 step 전에 거절", "refused_late": "학습한 다음에 거절(결함)", "wrong": "값이 다르다(결함)",
         "traceback": "traceback(결함)", "unbuilt": "작게 만들지 못함"}
DEFECTS = ("refused_late", "wrong", "traceback")


def try_type(model_type: str) -> dict:
    """구조 하나를 만들고 길을 지난다."""
    from road import walk
    from tiny import tiny

    signal.alarm(SECONDS)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="model-type-") as place:
        try:
            base = tiny(model_type, Path(place) / model_type)
        except Exception as error:
            return {"type": model_type, "outcome": "unbuilt", "path": "",
                    "note": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        road = walk(base, Path(place) / "road")
    return {"type": model_type, "outcome": road.outcome, "path": road.path, "note": road.note.replace(place, ""),
            "gaps": road.gaps, "said": road.said, "seconds": round(time.perf_counter() - began, 1)}


def work(pipe, model_type: str) -> None:
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        pipe.send(try_type(model_type))


def run_all(types: list[str]):
    """구조마다의 결과를 끝나는 대로 내놓는다. 한꺼번에 `WORKERS`개를 돌린다."""
    context, waiting, running = get_context("fork"), list(types), []
    while waiting or running:
        while waiting and len(running) < WORKERS:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(theirs, waiting[0]))
            process.start()
            theirs.close()
            running.append((waiting.pop(0), process, mine))
        for place in list(running):
            model_type, process, pipe = place
            if not pipe.poll(0.1):
                continue
            try:
                yield pipe.recv()
            except EOFError:
                process.join()
                yield {"type": model_type, "outcome": "traceback", "path": "", "note": f"종료 코드 {process.exitcode}"}
            process.join()
            running.remove(place)


def main(asked: list[str]) -> None:
    import bitsandbytes
    import datasets
    import matplotlib.pyplot
    import peft
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from utils import console

    console.use_utf8()
    console.hush_libraries()
    torch.set_num_threads(1)
    del bitsandbytes, datasets, matplotlib  # 갈라진 프로세스마다 다시 불러오지 않게 한다
    results = []
    for result in run_all(asked or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        results.append(result)
        print(f"| {result['type']} | {NAMES[result['outcome']]} | {result['path']} | {result['note']} |", flush=True)
        if asked:
            print(result.get("gaps"), result.get("said", ""), sep="\n")
    counts = Counter(result["outcome"] for result in results)
    engines = Counter("engine" if "손으로 쓴" in result["path"] else "autograd" for result in results
                      if result["outcome"] == "pass")
    built = len(results) - counts["unbuilt"]
    print(f"\n작게 만든 구조 {built} / {len(results)}")
    for outcome, name in NAMES.items():
        print(f"  {name}: {counts[outcome]}")
    print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__, "peft": peft.__version__,
                      "types": len(results), "built": built, **counts, "pass_by": engines,
                      "defects": [result["type"] for result in results if result["outcome"] in DEFECTS]},
                     ensure_ascii=False))


if __name__ == "__main__":
    main(sys.argv[1:])
