"""학습 속도와 VRAM을 이 분야의 흔한 조리법(plain)과 나란히 잰다. 표를 찍고 마지막 줄에 JSON을 남긴다.

    python tests/bench/bench_train.py qwen3 llama neox-all neox lean qwen3-4b exact plan loss rows growth 5.8b 12.8b
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

import modern  # noqa: E402
import standin  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator  # noqa: E402

from utils.data.blocks import pack  # noqa: E402
from utils.engine.families import describe, layer_modules, unwrap  # noqa: E402
from utils.engine.train_layers import SITES  # noqa: E402
from utils.engine.train_ops import drop_scale  # noqa: E402
from utils.train import planner  # noqa: E402
from utils.train.group import ALONE  # noqa: E402
from utils.train.loop import Loop  # noqa: E402
from utils.train.planner import GB, MemoryPlan  # noqa: E402
from utils.train.prediction import CONTEXT, Workload, predict  # noqa: E402
from utils.train.progress import Speed  # noqa: E402
from utils.train.records import Recipe  # noqa: E402
from utils.train.step import open_step  # noqa: E402
from utils.train.weights import ReplicatedWeights  # noqa: E402

BATCH, BLOCK = 16, 1024
BF16, CUDA = torch.bfloat16, torch.device("cuda")
ATTENTION = {"gpt_neox": ("query_key_value",)}  # 나머지는 q, k, v와 o
POLYGLOT = "polyglot-ko-1.3b"
for name in ("3.8b", "5.8b", "12.8b"):
    config = standin.config_of(name)
    modern.SHAPES[name] = {key: value for key, value in config.items() if not key.endswith("token_id")}


def targets_of(shape: str, every: bool) -> tuple[str, ...]:
    """LoRA를 붙일 층: 모든 선형층 또는 attention만."""
    if every:
        return tuple(describe(modern.SHAPES[shape]).linears())
    return ATTENTION.get(modern.SHAPES[shape]["model_type"], ("q_proj", "k_proj", "v_proj", "o_proj"))


def tuned(shape: str, targets: tuple[str, ...], dtype=BF16, double_quant: bool = True, prepare=lambda model: model):
    """무작위 가중치의 4비트 모델에 r 8, alpha 16, dropout 0.05인 LoRA를 붙인 것."""
    from peft import LoraConfig, get_peft_model

    model = prepare(modern.build(shape, "nf4", dtype, double_quant, BF16))
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, task_type="CAUSAL_LM",
                                            target_modules=list(targets)))


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


class Clock(Speed):
    """optimizer step마다의 시간을 적고, `profile`번째 step의 CUDA 커널 시간을 더한다."""

    def __init__(self, profile: int | None = None):
        super().__init__()
        self.times, self.kernel, self.profile, self.table = [], None, profile, ""

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        if len(self.times) == self.profile:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()
        self.times.append(time.perf_counter())
        super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        torch.cuda.synchronize()
        self.times[-1] = time.perf_counter() - self.times[-1]
        if len(self.times) - 1 == self.profile:
            self.profiler.stop()
            rows = self.profiler.key_averages()
            self.kernel = sum(row.self_device_time_total for row in rows) / 1e6
            rows = sorted(rows, key=lambda row: -row.self_device_time_total)[:30]
            self.table = "\n".join(f"    {row.self_device_time_total / 1e3:8.2f} ms {row.count:6d} {row.key[:90]}"
                                   for row in rows)


class Ticking(TrainerCallback):
    """`transformers.Trainer`의 step도 같은 시계로 잰다."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.__exit__()


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


def measure(make, tokens: float, steps: int, average=statistics.median) -> dict:
    """앞의 두 step은 워밍업이다. 다음 3번의 가운데 값으로 속도를 내고, 마지막 step의 커널 시간을 잰다.

    Args:
        make: (step의 수, Clock)으로 (학습하는 함수, 손실들을 주는 함수, 길의 설명)을 만드는 함수.
    """
    forget()
    clock = Clock(profile=steps - 1)
    train, losses, path = make(steps, clock)
    train()
    seconds = average(clock.times[2:-1])
    result = {"tokens_per_s": round(tokens / seconds), "reserved_gb": round(torch.cuda.max_memory_reserved() / GB, 3),
              "kernel_us_per_token": round(clock.kernel * 1e6 / tokens, 3), "path": path, "losses": losses(),
              "spread": round((max(clock.times[2:-1]) - min(clock.times[2:-1])) / seconds, 4)}
    print(f"  {result['tokens_per_s']:>7,} tok/s  {result['reserved_gb']:.2f} GB  "
          f"{result['kernel_us_per_token']:.2f} us/tok  {path}\n{clock.table}", flush=True)
    del train, losses, make
    forget()
    return result


def losses_of(history: list[dict]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


def plain(shape: str, micro: int, data, targets, steps: int = 6, tokens: float = BATCH * BLOCK,
          collator=default_data_collator, average=statistics.median):
    """흔한 조리법: fp16 기반, NF4(이중 양자화 없음), bf16 계산, prepare_model_for_kbit_training, Trainer."""
    from peft import prepare_model_for_kbit_training

    print(f"plain {shape} micro {micro}", flush=True)

    def make(steps, clock):
        model = tuned(shape, targets, torch.float16, False,
                      lambda base: prepare_model_for_kbit_training(base, use_gradient_checkpointing=False))
        settings = arguments(tempfile.mkdtemp(), micro, steps, fp16=True, optim="adamw_torch")
        trainer = Trainer(model, settings, train_dataset=Plain(data), data_collator=collator,
                          callbacks=[Ticking(clock)])
        return trainer.train, lambda: losses_of(trainer.state.log_history), "transformers.Trainer"

    return measure(make, tokens, steps, average)


def make_loop(shape: str, plan: MemoryPlan, data, targets, steps: int, accumulation: int, clock: Speed | None = None,
              wrap=lambda step: step, cap_gb: float | None = None) -> Loop:
    """새 모델의 학습 루프. `wrap`은 micro-step을 감싼다. `cap_gb`를 주면 모델을 만든 뒤 할당기를 그만큼으로 막는다."""
    model = tuned(shape, targets)
    forget()
    if cap_gb is not None:
        torch.cuda.set_per_process_memory_fraction(cap_gb * GB / torch.cuda.mem_get_info()[1])
    weights = ReplicatedWeights(model, ALONE)
    step = open_step(model, plan, data, None, CUDA, weights.gradients, print)
    recipe = Recipe(steps, 0, steps, plan.micro_batch_size, accumulation, learning_rate=1e-3, seed=42)
    return Loop(wrap(step), weights, recipe, data, group=ALONE, device=CUDA, speed=clock)


def ours(shape: str, plan: MemoryPlan, data, targets, steps: int = 6, tokens: float = BATCH * BLOCK,
         average=statistics.median, cap_gb: float | None = None):
    """우리의 학습."""
    print(f"ours {shape} micro {plan.micro_batch_size} recompute {plan.recompute_layers} "
          f"predicted {plan.reserved / GB:.2f}", flush=True)

    def make(steps, clock):
        loop = make_loop(shape, plan, data, targets, steps, BATCH // plan.micro_batch_size, clock, cap_gb=cap_gb)
        return loop.run, lambda: losses_of(loop.state.log_history), loop.step.path

    try:
        return {**measure(make, tokens, steps, average), "predicted_gb": round(plan.reserved / GB, 3)}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def chosen(shape: str, budget_gb: float, targets) -> MemoryPlan:
    """할당기의 상한이 `budget_gb`일 때의 계획."""
    return planner.fit(Workload(modern.SHAPES[shape], targets, 8, BLOCK, 2), budget_gb * GB + CONTEXT, BATCH)


def fixed(shape: str, micro: int, recompute: int, targets, block: int = BLOCK, documents: int = 2) -> MemoryPlan:
    parts = predict(Workload(modern.SHAPES[shape], targets, 8, block, documents), micro, recompute)
    return MemoryPlan(micro, recompute, parts)


def compare(shape: str, every: bool = True) -> dict:
    """기본 설정과 흔한 조리법."""
    data, targets = Blocks(), targets_of(shape, every)
    return {"ours": ours(shape, chosen(shape, 79, targets), data, targets), "plain": plain(shape, 4, data, targets)}


def lean() -> dict:
    """모든 층을 재계산하는, VRAM이 가장 적은 설정."""
    results = {}
    for shape, every in (("qwen3-1.7b", True), ("llama-1.5b", True), (POLYGLOT, True), (POLYGLOT, False)):
        targets = targets_of(shape, every)
        plan = fixed(shape, 1, modern.SHAPES[shape]["num_hidden_layers"] - 1, targets)
        results[f"{shape} {'all' if every else 'attention'}"] = ours(shape, plan, Blocks(), targets)
    return results


def capped(shape: str, every: bool) -> dict:
    """우리는 할당기를 5.0 GB로 막고, plain은 상한 없이."""
    data, targets = Blocks(), targets_of(shape, every)
    return {"ours": ours(shape, chosen(shape, 5.0, targets), data, targets, cap_gb=5.0),
            "plain": plain(shape, 1, data, targets)}


def twelve() -> dict:
    targets = targets_of("12.8b", False)
    return {"ours": ours("12.8b", fixed("12.8b", 1, 39, targets), Blocks(), targets)}


def peaks(shapes=(POLYGLOT, "qwen3-1.7b", "llama-1.5b", "exaone4-1.2b", "gemma3-270m")) -> dict:
    """예측한 VRAM과 실제 최댓값: 구조 x {attention만, 모든 선형층} x 블록의 길이."""
    results = {}
    for shape in shapes:
        for every in (False, True):
            targets = targets_of(shape, every)
            for block in (512, 1024, 2048):
                micro, last = max(1, BLOCK // block), modern.SHAPES[shape]["num_hidden_layers"] - 1
                for recompute in (0, last) if block == 1024 else (0,):
                    plan = fixed(shape, micro, recompute, targets, block)
                    make_loop(shape, plan, Blocks(16, block), targets, 2, 3).run()
                    real = torch.cuda.max_memory_reserved() / GB
                    name = f"{shape} {'all' if every else 'attention'} {block} 재계산 {recompute}"
                    results[name] = (round(plan.reserved / GB, 3), round(real, 3),
                                     round(plan.reserved / GB / real - 1, 4))
                    print(f"  {name}: {results[name]} allocated {torch.cuda.max_memory_allocated() / GB:.3f}",
                          flush=True)
                    forget()
    return results


def exact(shape: str = "qwen3-1.7b") -> dict:
    """찍은 micro-step을 되풀이해 비트까지 같은지와, attention의 결정적 방식의 비용."""
    from utils.engine.train_step import TrainStep
    from utils.train.graph_step import CapturedStep

    model, results = tuned(shape, targets_of(shape, True)), {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.grad = torch.zeros_like(parameter)
    for documents in (1, 2, 4, 8):
        batch = {name: value[None] for name, value in Blocks(4, documents=documents)[0].items()}
        batch |= {"factor": torch.tensor(1e-3), "keys": torch.tensor([[5, 7]], dtype=torch.int32)}
        for strict in (False, True):
            step = TrainStep(model, 0, 9, strict)
            captured, runs, times = CapturedStep(step, torch.device("cuda")), [], []
            for _ in range(8):
                for parameter in trained:
                    parameter.grad.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                captured.train(batch)
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
                runs.append([parameter.grad.clone() for parameter in trained])
            same = all(torch.equal(a, b) for other in runs[3:] for a, b in zip(runs[2], other, strict=True))
            single = step.options(batch)["single"]
            name = f"문서 {documents}, {(step.single if single else step.attention).name}"
            results[name] = same, round(statistics.median(times[3:]), 2)
            print("  비트까지 같다, ms:", name, results[name], flush=True)
            captured.release()
    return results


def growth() -> dict:
    """문서의 수, 행의 수, 블록의 길이에 따른 속도와 VRAM."""
    tries = {"문서 1": Blocks(), "문서 4": Blocks(documents=4), "문서 16": Blocks(documents=16),
             "블록 10개": Blocks(10), "블록 10,000개": Blocks(10000), "블록 길이 512": Blocks(block=512),
             "블록 길이 2048": Blocks(block=2048)}
    results, targets = {}, targets_of(POLYGLOT, False)
    for name, data in tries.items():
        plan = fixed(POLYGLOT, max(1, BLOCK // data.block), 0, targets, data.block, data.max_documents)
        print(name)
        results[name] = ours(POLYGLOT, plan, data, targets, tokens=min(BATCH, data.count) * data.block)
    return results


def rows() -> dict:
    """실제 행: 채움 토큰을 뺀 토큰/s. plain은 micro batch 안에서 가장 긴 행에 맞추어 채운다.

    모양이 매번 달라지면 cuDNN의 attention이 그때마다 계획을 새로 세워 몇 배 느려지므로, plain에서는 끄고 잰다.
    """
    import numpy as np

    documents = real_rows()
    lengths = np.array([len(row) for row in documents])
    packed = Packed(documents, pack(lengths, BLOCK, 0))
    padded = [{"input_ids": row, "labels": row} for row in documents]

    def pad(batch):
        longest = max(len(row["input_ids"]) for row in batch)

        def fill(name, value):
            return torch.stack([torch.nn.functional.pad(row[name], (0, longest - len(row[name])), value=value)
                                for row in batch])

        mask = fill("input_ids", -1) >= 0
        return {"input_ids": fill("input_ids", 2), "labels": fill("labels", -100), "attention_mask": mask.long()}

    print(f"{len(documents)}행, 평균 {lengths.mean():.0f}토큰, 가장 긴 것 {lengths.max()}, 블록 {len(packed)}개, "
          f"채움 {lengths.sum() / (len(packed) * BLOCK):.3f}, 블록의 문서 {packed.max_documents}")
    targets = targets_of(POLYGLOT, False)
    plan = fixed(POLYGLOT, 1, 0, targets, BLOCK, packed.max_documents)
    torch.backends.cuda.enable_cudnn_sdp(False)
    result = {"plain": plain(POLYGLOT, 4, padded, targets, 16, BATCH * lengths.mean(), pad, statistics.mean)}
    torch.backends.cuda.enable_cudnn_sdp(True)
    tokens = BATCH * lengths.sum() / len(packed)
    return {**result, "ours": ours(POLYGLOT, plan, packed, targets, 8, tokens, statistics.mean)}


def real_rows() -> list[torch.Tensor]:
    """koalpaca_500.json을 그 자리에서 학습한 BPE로 나눈 토큰들."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    places = (ROOT / "shared" / "data", ROOT.parent / "shared" / "data")
    file = next(place / "koalpaca_500.json" for place in places if (place / "koalpaca_500.json").is_file())
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=12000, show_progress=False))
    return [torch.tensor(tokenizer.encode(text).ids[:BLOCK]) for text in texts]


class Packed(torch.utils.data.Dataset):
    """토큰 열들을 블록에 채운 dataset."""

    def __init__(self, documents, blocks):
        self.documents, self.blocks = documents, blocks
        self.max_documents = max(len(block) for block in blocks) + 1

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict:
        parts = [self.documents[member] for member in self.blocks[index]]
        room = BLOCK - sum(len(part) for part in parts)
        tokens = torch.cat([*parts, torch.full((room,), 2)])
        positions = torch.cat([torch.arange(len(part)) for part in parts] + [torch.arange(room)])
        labels = tokens.masked_fill(positions == 0, -100)
        labels[BLOCK - room:] = -100
        return {"input_ids": tokens, "labels": labels, "position_ids": positions}


class SameDrop(torch.nn.Module):
    """PEFT의 dropout 자리에 놓여, 엔진과 같은 난수로 버린다."""

    def __init__(self, site: int, keys: list):
        super().__init__()
        self.site, self.keys = site, keys

    def forward(self, x):
        scale = drop_scale(self.keys[0], x.shape[0] * x.shape[1], x.shape[2], self.site, 0.05)
        return (x.flatten(0, 1) * scale).view_as(x).to(x.dtype)


def loss(shape: str = POLYGLOT, steps: int = 30, batch: int = 4, documents: int = 4) -> dict:
    """같은 batch를 eager로, 묶지 않고, logits를 나누지 않고 학습한 손실과 비교한다. dropout의 난수도 같다."""
    data, taken, targets = Blocks(steps * batch, documents=documents), [], targets_of(shape, True)

    def recorded(step):
        train = step.train
        step.train = lambda given: taken.append((given, given["keys"])) or train(given)
        return step

    loop = make_loop(shape, fixed(shape, 1, 0, targets, BLOCK, documents), data, targets, steps, batch, wrap=recorded)
    loop.run()
    found = losses_of(loop.state.log_history)
    del loop
    forget()
    model, keys, losses = tuned(shape, targets), [None], []
    base = model.get_base_model()
    for index, layer in enumerate(layer_modules(base, describe(base))):
        for slot, module in enumerate(part for group in layer.linears() for part in group):
            if module is not unwrap(module):
                module.lora_dropout["default"] = SameDrop(index * SITES + slot, keys)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        micro, total = taken[step * batch:(step + 1) * batch], 0.0
        count = sum(int((inputs["labels"][:, 1:] >= 0).sum()) for inputs, _ in micro)
        for inputs, key in micro:
            keys[0] = key.cuda()
            ids, labels = (inputs[name].cuda().view(documents, -1) for name in ("input_ids", "labels"))
            with torch.autocast("cuda", BF16):
                logits = model(input_ids=ids, use_cache=False).logits
            nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(),
                                                    reduction="sum", ignore_index=-100) / count
            nll.backward()
            total += float(nll)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    worst = max(abs(a - b) / b for a, b in zip(found, losses, strict=True))
    print(f"  손실: 처음 {found[0]:.5f}와 {losses[0]:.5f}, 끝 {found[-1]:.5f}와 {losses[-1]:.5f}, "
          f"가장 큰 상대 차이 {worst:.2e}")
    return {"worst_relative": worst, "ours": found, "eager": losses}


PARTS = {
    "qwen3": lambda: compare("qwen3-1.7b"), "llama": lambda: compare("llama-1.5b"),
    "neox-all": lambda: compare(POLYGLOT), "neox": lambda: compare(POLYGLOT, every=False),
    "exaone4": lambda: compare("exaone4-1.2b"), "lean": lean,
    "qwen3-4b": lambda: capped("qwen3-4b", every=True), "5.8b": lambda: capped("5.8b", every=False),
    "12.8b": twelve,
    "exact": exact, "rows": rows, "loss": loss, "qwen3-loss": lambda: loss("qwen3-1.7b"), "plan": peaks,
    "growth": growth,
}


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
