"""학습 한 번의 결과를 기록으로 옮긴다: run.json, curves.png, README.md, 그리고 samples.md에 남길 시험 답."""

import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from utils import record, report
from utils.console import one_line
from utils.data.blocks import fingerprint
from utils.environment import installed_version, peak_ram_bytes
from utils.model.objective import FIGURES
from utils.paths import located
from utils.train import adapter_card, progress
from utils.train.inputs import Inputs
from utils.train.records import Plan, Result, Settings
from utils.train.samples import EXAMPLE, STOPPED, Samples, answer_samples, user_questions
from utils.train.signals import Interrupt

N_SHOWN = 3  # 콘솔과 페이지에 보이는 질문의 수
SAMPLE_SECONDS, SAMPLE_SHARE = 60.0, 0.1  # 답을 만드는 시간은 이 초와, 학습한 시간의 이 몫 가운데 큰 쪽까지다


def write(settings: Settings, inputs: Inputs, plan: Plan, result: Result, say: Callable[[str], None]) -> None:
    """기록을 쓰고 요약을 말한 다음, 시험 답을 만들어 samples.md에 남긴다.

    어댑터와 기록을 모두 쓴 뒤에 답한다. 답하다 죽어도, Ctrl+C로 멈추어도 잃는 것이 없다.
    """
    if not result.is_first:
        return
    folder, run = Path(settings.output_dir), describe_run(settings, inputs, plan, result)
    with Interrupt(say, "기록을 쓰는 중이다. 다 쓰고 시험 답은 건너뛴다. 한 번 더 보내면 지금 끝낸다") as interrupt:
        record.write_run(folder, run)
        report.draw_curves([(folder.name, run)], folder / record.CURVES_FILE)
        adapter_card.write(settings, run)
        record.write_samples(folder, [])
        say("\n결과")
        for line in progress.summary_lines(run):
            say(line)
    if result.sharded:  # 나뉜 모델로는 답하지 않는다
        return
    samples, problem = Samples(), STOPPED
    if not result.interrupted and interrupt.code is None:
        seconds = max(SAMPLE_SECONDS, SAMPLE_SHARE * result.seconds)
        problem = answer_samples(settings, inputs, result.model, samples, seconds, say)
    record.write_samples(folder, samples.rows)
    measured = samples.measured()
    if measured:
        record.write_run(folder, {**run, **measured})
    if problem is not None:
        say(f"시험 답을 모두 만들지 못했다({problem}). 어댑터와 기록({record.RUN_FILE}, {record.CURVES_FILE}, "
            f"{record.SAMPLES_FILE})은 온전하다")
    for line in sample_lines(samples.rows):
        say(line)
    if samples.exact is not None:
        say(samples.exact.line())


def sample_lines(samples: list[dict]) -> list[str]:
    """콘솔에 보일 답 몇 개와, 답을 끝낼 줄 알게 되었는지."""
    lines = []
    for sample in [sample for sample in samples if "base" in sample][:N_SHOWN]:
        lines.append(f"\n{sample['kind']}: {one_line(sample['question'])}")
        if "reference" in sample:
            lines.append(f"  모범 답: {one_line(sample['reference'])}")
        lines += [f"  {model.title}의 답: {one_line(sample[model.name])}" for model in record.MODELS]
    measured = [sample for sample in samples if sample["kind"] != EXAMPLE]
    return [*lines, stopped_line(measured)] if measured else lines


def stopped_line(samples: list[dict]) -> str:
    """학습한 모델이 답을 끝낼 줄 알게 되었는지 한 줄로 말한다."""
    stopped = [sample["tuned_finish"] for sample in samples].count("stop")
    return f"\n{samples[0]['kind']} {len(samples)}개 가운데 길이의 한계 전에 끝맺은 답: 학습한 모델 {stopped}개"


def describe_run(settings: Settings, inputs: Inputs, plan: Plan, result: Result) -> dict:
    """학습 한 번을 되풀이하고 비교하는 데 필요한 모든 것."""
    schedule, state, seconds = plan.schedule, result.state, result.seconds
    held_out = inputs.documents.asked(inputs.parts.held_out)
    tokens = inputs.train_set.n_tokens * settings.num_train_epochs * state.global_step / state.max_steps
    return {
        "settings": {**asdict(settings), "base_model": located(settings.base_model),
                     "data_path": located(settings.data_path)},
        "versions": versions(),
        "device": {"name": str(inputs.device.device), "dtype": str(inputs.device.dtype), "why": inputs.device.reason},
        "data": {"sha256": inputs.data_sha256, "rows": len(inputs.documents) // inputs.documents.per_row,
                 "cut": inputs.documents.n_cut,
                 "train_tokens": inputs.train_set.n_tokens, "blocks": len(inputs.train_set),
                 "validation_rows": len(held_out), "validation_sha256": fingerprint(inputs.documents, held_out),
                 "questions": [one.sample["question"] for one in user_questions(inputs)[:N_SHOWN]]},
        "plan": {"steps": schedule.steps, "warmup": schedule.warmup, "interval": schedule.interval,
                 "batch_size": inputs.batch.size, "block_len": inputs.batch.block_len,
                 "micro_batch_size": plan.memory.micro_batch_size, "processes": plan.processes},
        "path": result.path,
        "eval_loss_before": result.before,
        "eval_loss_after": result.after,
        **{f"{name}_{when}": values[f"eval_{name}"] for when, values in (("before", result.started),
                                                                         ("after", result.ended))
           for name in FIGURES[1:] if f"eval_{name}" in values},
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_vram_gb": torch.cuda.max_memory_reserved() / 1e9 if inputs.device.device.type == "cuda" else None,
        "peak_ram_gb": peak_ram_bytes() / 1e9,
        "history": state.log_history,
    }


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    return {"python": platform.python_version(), **{name: installed_version(name) or "없음" for name in names}}
