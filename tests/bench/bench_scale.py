"""카드 두 장의 학습을 한 번에 잰다. 표를 찍고 마지막 줄에 JSON을 남긴다.

    python tests/bench/bench_scale.py --work /tmp/scale

1. 나누어 담는 학습: 12.8b를 FSDP로 두 장에 나누어 13 step 배우고, 저장한 어댑터를 all_gather로 모은 것과 비교하고,
   5 step을 이어서 배우고, 합친다.
2. 데이터 병렬: 1.3b(batch 64)와, 모든 선형층에 LoRA를 붙인 Qwen3-1.7B(batch 16)를 한 장과 두 장에서 배운다.

NVIDIA H200 두 장, torch 2.11+cu130, transformers 5.17, bitsandbytes 0.50.2에서 잰 값:

| 모양 | batch | 프로세스 | 토큰/초 | 카드마다 GB | 효율 | loss 차이 |
|---|---|---|---|---|---|---|
| 12.8b (FSDP) 13 step | 4 | 2 | 3,010 | 6.25 | | |
| 12.8b (FSDP) 이어서 5 step | 4 | 2 | 2,921 | 6.25 | | |
| 1.3b | 64 | 1 | 74,138 | 2.02 | | |
| 1.3b | 64 | 2 | 147,329 | 2.02 | 0.994 | 2.6e-05 |
| qwen3-1.7b | 16 | 1 | 40,960 | 3.23 | | |
| qwen3-1.7b | 16 | 2 | 80,174 | 3.23 | 0.979 | 1.3e-05 |

저장한 어댑터의 tensor 80개(값 6,553,600개)는 all_gather로 모은 것과 비트까지 같았다.
합치기는 25초였다(25.8 GB, 검산 없이).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from modern import write_folder  # noqa: E402

FSDP = ("--use_fsdp", "--fsdp_version", "1", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
        "--fsdp_transformer_layer_cls_to_wrap", "GPTNeoXLayer", "--fsdp_use_orig_params", "false",
        "--fsdp_sync_module_states", "true", "--fsdp_cpu_ram_efficient_loading", "false",
        "--fsdp_state_dict_type", "FULL_STATE_DICT", "--mixed_precision", "bf16")
BATCHES = {"polyglot-ko-12.8b": 4, "polyglot-ko-1.3b": 64, "qwen3-1.7b": 16}
ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
FIRST, MORE = 13, 5  # 나누어 담는 학습의 step과, 이어서 배우는 step
# NVLink의 multicast는 카드를 함께 쓰는 다른 프로그램까지 멈추게 할 수 있어 끈다
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
ADAPTER = "adapter_model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", default="/tmp/scale")
    parser.add_argument("--data", default=str(ROOT / "ko-datasets/polyglot-ko-lite_textonly.json"))
    parser.add_argument("--shapes", default=",".join(BATCHES))
    parser.add_argument("--steps", type=int, default=20, help="데이터 병렬의 step")
    parser.add_argument("--seconds", type=int, default=560, help="모두 합쳐 이보다 오래 걸리면 남은 것을 하지 않는다")
    options = parser.parse_args()
    options.deadline = time.perf_counter() + options.seconds
    Path(options.work).mkdir(parents=True, exist_ok=True)
    rows = []
    for shape in options.shapes.split(","):
        row = {"shape": shape, "batch": BATCHES[shape]}
        rows.append(row)
        try:
            (sharded if shape == "polyglot-ko-12.8b" else parallel)(options, row)
        except subprocess.TimeoutExpired as late:
            row["error"] = f"시간이 모자란다: {' '.join(late.cmd)[-300:]}"
        except RuntimeError as error:
            row["error"] = str(error)
        print(json.dumps(row, ensure_ascii=False), flush=True)
        shutil.rmtree(Path(options.work) / shape, ignore_errors=True)
    print_table(rows)
    print(json.dumps(rows, ensure_ascii=False))


def sharded(options, row: dict) -> None:
    """나누어 담아 배우고, 저장한 것을 확인하고, 이어서 배우고, 합친다. 끝낸 것부터 `row`에 적는다."""
    from gather_too import compare

    work, batch = Path(options.work), row["batch"]
    base = write_folder(row["shape"], work / row["shape"])
    output, gathered, merged = work / "sharded", work / "gathered.safetensors", work / "merged"
    for left in (output, merged):
        shutil.rmtree(left, ignore_errors=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *FSDP,
              str(ROOT / "tests/gather_too.py"), str(gathered)]
    row["fsdp"] = train(options, launch, base, output, batch, FIRST)
    row["saved"] = compare(output / ADAPTER, gathered)
    row["resumed"] = train(options, launch, base, output, batch, FIRST + MORE, "--resume_from_checkpoint", "True")
    row["resumed_saved"] = compare(output / ADAPTER, gathered)
    row["history_kept"] = row["resumed"]["losses"][:FIRST] == row["fsdp"]["losses"]
    began = time.perf_counter()
    call(options, [sys.executable, str(ROOT / "merge-lora.py"), "--peft_root", str(output), "--output_dir",
                   str(merged), "--verify", "False"])  # 검산은 26 GB를 네 번 읽어 카드를 오래 붙든다
    row["merge_s"] = time.perf_counter() - began
    row["merged_gb"] = sum(file.stat().st_size for file in merged.glob("*.safetensors")) / 1e9
    shutil.rmtree(merged)


def parallel(options, row: dict) -> None:
    """같은 것을 한 장과 두 장에서 배운다."""
    shape, work = row["shape"], Path(options.work)
    base = write_folder(shape, work / shape)
    extra = ("--lora_target_modules", ALL_LINEAR) if shape.startswith("qwen3") else ()
    for label, processes in (("one", 1), ("two", 2)):
        output = work / f"{shape}-{processes}"
        shutil.rmtree(output, ignore_errors=True)
        row[label] = train(options, torchrun(processes), base, output, row["batch"], options.steps, *extra)
    losses = zip(row["one"]["losses"], row["two"]["losses"], strict=True)
    row["loss_gap"] = max(abs(one - two) / abs(one) for one, two in losses)
    row["efficiency"] = row["two"]["tokens_per_second"] / row["one"]["tokens_per_second"] / 2


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def call(options, command: list[str]) -> None:
    """실제 스크립트를 실행한다.

    Raises:
        RuntimeError: 실패했다. 출력의 끝을 말한다.
    """
    left = options.deadline - time.perf_counter()
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=max(left, 1),
                          env={**os.environ, "PYTHONIOENCODING": "utf-8", **NO_MULTICAST})
    if done.returncode:
        raise RuntimeError(f"종료 코드 {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}")


def train(options, launch: list[str], base: Path, output: Path, batch: int, steps: int, *more: str) -> dict:
    """배우고, run.json에서 속도, VRAM, step마다의 loss를 읽는다."""
    epochs = (steps - 0.01) / -(-count_blocks(options) // batch)  # 적은 값을 올림해도 step이 늘지 않게 한다
    began = time.perf_counter()
    call(options, [*launch, str(ROOT / "finetune-lora.py"), "--base_model", str(base), "--data_path", options.data,
                   "--output_dir", str(output), "--batch_size", str(batch), "--num_train_epochs", f"{epochs:.6f}",
                   "--val_set_size", "0", *more])
    report = json.loads((output / "run.json").read_text(encoding="utf-8"))
    history = [entry for entry in report["history"] if "loss" in entry]
    return {"steps": report["plan"]["steps"], "processes": report["plan"]["processes"], "path": report["path"],
            "micro": report["plan"]["micro_batch_size"], "vram_gb": report["peak_vram_gb"],
            "wall_s": time.perf_counter() - began, "losses": [entry["loss"] for entry in history],
            "tokens_per_second": steady_speed(history, report["data"]["train_tokens"] * epochs / len(history))}


def steady_speed(history: list[dict], tokens_per_step: float, skip: int = 5) -> float:
    """처음 몇 step(커널 컴파일, graph 캡처)을 뺀 토큰/초. 기록된 값은 처음부터의 평균이므로 걸린 시간으로 되돌린다.

    이어서 배운 실행은 이어 간 자리부터 다시 재므로, 마지막으로 이어 간 자리 뒤의 것만 본다.
    """
    spent: list[float] = []
    for entry in history:
        total = (len(spent) + 1) * tokens_per_step / entry["tokens_per_second"]
        if spent and total < spent[-1]:  # 다시 재기 시작했다
            spent, total = [], tokens_per_step / entry["tokens_per_second"]
        spent.append(total)
    skip = min(skip, len(spent) - 1)
    return (len(spent) - skip) * tokens_per_step / (spent[-1] - (spent[skip - 1] if skip else 0.0))


def count_blocks(options) -> int:
    """데이터가 채우는 1,024토큰 블록의 수. 데이터와 토크나이저가 정한다."""
    if not hasattr(options, "blocks"):
        from utils.data import blocks, dataset, encoder
        from utils.model.tokenizer import end_token_id, load_tokenizer
        from utils.prompter import Prompter

        tokenizer = load_tokenizer(ROOT / "resources/polyglot-ko-demo")
        end_id = end_token_id(tokenizer)
        documents = dataset.load_documents(options.data, Prompter(), encoder.Encoder(tokenizer, end_id), 1024, end_id)
        options.blocks = len(blocks.pack(documents.lengths(), 1024, 42))
    return options.blocks


def print_table(rows: list[dict]) -> None:
    print("\n| 모양 | batch | 프로세스 | 토큰/초 | 카드마다 GB | 효율 | loss 차이 |\n|---|---|---|---|---|---|---|")
    for row in rows:
        for label in ("fsdp", "resumed", "one", "two"):
            done = row.get(label)
            if done:
                extra = f"{row['efficiency']:.3f} | {row['loss_gap']:.1e}" if label == "two" else " | "
                print(f"| {row['shape']} {label} | {row['batch']} | {done['processes']} | "
                      f"{done['tokens_per_second']:,.0f} | {done['vram_gb'] or 0:.2f} | {extra} |")
    for row in rows:
        for label in ("saved", "resumed_saved", "history_kept", "merge_s", "merged_gb"):
            if label in row:
                print(f"{row['shape']} {label}: {row[label]}")
        if "error" in row:
            print(f"{row['shape']} 실패: {row['error']}")


if __name__ == "__main__":
    main()
