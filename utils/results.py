"""학습 한 번의 결과를 기록으로 옮긴다: run.json, curves.png, samples.md."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from utils import progress, report
from utils.decoder import Decoder
from utils.finetune import Inputs, Schedule
from utils.machine import installed_version, peak_ram_bytes
from utils.planner import MemoryPlan
from utils.prompter import EXAMPLES, fill_placeholder
from utils.sampling import Sampling

N_COMPARED = 5  # 두 모델이 함께 답하는 검증 질문의 수. 나머지에는 학습한 모델만 시간이 허락하는 만큼 답한다
MAX_SAMPLES = 64
SAMPLE_SECONDS = 60.0  # 답을 만드는 시간은 이 값과 학습한 시간의 10 % 가운데 큰 쪽까지다
SHOWN_CHARS = 120


def write(settings: SimpleNamespace, inputs: Inputs, plan: tuple[Schedule, MemoryPlan],
          result: SimpleNamespace, say: Callable[[str], None]) -> None:
    """run.json, curves.png, samples.md를 쓰고 요약을 말한다."""
    if not result.trainer.args.should_save:
        return
    run = describe_run(settings, inputs, plan, result)
    # 나뉜 모델로는 답하지 않는다
    examples, samples = ([], []) if result.trainer.sharded else answer_samples(
        inputs, result.model, max(SAMPLE_SECONDS, 0.1 * result.seconds))
    report.draw_curves([(Path(settings.output_dir).name, run)], Path(settings.output_dir) / "curves.png")
    report.write_samples(settings.output_dir, examples + samples)
    report.write_run(settings.output_dir, run)  # 맨 끝에 쓴다: run.json이 있으면 끝난 실행이다
    say("\n결과")
    for line in progress.summary_lines(run):
        say(line)
    if samples:
        say(stopped_line(samples))
    for sample in examples:
        say(f"\n질문: {sample['question']}")
        for name, title in report.MODELS:
            say(f"  {title}의 답: {one_line(sample[name])}")


def one_line(answer: str) -> str:
    """콘솔에 보일 만큼의 답."""
    line = " ".join(answer.split()) or "(빈 답)"
    return line if len(line) <= SHOWN_CHARS else f"{line[:SHOWN_CHARS]}…"


def stopped_line(samples: list[dict]) -> str:
    """답을 끝낼 줄 알게 되었는지 한 줄로 말한다."""
    counts = []
    for name, title in report.MODELS:
        reasons = [sample[f"{name}_finish"] for sample in samples if name in sample]
        counts.append(f"{title} {len(reasons)}개 가운데 {reasons.count('stop')}개")
    return f"검증 질문에 스스로 멈춘 답({report.SAMPLES_FILE}): {', '.join(counts)}"


def describe_run(settings: SimpleNamespace, inputs: Inputs, plan: tuple[Schedule, MemoryPlan],
                 result: SimpleNamespace) -> dict:
    """학습 한 번을 되풀이하고 견주는 데 필요한 모든 것."""
    schedule, memory = plan
    state = result.trainer.state
    seconds = result.trainer.earlier_seconds + result.seconds
    tokens = inputs.train_set.n_tokens * settings.num_train_epochs * state.global_step / state.max_steps
    return {
        "settings": vars(settings),
        "versions": versions(),
        "device": {"name": str(inputs.device.device), "dtype": str(inputs.device.dtype), "why": inputs.device.reason},
        "data": {"sha256": inputs.data_sha256, "rows": len(inputs.documents), "cut": inputs.documents.n_cut,
                 "train_tokens": inputs.train_set.n_tokens, "blocks": len(inputs.train_set),
                 "validation_rows": len(inputs.held_out)},
        "plan": {"steps": schedule.steps, "warmup": schedule.warmup, "interval": schedule.interval,
                 "micro_batch_size": memory.micro_batch_size, "processes": result.trainer.args.world_size},
        "path": result.trainer.path,
        "eval_loss_before": result.before,
        "eval_loss_after": result.after,
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_vram_gb": torch.cuda.max_memory_reserved() / 1e9 if inputs.device.device.type == "cuda" else None,
        "peak_ram_gb": peak_ram_bytes() / 1e9,
        "history": state.log_history,
    }


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    return {"python": platform.python_version(), **{name: installed_version(name) or "없음" for name in names}}


def answer_samples(inputs: Inputs, model, seconds: float) -> tuple[list[dict], list[dict]]:
    """(예시 질문, 검증 질문)마다 두 모델의 답과 그 답이 끝난 까닭. 검증 질문에는 모범 답도 있다.

    여럿에 한꺼번에 답하고, 시간이 다 되면 다 만든 답만 담는다. 질문 없이 글만 있는 행은 건너뛴다.

    Args:
        seconds: 답을 만드는 데 쓸 수 있는 시간(초).
    """
    until = time.perf_counter() + seconds
    decoder = Decoder(model, inputs.tokenizer, inputs.end_id)
    examples, samples = [], []
    for instruction, context in EXAMPLES:
        prompt, _ = inputs.prompter.pieces(instruction, context, "")
        examples.append(({"question": fill_placeholder(instruction, context)}, inputs.encoder.encode_prompt(prompt)))
    for member in inputs.held_out:
        tokens, is_answer = inputs.documents.document(member)
        start = int(np.argmax(is_answer))
        if start and len(samples) < MAX_SAMPLES:
            samples.append(({"question": inputs.tokenizer.decode(tokens[:start]),
                             "reference": inputs.tokenizer.decode(tokens[start:-1]).strip()}, tokens[:start].tolist()))
    examples, samples = ([pair for pair in part if len(pair[1]) < decoder.context] for part in (examples, samples))
    compared = examples + samples[:N_COMPARED]
    for name, asked in (("tuned", compared), ("base", compared), ("tuned", samples[N_COMPARED:])):
        decoder.use_adapter(name == "tuned")
        replies = decoder.answer_many([ids for _, ids in asked], Sampling(temperature=0.0), until)
        for (sample, _), reply in zip(asked, replies, strict=True):
            if reply.finish_reason != "cancelled":
                sample[name] = inputs.tokenizer.decode(reply.ids).strip()
                sample[f"{name}_finish"] = reply.finish_reason
    return ([sample for sample, _ in examples if "tuned" in sample and "base" in sample],
            [sample for sample, _ in samples if "tuned" in sample])
