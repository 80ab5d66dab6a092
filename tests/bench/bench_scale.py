"""프로세스 하나와 둘의 학습을 같은 기계에서 견준다(torchrun). 표를 찍고 마지막 줄에 JSON을 남긴다.

    python tests/bench/bench_scale.py --work /tmp/scale --shape 1.3b --fsdp_shape 12.8b

NVIDIA H100 80GB 두 장, torch 2.11+cu130, transformers 5.17, bitsandbytes 0.50.2, `--steps 20`:

| 모양 | batch | 프로세스 | 토큰/초 | 카드마다 GB | 효율 | loss 차이 |
|---|---|---|---|---|---|---|
| 1.3b | 16 | 1 | 67,240 | 1.90 | | |
| 1.3b | 16 | 2 | 132,649 | 1.90 | 0.986 | 2.2e-05 |
| 1.3b | 64 | 1 | 70,077 | 1.90 | | |
| 1.3b | 64 | 2 | 139,312 | 1.90 | 0.994 | 2.9e-05 |
| 12.8b (FSDP) | 4 | 2 | 1,702 | 6.88 | | |
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
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
FSDP = ("--use_fsdp", "--fsdp_version", "1", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
        "--fsdp_transformer_layer_cls_to_wrap", "GPTNeoXLayer", "--fsdp_use_orig_params", "false",
        "--fsdp_sync_module_states", "true", "--fsdp_cpu_ram_efficient_loading", "false",
        "--fsdp_state_dict_type", "FULL_STATE_DICT", "--mixed_precision", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", default="/tmp/scale")
    parser.add_argument("--data", default=str(ROOT / "ko-datasets/polyglot-ko-lite_textonly.json"))
    parser.add_argument("--shape", default="1.3b")
    parser.add_argument("--fsdp_shape", default="12.8b")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--timeout", type=int, default=200)
    options = parser.parse_args()
    work = Path(options.work)
    rows = []
    base = write_folder(options.shape, work / options.shape)
    for batch in (16, 64):
        one, two = (run(options, base, work / f"b{batch}-n{n}", batch, ddp(n)) for n in (1, 2))
        row = compare(one, two) | {"shape": options.shape, "batch": batch}
        rows.append(row)
        print(json.dumps(row), flush=True)
    shutil.rmtree(work / options.shape)
    if options.fsdp_shape:
        base = write_folder(options.fsdp_shape, work / options.fsdp_shape)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *FSDP]
        done = run(options, base, work / "fsdp", 4, launch, steps=6)
        rows.append({"shape": options.fsdp_shape, "batch": 4, "fsdp": done})
    print_table(rows)
    print(json.dumps(rows))


def ddp(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def run(options, base: Path, output: Path, batch: int, launch: list[str], steps: int | None = None) -> dict:
    """실제 스크립트를 실행하고 run.json에서 속도, VRAM, step마다의 loss를 읽는다."""
    epochs = epochs_for(options, batch, steps or options.steps)
    command = [*launch, str(ROOT / "finetune-lora.py"), "--base_model", str(base), "--data_path", options.data,
               "--output_dir", str(output), "--batch_size", str(batch), "--num_train_epochs", f"{epochs:.4f}",
               "--val_set_size", "0"]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=options.timeout,
                              env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    except subprocess.TimeoutExpired as late:
        return {"error": f"{options.timeout}초를 넘겼다", "tail": str(late.stdout)[-800:]}
    wall = time.perf_counter() - began
    if done.returncode or not (output / "run.json").is_file():
        return {"error": done.returncode, "tail": (done.stdout[-1500:] + done.stderr[-2500:])}
    report = json.loads((output / "run.json").read_text(encoding="utf-8"))
    history = [entry for entry in report["history"] if "loss" in entry]
    return {"steps": report["plan"]["steps"], "processes": report["plan"]["processes"], "path": report["path"],
            "micro": report["plan"]["micro_batch_size"], "vram_gb": report["peak_vram_gb"], "wall_s": wall,
            "tokens_per_second": steady_speed(history, report["data"]["train_tokens"] * epochs / len(history)),
            "losses": [entry["loss"] for entry in history]}


def steady_speed(history: list[dict], tokens_per_step: float, skip: int = 5) -> float:
    """처음 몇 step(커널 컴파일, graph 캡처)을 뺀 토큰/초. 기록된 값은 처음부터의 평균이므로 걸린 시간으로 되돌린다."""
    skip = min(skip, len(history) - 1)
    spent = [(n + 1) * tokens_per_step / entry["tokens_per_second"] for n, entry in enumerate(history)]
    return (len(history) - skip) * tokens_per_step / (spent[-1] - (spent[skip - 1] if skip else 0.0))


def epochs_for(options, batch: int, steps: int) -> float:
    """원하는 step 수가 되는 epoch. 블록의 수는 데이터와 토크나이저가 정한다."""
    if not hasattr(options, "blocks"):
        from types import SimpleNamespace

        from utils import dataset, loader
        from utils.prompter import Prompter

        tokenizer = loader.load_tokenizer(ROOT / "resources/polyglot-ko-demo")
        end_id = loader.end_token_id(tokenizer)
        documents = dataset.load_documents(options.data, Prompter(), dataset.Encoder(tokenizer, end_id), 1024, end_id)
        options.blocks = len(dataset.pack(documents.lengths(), 1024, SimpleNamespace(seed=42).seed))
    per_epoch = -(-options.blocks // batch)
    return steps / per_epoch


def compare(one: dict, two: dict) -> dict:
    if "error" in one or "error" in two:
        return {"one": one, "two": two}
    gap = max(abs(a - b) / abs(a) for a, b in zip(one["losses"], two["losses"], strict=True))
    speedup = two["tokens_per_second"] / one["tokens_per_second"]
    return {"one": one, "two": two, "speedup": speedup, "efficiency": speedup / 2, "max_relative_loss_gap": gap}


def write_folder(shape: str, folder: Path) -> Path:
    """그 모양의 무작위 fp16 모델 폴더를 층마다 쓴다."""
    import torch
    from safetensors.torch import save_file
    from standin import config_of
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shutil.rmtree(folder, ignore_errors=True)  # 끊긴 실행이 남긴 것
    folder.mkdir(parents=True)
    config = GPTNeoXConfig(**{k: v for k, v in config_of(shape).items() if k != "model_type"} | {
        "bos_token_id": 0, "eos_token_id": 0})
    config.architectures = ["GPTNeoXForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = GPTNeoXForCausalLM(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight_map, shard, size = {}, {}, 0
    parameters = list(skeleton.named_parameters())
    for index, (name, parameter) in enumerate(parameters):
        value = torch.randn(parameter.shape, device=device) * 0.02
        shard[name.replace("lm_head.", "embed_out.")] = (value + ("norm" in name and "weight" in name)).half().cpu()
        size += value.numel() * 2
        if size > 2**31 or index == len(parameters) - 1:
            file = f"model-{len(set(weight_map.values())):05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for file in (ROOT / "resources/polyglot-ko-demo").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def print_table(rows: list[dict]) -> None:
    print("\n| 모양 | batch | 프로세스 | 토큰/초 | 카드마다 GB | 효율 | loss 차이 |\n|---|---|---|---|---|---|---|")
    for row in rows:
        for label in ("one", "two", "fsdp"):
            done = row.get(label)
            if not done:
                continue
            if "error" in done:
                print(f"| {row['shape']} | {row['batch']} | {label} | 실패 | | | |")
                print(done["tail"], file=sys.stderr)
                continue
            extra = f"{row['efficiency']:.3f} | {row['max_relative_loss_gap']:.1e}" if label == "two" else " | "
            print(f"| {row['shape']} | {row['batch']} | {done['processes']} | {done['tokens_per_second']:,.0f} | "
                  f"{done['vram_gb'] or 0:.2f} | {extra} |")


if __name__ == "__main__":
    main()
