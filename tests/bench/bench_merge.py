"""병합의 시간과 메모리를 같은 바이트를 cp로 옮기는 것과 나란히 잰다. 마지막 줄은 JSON이다.

무작위 가중치의 polyglot 모양을 디스크에 쓰고 어댑터를 만든 다음, cp와 병합을 번갈아 세 번씩 한다. GPU를 쓰지 않는다.

    python tests/bench/bench_merge.py --shape 1.3b --folder /tmp/bench-merge
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/bench")]

import numpy as np  # noqa: E402

from utils.model import shards  # noqa: E402

IMPORTS = ("import gc; gc.disable(); from utils import console; from utils.merge import gguf, writer; gc.freeze(); "
           "console.say('')")
# ru_maxrss는 부모의 것을 물려받으므로 VmHWM을 읽는다
RSS = ("import runpy, sys, time; sys.path.insert(0, {root!r});"
       "{body};"
       "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'));"
       "print('peak', int(peak.split()[1]) * 1024, time.process_time())")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="1.3b")
    parser.add_argument("--folder", default="/tmp/bench-merge")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max_shard_size", default="1GB")
    parser.add_argument("--verify", action="store_true")
    options = parser.parse_args()
    folder = Path(options.folder)
    base, adapter = folder / f"polyglot-ko-{options.shape}", folder / "adapter"
    write_base(base, options.shape)
    write_adapter(adapter, base)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    start_ups, start_ups_cpu, idles = zip(*(measured(IMPORTS) for _ in range(options.repeats)), strict=True)
    start_up, start_up_cpu, idle = statistics.median(start_ups), statistics.median(start_ups_cpu), max(idles)
    proof_idle = measured(f"{IMPORTS};from utils.merge import proof; import datasets, accelerate, bitsandbytes.nn;"
                          "from transformers import GPTNeoXForCausalLM")[2]
    copies, copies_cpu, synced, merges, merges_cpu, merges_synced, peaks = [], [], [], [], [], [], []
    os.sync()
    for _ in range(options.repeats):
        began, used = time.perf_counter(), os.times()
        subprocess.run(["cp", "-r", str(base), str(folder / "copy")], check=True)
        copies.append(time.perf_counter() - began)
        spent = os.times()
        os.sync()
        synced.append(time.perf_counter() - began)
        copies_cpu.append(spent.children_user + spent.children_system - used.children_user - used.children_system)
        shutil.rmtree(folder / "copy")
        began = time.perf_counter()
        seconds, cpu, peak = measured(script(adapter, folder / "merged", options.max_shard_size, False))
        os.sync()
        merges_synced.append(time.perf_counter() - began)
        merges.append(seconds)
        merges_cpu.append(cpu)
        peaks.append(peak)
        shutil.rmtree(folder / "merged")
    report = {"shape": options.shape, "gigabytes": size / 1e9, "cores": os.cpu_count(), "load": os.getloadavg()[0],
              "cp_seconds": copies, "cp_cpu_seconds": copies_cpu, "merge_seconds": merges,
              "merge_cpu_seconds": merges_cpu, "start_up_seconds": start_up, "start_up_cpu_seconds": start_up_cpu,
              "cp_sync_seconds": synced, "merge_sync_seconds": merges_synced,
              "ratio": statistics.median(merges) / statistics.median(copies),
              "ratio_with_sync": statistics.median(merges_synced) / statistics.median(synced),
              "ratio_without_start_up": (statistics.median(merges) - start_up) / statistics.median(copies),
              "imports_rss_mb": idle / 1e6, "peak_rss_mb": max(peaks) / 1e6,
              "above_imports_mb": (max(peaks) - idle) / 1e6}
    if options.verify:
        seconds, cpu, peak = measured(script(adapter, folder / "merged", options.max_shard_size, True))
        report |= {"verified_seconds": seconds, "verified_cpu_seconds": cpu, "verified_peak_rss_mb": peak / 1e6,
                   "verified_imports_rss_mb": proof_idle / 1e6, "verified_above_mb": (peak - proof_idle) / 1e6}
    shutil.rmtree(folder)
    print(json.dumps(report))


def script(adapter: Path, merged: Path, size: str, verify: bool) -> str:
    flags = ["merge-lora.py", "--peft_root", str(adapter), "--output_dir", str(merged), "--max_shard_size", size,
             "--verify", str(verify)]
    return f"sys.argv = {flags!r}; runpy.run_path({str(ROOT / 'merge-lora.py')!r}, run_name='__main__')"


def measured(body: str) -> tuple[float, float, int]:
    """새 프로세스에서 실행한 (초, 쓴 CPU의 초, 가장 많이 쓴 RAM의 바이트)."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", RSS.format(root=str(ROOT), body=body)], capture_output=True,
                          encoding="utf-8", env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    peak, cpu = done.stdout.split("peak ")[-1].split()
    return time.perf_counter() - began, float(cpu), int(peak)


def write_base(folder: Path, shape: str) -> None:
    """polyglot 모양의 fp16 폴더. 같은 난수 조각을 되풀이해 빨리 쓴다."""
    from accelerate import init_empty_weights
    from standin import config_of
    from tiny import build_tokenizer
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder.mkdir(parents=True)
    build_tokenizer(folder)
    config = GPTNeoXConfig(**{k: v for k, v in config_of(shape).items() if k != "model_type"})
    config.architectures = ["GPTNeoXForCausalLM"]
    config.bos_token_id = config.eos_token_id = 0
    config.save_pretrained(folder)
    with init_empty_weights():
        parameters = dict(GPTNeoXForCausalLM(config).named_parameters())
    noise = (np.random.default_rng(0).standard_normal(4 * 2**20) * 0.02).astype(np.float16)

    def chunks(count: int, one: bool):
        for start in range(0, count, len(noise)):
            part = noise[: min(len(noise), count - start)]
            yield memoryview((part + np.float16(1) if one else part).view(np.uint8))

    planned = []
    for name, parameter in parameters.items():
        name = name.replace("lm_head", "embed_out")
        one = "norm" in name and name.endswith("weight")
        planned.append(shards.Planned(name, "F16", tuple(parameter.shape), partial(chunks, parameter.numel(), one)))
    shards.write_model(folder, planned, 10**9, lambda line: None)


def write_adapter(folder: Path, base: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    hidden, tensors = config["hidden_size"], {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.gpt_neox.layers.{layer}.attention.query_key_value"
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, hidden) * 0.02
        tensors[f"{name}.lora_B.weight"] = torch.randn(3 * hidden, 8) * 0.002
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16,
               "target_modules": ["query_key_value"], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")


if __name__ == "__main__":
    main()
