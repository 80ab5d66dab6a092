"""학습 한 번의 결과를 기록으로 옮긴다: run.json, curves.png, samples.md."""

import contextlib
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from utils import record, report
from utils.data.questions import read_question
from utils.decode import likelihood, scorecard
from utils.decode.decoder import Decoder
from utils.decode.likelihood import Likelihood, Pair
from utils.decode.scorecard import Score
from utils.environment import installed_version, peak_ram_bytes
from utils.errors import first_line
from utils.prompter import EXAMPLES, fill_placeholder
from utils.sampling import GREEDY
from utils.train import exact, progress
from utils.train.exact import ExactMatch
from utils.train.records import Plan, Result, Settings
from utils.train.stage import Inputs

N_COMPARED = 5  # 두 모델이 함께 답하는 검증 질문의 수. 나머지에는 학습한 모델만 시간이 허락하는 만큼 답한다
MAX_SAMPLES = 64
SAMPLE_SECONDS, SAMPLE_SHARE = 60.0, 0.1  # 답을 만드는 시간은 이 초와, 학습한 시간의 이 몫 가운데 큰 쪽까지다
SHOWN_CHARS = 120
SHORTEST_CONTEXT = 1024  # 설정에 길이의 한계가 없는 모델에서 시험의 문항을 자르는 길이


def write(settings: Settings, inputs: Inputs, plan: Plan, result: Result, say: Callable[[str], None]) -> None:
    """run.json, curves.png, samples.md를 쓰고 요약을 말한다."""
    if not result.is_first:
        return
    run = describe_run(settings, inputs, plan, result)
    report.draw_curves([(Path(settings.output_dir).name, run)], Path(settings.output_dir) / "curves.png")
    record.write_run(settings.output_dir, run)  # 어댑터와 기록을 모두 쓴 뒤에 답한다. 답하다 죽어도 잃는 것이 없다
    say("\n결과")
    for line in progress.summary_lines(run):
        say(line)
    samples = Samples()
    # 나뉜 모델로는 답하지 않는다
    problem = None if result.sharded else answer_samples(
        inputs, result.model, samples, max(SAMPLE_SECONDS, SAMPLE_SHARE * result.seconds))
    record.write_samples(settings.output_dir, samples.examples + samples.held_out)
    measured = {}
    if samples.exact is not None:
        measured["exact"] = samples.exact.as_dict()
        say(samples.exact.line())
    if samples.scores:
        measured["scorecard"] = [score.as_dict() for score in samples.scores]
        for score in samples.scores:
            say(score.line())
    if measured:
        record.write_run(settings.output_dir, {**run, **measured})
    if problem is not None:
        say(f"예시 답을 모두 만들지 못했다({problem}). 어댑터와 기록은 온전하다")
    if samples.held_out:
        say(stopped_line(samples.held_out))
    for sample in samples.examples:
        say(f"\n질문: {sample['question']}")
        for model in record.MODELS:
            say(f"  {model.title}의 답: {one_line(sample[model.name])}")


def one_line(answer: str) -> str:
    """콘솔에 보일 만큼의 답."""
    line = " ".join(answer.split()) or "(빈 답)"
    return line if len(line) <= SHOWN_CHARS else f"{line[:SHOWN_CHARS]}…"


def stopped_line(samples: list[dict]) -> str:
    """답을 끝낼 줄 알게 되었는지 한 줄로 말한다."""
    counts = []
    for model in record.MODELS:
        reasons = [sample[f"{model.name}_finish"] for sample in samples if model.name in sample]
        counts.append(f"{model.title} {len(reasons)}개 가운데 {reasons.count('stop')}개")
    return f"검증 질문에 스스로 멈춘 답({record.SAMPLES_FILE}): {', '.join(counts)}"


def describe_run(settings: Settings, inputs: Inputs, plan: Plan, result: Result) -> dict:
    """학습 한 번을 되풀이하고 비교하는 데 필요한 모든 것."""
    schedule, state, seconds = plan.schedule, result.state, result.seconds
    tokens = inputs.train_set.n_tokens * settings.num_train_epochs * state.global_step / state.max_steps
    return {
        "settings": asdict(settings),
        "versions": versions(),
        "device": {"name": str(inputs.device.device), "dtype": str(inputs.device.dtype), "why": inputs.device.reason},
        "data": {"sha256": inputs.data_sha256, "rows": len(inputs.documents), "cut": inputs.documents.n_cut,
                 "train_tokens": inputs.train_set.n_tokens, "blocks": len(inputs.train_set),
                 "validation_rows": len(inputs.held_out)},
        "plan": {"steps": schedule.steps, "warmup": schedule.warmup, "interval": schedule.interval,
                 "micro_batch_size": plan.memory.micro_batch_size, "processes": plan.processes},
        "path": result.path,
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


@dataclass
class Samples:
    """질문마다 두 모델의 답과 그 답이 끝난 이유. 검증 질문에는 모범 답도 있다.

    `exact`는 정답과 똑같은 답의 수다. 정답이 짧은 데이터에서만 센다. `scores`는 `eval_task`에 적은 시험의 성적이다.
    """

    examples: list[dict] = field(default_factory=list)
    held_out: list[dict] = field(default_factory=list)
    exact: ExactMatch | None = None
    scores: list[Score] = field(default_factory=list)


def answer_samples(inputs: Inputs, model, samples: Samples, seconds: float) -> str | None:
    """답을 만드는 대로 `samples`에 더한다. 끝까지 만들지 못했으면 그 이유 한 줄을, 만들었으면 None을 돌려준다.

    학습은 이미 끝났으므로 메모리 부족도, Ctrl+C도, 어떤 오류도 여기서 멈춘다.

    Args:
        seconds: 답을 만드는 데 쓸 수 있는 시간(초).
    """
    try:
        fill_samples(inputs, model, samples, time.perf_counter() + seconds)
    except KeyboardInterrupt:
        return "Ctrl+C로 멈추었다"
    except torch.OutOfMemoryError:
        return "메모리가 모자란다"
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def fill_samples(inputs: Inputs, model, samples: Samples, until: float) -> None:
    """똑같은 답을 세고, 예시 질문과 검증 질문에 여럿씩 함께 답한다. 질문 없이 글만 있는 행은 건너뛴다.

    Args:
        until: `time.perf_counter()`가 이때가 되면 멈추고, 다 만든 답만 담는다.
    """
    samples.exact = exact.measure(model, inputs.documents, inputs.held_out)
    samples.scores = measure_exams(inputs, model)
    examples = []
    for instruction, context in EXAMPLES:
        prompt, _ = inputs.prompter.pieces(instruction, context, "")
        examples.append(({"question": fill_placeholder(instruction, context)}, inputs.encoder.encode_prompt(prompt)))
    asked = max(inputs.documents.cutoff_len or 0, *(len(ids) for _, ids in examples))
    decoder = Decoder(model, inputs.tokenizer, inputs.end_ids, longest=asked + GREEDY.max_new_tokens)
    held_out = questions_of(inputs)
    for kept, pairs in ((samples.examples, examples), (samples.held_out, held_out[:N_COMPARED])):
        pairs = [pair for pair in pairs if len(pair[1]) < decoder.context]
        answer(decoder, inputs, pairs, "tuned", until)
        answer(decoder, inputs, pairs, "base", until)
        kept += [sample for sample, _ in pairs if "tuned" in sample and "base" in sample]
    rest = [pair for pair in held_out[N_COMPARED:] if len(pair[1]) < decoder.context]
    answer(decoder, inputs, rest, "tuned", until)
    samples.held_out.extend(sample for sample, _ in rest if "tuned" in sample)


def measure_exams(inputs: Inputs, model) -> list[Score]:
    """`eval_task`에 적은 시험의 성적. 어댑터를 켠 것과 끈 것을 같은 문항으로 잰다."""
    if not inputs.exams:
        return []

    def ask(name: str, pairs: list[Pair]) -> list[Likelihood]:
        with model.disable_adapter() if name == "base" else contextlib.nullcontext():
            return likelihood.measure(model, pairs)

    context = int(inputs.config.get("max_position_embeddings") or inputs.documents.cutoff_len or SHORTEST_CONTEXT)
    return scorecard.measure(ask, [each.name for each in record.MODELS], inputs.exams, inputs.encoder, inputs.end_id,
                             context, lambda line: None)


def questions_of(inputs: Inputs) -> list[tuple[dict, list[int]]]:
    """(질문과 모범 답, 질문의 토큰) `MAX_SAMPLES`개까지."""
    found = []
    for member in inputs.held_out:
        row = read_question(inputs.documents, member)
        if len(row.prompt) and len(found) < MAX_SAMPLES:
            found.append(({"question": inputs.tokenizer.decode(row.prompt),
                           "reference": inputs.tokenizer.decode(row.answer[:-1]).strip()}, row.prompt.tolist()))
    return found


def answer(decoder: Decoder, inputs: Inputs, pairs: list[tuple[dict, list[int]]], name: str,
           until: float) -> None:
    """기반 모델(base)이나 학습한 모델(tuned)의 답과 답이 끝난 이유를 표본마다 적는다. 다 못 만든 답은 적지 않는다."""
    decoder.use_adapter(name == "tuned")
    for (sample, _), reply in zip(pairs, decoder.answer_many([ids for _, ids in pairs], GREEDY, until), strict=True):
        if reply.finish_reason != "cancelled":
            sample[name] = inputs.tokenizer.decode(reply.ids).strip()
            sample[f"{name}_finish"] = reply.finish_reason
