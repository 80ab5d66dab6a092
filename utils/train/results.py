"""학습 한 번의 결과를 기록으로 옮긴다: run.json, curves.png, README.md, 그리고 samples.md에 남길 시험 답."""

import contextlib
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from utils import record, report
from utils.console import one_line
from utils.data.questions import plain_question, read_question, readable
from utils.decode.decoder import Decoder
from utils.environment import installed_version, peak_ram_bytes
from utils.errors import first_line
from utils.paths import DATA_DEMO
from utils.prompter import EXAMPLES, fill_placeholder
from utils.sampling import GREEDY
from utils.train import adapter_card, progress
from utils.train.records import Plan, Result, Settings
from utils.train.signals import Interrupt
from utils.train.stage import Inputs

N_COMPARED = 5  # 두 모델이 함께 답하는 질문의 수. 나머지에는 학습한 모델만 시간이 허락하는 만큼 답한다
N_SHOWN = 3  # 콘솔에 보이는 질문의 수
MAX_SAMPLES = 64
GROUP = 16  # 한꺼번에 답하는 질문의 수
SAMPLE_SECONDS, SAMPLE_SHARE = 60.0, 0.1  # 답을 만드는 시간은 이 초와, 학습한 시간의 이 몫 가운데 큰 쪽까지다
SAY_EVERY = 5.0  # 답하는 동안 이만큼(초)마다 어디까지 했는지 말한다
EXAMPLE, HELD_OUT, TRAINED = "예시 질문", "검증 질문", "학습에 쓴 질문"


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
    samples: list[dict] = []
    problem = STOPPED
    if not result.interrupted and interrupt.code is None:
        seconds = max(SAMPLE_SECONDS, SAMPLE_SHARE * result.seconds)
        problem = answer_samples(settings, inputs, result.model, samples, seconds, say)
    record.write_samples(folder, samples)
    if problem is not None:
        say(f"시험 답을 모두 만들지 못했다({problem}). 어댑터와 기록({record.RUN_FILE}, {record.CURVES_FILE}, "
            f"{record.SAMPLES_FILE})은 온전하다")
    for line in sample_lines(samples):
        say(line)


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
    """답을 끝낼 줄 알게 되었는지 한 줄로 말한다."""
    counts = []
    for model in record.MODELS:
        reasons = [sample[f"{model.name}_finish"] for sample in samples if model.name in sample]
        counts.append(f"{model.title} {len(reasons)}개 가운데 {reasons.count('stop')}개")
    return f"\n{samples[0]['kind']}에 스스로 멈춘 답({record.SAMPLES_FILE}): {', '.join(counts)}"


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
                 "batch_size": inputs.batch.size, "block_len": inputs.batch.block_len,
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


@dataclass(frozen=True)
class Asked:
    """물을 것 하나.

    Attributes:
        ids: 질문의 토큰.
        sample: samples.md에 남길 것: `kind`, `question`, 있으면 `reference`. 답과 답이 끝난 이유가 여기에 더해진다.
    """

    ids: list[int]
    sample: dict = field(default_factory=dict)


STOPPED = "Ctrl+C로 멈추었다"


def answer_samples(settings: Settings, inputs: Inputs, model, samples: list[dict], seconds: float,
                   say: Callable[[str], None]) -> str | None:
    """답을 만드는 대로 `samples`에 더한다. 끝까지 만들지 못했으면 그 이유 한 줄을, 만들었으면 None을 돌려준다.

    학습은 이미 끝났으므로 메모리 부족도, Ctrl+C도, 어떤 오류도 여기서 멈춘다.

    Args:
        seconds: 답을 만드는 데 쓸 수 있는 시간(초).
    """
    try:
        fill_samples(questions_to_ask(settings, inputs), inputs, model, samples, seconds, say)
    except KeyboardInterrupt:
        return STOPPED
    except torch.OutOfMemoryError:
        return "메모리가 모자란다"
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def fill_samples(asked: list[Asked], inputs: Inputs, model, samples: list[dict], seconds: float,
                 say: Callable[[str], None]) -> None:
    """앞의 질문들에는 두 모델이, 나머지에는 학습한 모델만 여럿씩 함께 답한다. 시간이 다 되면 다 만든 답만 담는다."""
    if not asked:
        return
    until = time.perf_counter() + seconds
    longest = max(inputs.documents.cutoff_len or 0, *(len(one.ids) for one in asked)) + GREEDY.max_new_tokens
    decoder = Decoder(model, inputs.tokenizer, inputs.end_ids, longest=longest)
    asked = [one for one in asked if len(one.ids) < decoder.context]
    compared, rest = asked[:N_COMPARED], asked[N_COMPARED:]
    groups = [("tuned", compared), ("base", compared),
              *(("tuned", rest[begin:begin + GROUP]) for begin in range(0, len(rest), GROUP))]
    total = sum(len(group) for _, group in groups)
    say(f"\n{asked[-1].sample['kind']} {len(asked)}개에 답해 본다(길어야 {seconds:.0f}초). Ctrl+C를 누르면 답만 "
        "그만두고, 어댑터와 기록은 그대로 남는다")
    finished: list[Asked] = []
    with telling(say, lambda: f"  답 {len(finished)}/{total}개, 길어야 {until - time.perf_counter():.0f}초 남았다"):
        for name, group in groups:
            answer(decoder, inputs, group, name, until)
            finished += group
            if name == "tuned":
                samples.extend(one.sample for one in group if name in one.sample)


@contextlib.contextmanager
def telling(say: Callable[[str], None], line: Callable[[], str]) -> Iterator[None]:
    """`with` 안에 있는 동안 `SAY_EVERY`초마다 `line()`을 말한다. 여럿이 함께 답하는 동안에도 멈춘 듯 보이지 않는다."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(SAY_EVERY):
            say(line())

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def answer(decoder: Decoder, inputs: Inputs, group: list[Asked], name: str, until: float) -> None:
    """기반 모델(base)이나 학습한 모델(tuned)의 답과 답이 끝난 이유를 표본마다 적는다. 다 못 만든 답은 적지 않는다."""
    decoder.use_adapter(name == "tuned")
    replies = decoder.answer_many([one.ids for one in group], GREEDY, until)
    for one, reply in zip(group, replies, strict=True):
        if reply.finish_reason != "cancelled":
            one.sample[name] = readable(inputs.tokenizer, reply.ids)
            one.sample[f"{name}_finish"] = reply.finish_reason


def questions_to_ask(settings: Settings, inputs: Inputs) -> list[Asked]:
    """사용자의 검증 질문. 검증하지 않았으면 학습에 쓴 질문 몇 개다. 함께 든 데이터면 페이지의 예시 질문도 앞에 둔다."""
    asked = row_questions(inputs, inputs.held_out, HELD_OUT)
    if not len(inputs.held_out):
        asked = row_questions(inputs, np.sort(np.concatenate(inputs.train_set.blocks)), TRAINED)[:N_COMPARED]
    return [*(example_questions(inputs) if Path(settings.data_path) == DATA_DEMO else ()), *asked]


def example_questions(inputs: Inputs) -> list[Asked]:
    asked = []
    for instruction, context in EXAMPLES:
        prompt, _ = inputs.prompter.pieces(instruction, context, "")
        asked.append(Asked(inputs.encoder.encode_prompt(prompt),
                           {"kind": EXAMPLE, "question": fill_placeholder(instruction, context)}))
    return asked


def row_questions(inputs: Inputs, members: np.ndarray, kind: str) -> list[Asked]:
    """데이터의 행에서 물을 것 `MAX_SAMPLES`개까지. 질문 없이 글만 있는 행은 건너뛴다."""
    found: list[Asked] = []
    for member in members:
        row = read_question(inputs.documents, member)
        if len(row.prompt) and len(found) < MAX_SAMPLES:
            question = plain_question(inputs.tokenizer, inputs.prompter, row.prompt)
            sample = {"kind": kind, "question": question, "reference": readable(inputs.tokenizer, row.answer)}
            found.append(Asked(row.prompt.tolist(), sample))
    return found
