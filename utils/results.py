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

MIN_SAMPLES, MAX_SAMPLES, SAMPLE_SECONDS = 5, 20, 30.0  # 검증 질문에 답하는 수와, 다섯을 넘겨서 쓸 시간
SHOWN_CHARS = 120


def write(settings: SimpleNamespace, inputs: Inputs, plan: tuple[Schedule, MemoryPlan],
          result: SimpleNamespace, say: Callable[[str], None]) -> None:
    """run.json, curves.png, samples.md를 쓰고 요약을 말한다."""
    if not result.trainer.args.should_save:
        return
    run = describe_run(settings, inputs, plan, result)
    # 나뉜 모델로는 답하지 않는다
    examples, samples = ([], []) if result.trainer.sharded else answer_samples(inputs, result.model)
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
        say(f"  기반 모델의 답: {one_line(sample['base'])}")
        say(f"  학습한 모델의 답: {one_line(sample['tuned'])}")


def one_line(answer: str) -> str:
    """콘솔에 보일 만큼의 답."""
    line = " ".join(answer.split()) or "(빈 답)"
    return line if len(line) <= SHOWN_CHARS else f"{line[:SHOWN_CHARS]}…"


def stopped_line(samples: list[dict]) -> str:
    """답을 끝낼 줄 알게 되었는지 한 줄로 말한다."""
    base, tuned = (sum(sample[f"{name}_finish"] == "stop" for sample in samples) for name in ("base", "tuned"))
    return (f"검증 질문 {len(samples)}개의 답({report.SAMPLES_FILE}) 가운데 스스로 멈춘 것: "
            f"기반 모델 {base}개, 학습한 모델 {tuned}개")


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


def answer_samples(inputs: Inputs, model) -> tuple[list[dict], list[dict]]:
    """(예시 질문, 검증 질문)마다 기반 모델의 답, 학습한 모델의 답, 그 답이 끝난 까닭. 검증 질문에는 모범 답도 있다.

    질문 없이 글만 있는 행은 건너뛴다. 느린 기계에서는 시간이 다하면 다섯에서 그친다.
    """
    decoder = Decoder(model, inputs.tokenizer, inputs.end_id)
    examples, samples = [], []
    for instruction, context in EXAMPLES:
        prompt, _ = inputs.prompter.pieces(instruction, context, "")
        ids = inputs.encoder.encode_prompt(prompt)
        if len(ids) < decoder.context:
            examples.append({"question": fill_placeholder(instruction, context), **both_answers(decoder, inputs, ids)})
    began = time.perf_counter()
    for member in inputs.held_out:
        late = time.perf_counter() - began > SAMPLE_SECONDS
        if len(samples) >= (MIN_SAMPLES if late else MAX_SAMPLES):
            break
        tokens, is_answer = inputs.documents.document(member)
        start = int(np.argmax(is_answer))
        if start:
            samples.append({"question": inputs.tokenizer.decode(tokens[:start]),
                            "reference": inputs.tokenizer.decode(tokens[start:-1]).strip(),
                            **both_answers(decoder, inputs, tokens[:start].tolist())})
    return examples, samples


def both_answers(decoder: Decoder, inputs: Inputs, input_ids: list[int]) -> dict[str, str]:
    """기반 모델(base)과 학습한 모델(tuned)의 답과 그 답이 끝난 까닭. 탐욕적으로 고르므로 늘 같다."""
    answers = {}
    for name, tuned in (("base", False), ("tuned", True)):
        decoder.use_adapter(tuned)
        answers[name] = inputs.tokenizer.decode(list(decoder.stream(input_ids, Sampling(temperature=0.0)))).strip()
        answers[f"{name}_finish"] = decoder.finish_reason
    return answers
