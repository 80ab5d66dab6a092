"""학습 속도와 VRAM을 이 분야의 흔한 조리법(plain)과 나란히 잰다. 표를 찍고 마지막 줄에 JSON을 남긴다.

    python tests/bench/bench_train.py default lean 5.8b 12.8b rows loss growth plan
"""

import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from standin import add_lora, build, config_of  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator # noqa

from utils import planner
from utils.planner import GB, MemoryPlan
from utils.trainer import LeanTrainer

BATCH, BLOCK, TARGETS = 16, 1024, ("query_key_value",)
BF16 = torch.bfloat16


class Blocks(torch.utils.data.Dataset):
    """문서 `documents`개를 똑같은 길이로 담은 무작위 블록들."""

    def __init__(self, count: int = 256, block: int = BLOCK, documents: int = 1):
        self.count, self.block, self.max_documents = count, block, documents
        self.positions = torch.cat([part - part[0] for part in torch.arange(block).chunk(documents)])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        tokens = torch.randint(3, 30000, (self.block,), generator=torch.Generator().manual_seed(index))
        labels = tokens.masked_fill(self.positions == 0, -100)
        return {"input_ids": tokens, "labels": labels, "position_ids": self.positions}


class Plain(torch.utils.data.Dataset):
    """position_ids가 없는 같은 블록들."""

    def __init__(self, blocks):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict:
        return {name: value for name, value in self.blocks[index].items() if name != "position_ids"}


class Clock(TrainerCallback):
    """optimizer step마다의 시각과 손실을 적고, `profile`번째 step의 CUDA 커널 시간을 더한다."""

    def __init__(self, profile: int | None = None):
        self.times, self.kernel, self.losses, self.profile, self.table = [], None, [], profile, ""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        if state.global_step == self.profile:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()
        self.times.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.times[-1] = time.perf_counter() - self.times[-1]
        if state.global_step - 1 == self.profile:
            self.profiler.stop()
            rows = self.profiler.key_averages()
            self.kernel = sum(row.self_device_time_total for row in rows) / 1e6
            rows = sorted(rows, key=lambda row: -row.self_device_time_total)[:14]
            self.table = "\n".join(f"    {row.self_device_time_total / 1e3:8.2f} ms {row.count:6d} {row.key[:90]}"
                                   for row in rows)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def arguments(folder: str, micro: int, steps: int, **settings) -> TrainingArguments:
    return TrainingArguments(output_dir=folder, per_device_train_batch_size=micro,
                             gradient_accumulation_steps=BATCH // micro, max_steps=steps, learning_rate=1e-3,
                             logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
                             remove_unused_columns=False, **settings)


def forget() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure(make_trainer, tokens: int, steps: int) -> dict:
    """앞의 두 step은 준비 운동이다. 다음 3번의 가운데 값으로 속도를 내고, 마지막 step의 커널 시간을 잰다."""
    forget()
    clock = Clock(profile=steps - 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, steps)
        trainer.add_callback(clock)
        trainer.train()
        path = getattr(trainer, "path", "transformers.Trainer")
    seconds = statistics.median(clock.times[2:-1])
    result = {"tokens_per_s": round(tokens / seconds), "reserved_gb": round(torch.cuda.max_memory_reserved() / GB, 3),
              "kernel_us_per_token": round(clock.kernel * 1e6 / tokens, 3), "path": path, "losses": clock.losses,
              "spread": round((max(clock.times[2:-1]) - min(clock.times[2:-1])) / seconds, 4)}
    print(f"  {result['tokens_per_s']:>7,} tok/s  {result['reserved_gb']:.2f} GB  "
          f"{result['kernel_us_per_token']:.2f} us/tok  {path}\n{clock.table}", flush=True)
    del trainer, make_trainer
    forget()
    return result


def plain(shape: str, micro: int, data, steps: int = 6, tokens: int = BATCH * BLOCK, collator=default_data_collator):
    """흔한 조리법: fp16 기반, NF4(이중 양자화 없음), bf16 계산, prepare_model_for_kbit_training, Trainer."""
    from peft import prepare_model_for_kbit_training

    print(f"plain {shape} micro {micro}", flush=True)

    def make(folder, steps):
        model = prepare_model_for_kbit_training(build(shape, torch.float16, False, BF16))
        return Trainer(add_lora(model), arguments(folder, micro, steps, fp16=True, optim="adamw_torch"),
                       train_dataset=Plain(data), data_collator=collator)

    return measure(make, tokens, steps)


def ours(shape: str, plan: MemoryPlan, data, steps: int = 6, tokens: int = BATCH * BLOCK):
    print(f"ours {shape} micro {plan.micro_batch_size} recompute {plan.recompute_layers} "
          f"host {plan.host_embedding} chunk {plan.loss_chunk} predicted {plan.reserved / GB:.2f}", flush=True)

    def make(folder, steps):
        model = add_lora(build(shape, BF16, True, BF16))
        forget()
        return LeanTrainer(model, arguments(folder, plan.micro_batch_size, steps, bf16=True), data, plan=plan)

    return {**measure(make, tokens, steps), "predicted_gb": round(plan.reserved / GB, 3)}


def chosen(shape: str, budget_gb: float, block: int = BLOCK, documents: int = 1, micro: int | None = None) -> MemoryPlan:
    """할당기의 상한이 `budget_gb`일 때의 계획."""
    budget = budget_gb * GB + planner.CONTEXT
    return planner.fit(config_of(shape), budget, block, BATCH, micro, 8, TARGETS, documents)


def sweep() -> dict:
    """micro batch와 재계산의 조합들."""
    data, results = Blocks(), {}
    tries = [(1, 0, False, 512), (2, 0, False, 512), (4, 0, False, 512), (1, 0, False, 1024), (2, 12, False, 512),
             (1, 23, True, 256)]
    for micro, recompute, host, chunk in tries:
        plan = planner.predict(config_of("1.3b"), BLOCK, micro, recompute, 8, 1, chunk, host)
        plan = MemoryPlan(micro, recompute, chunk, host, plan)
        try:
            results[str((micro, recompute, host, chunk))] = ours("1.3b", plan, data)
        except Exception as error:
            print("  실패:", repr(error)[:500], flush=True)
            forget()
    return results


def default() -> dict:
    data = Blocks()
    return {"plain": plain("1.3b", 4, data), "ours": ours("1.3b", chosen("1.3b", 79), data)}


PARTS = {"sweep": sweep, "default": default}


def main(names: list[str]) -> None:
    out = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in names:
        began = time.perf_counter()
        try:
            out[name] = PARTS[name]()
        except Exception as error:
            import traceback

            traceback.print_exc()
            out[name] = {"error": repr(error)[:500]}
        print(f"[{name}: {time.perf_counter() - began:.0f} s]", flush=True)
    print(json.dumps(out, ensure_ascii=False))


if __name__ == "__main__":
    main(sys.argv[1:] or list(PARTS))
