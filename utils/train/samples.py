"""학습한 모델의 시험 답: 사용자의 검증 질문에 기반 모델과 학습한 모델이 답한다."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from utils.console import telling
from utils.data.questions import plain_question, read_question, readable
from utils.decode import likelihood, scorecard
from utils.decode.decoder import Decoder, reads
from utils.decode.likelihood import Likelihood, Pair
from utils.decode.scorecard import Score
from utils.errors import first_line
from utils.model import vram
from utils.paths import DATA_DEMO
from utils.prompter import EXAMPLES
from utils.record import MODELS
from utils.sampling import GREEDY
from utils.train import exact
from utils.train.exact import ExactMatch
from utils.train.inputs import Inputs
from utils.train.records import Settings
from utils.turns import as_talk, fill_placeholder

N_COMPARED = 5  # 두 모델이 함께 답하는 질문의 수. 나머지에는 학습한 모델만 시간이 허락하는 만큼 답한다
MAX_SAMPLES = 64
GROUP = 16  # 한꺼번에 답하는 질문의 수
SHORTEST_CONTEXT = 1024  # 설정에 길이의 한계가 없는 모델에서 시험의 문항을 자르는 길이
EXAMPLE, HELD_OUT, TRAINED = "예시 질문", "검증 질문", "학습에 쓴 질문"
STOPPED = "Ctrl+C로 멈추었다"


@dataclass(frozen=True)
class Asked:
    """물을 것 하나.

    Attributes:
        ids: 질문의 토큰.
        sample: samples.md에 남길 것: `kind`, `question`, 있으면 `reference`. 답과 답이 끝난 이유가 여기에 더해진다.
    """

    ids: list[int]
    sample: dict = field(default_factory=dict)


@dataclass
class Samples:
    """만든 시험 답.

    Attributes:
        rows: 질문마다의 기록. 다 만든 것만 있다.
        exact: 정답과 똑같은 답의 수. 정답이 짧은 데이터에서만 센다.
        scores: `eval_task`에 적은 시험의 성적.
    """

    rows: list[dict] = field(default_factory=list)
    exact: ExactMatch | None = None
    scores: list[Score] = field(default_factory=list)

    def measured(self) -> dict:
        """run.json에 더할 것. 잰 것이 없으면 비어 있다."""
        found = {} if self.exact is None else {"exact": self.exact.as_dict()}
        return found | ({"scorecard": [score.as_dict() for score in self.scores]} if self.scores else {})


def answer_samples(settings: Settings, inputs: Inputs, model, samples: Samples, seconds: float,
                   say: Callable[[str], None]) -> str | None:
    """답을 만드는 대로 `samples`에 더한다. 끝까지 만들지 못했으면 그 이유 한 줄을, 만들었으면 None을 돌려준다.

    학습은 이미 끝났으므로 메모리 부족도, Ctrl+C도, 어떤 오류도 여기서 멈춘다.

    Args:
        seconds: 답을 만드는 데 쓸 수 있는 시간(초).
    """
    try:
        with vram.shortage():
            samples.exact = exact.measure(model, inputs.documents, inputs.documents.asked(inputs.parts.held_out), say)
            samples.scores = measure_exams(inputs, model, say)
            fill_samples(questions_to_ask(settings, inputs), inputs, model, samples, seconds, say)
    except KeyboardInterrupt:
        return STOPPED
    except torch.OutOfMemoryError:
        return "메모리가 모자란다"
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def measure_exams(inputs: Inputs, model, say: Callable[[str], None]) -> list[Score]:
    """`eval_task`에 적은 시험의 성적. 어댑터를 켠 것과 끈 것을 같은 문항으로 잰다."""
    if not inputs.exams:
        return []

    def ask(name: str, pairs: list[Pair], told: Callable[[int], None]) -> list[Likelihood]:
        with model.disable_adapter() if name == "base" else contextlib.nullcontext():
            return likelihood.measure(model, pairs, told=told)

    model.eval()
    context = reads(model.config.get_text_config(decoder=True)) or inputs.documents.cutoff_len or SHORTEST_CONTEXT
    say(f"\n시험의 문항 {sum(len(exam.items) for exam in inputs.exams):,}개를 두 모델이 푼다")
    return scorecard.measure(ask, [each.name for each in MODELS], inputs.exams, inputs.encoder, inputs.end_id, context,
                             say)


def fill_samples(asked: list[Asked], inputs: Inputs, model, samples: Samples, seconds: float,
                 say: Callable[[str], None]) -> None:
    """앞의 질문들에는 두 모델이, 나머지에는 학습한 모델만 여럿씩 함께 답한다. 시간이 다 되면 만든 것만 담고 말한다."""
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
    kinds = {one.sample["kind"] for one in asked}
    what = kinds.pop() if len(kinds) == 1 else "질문"
    say(f"\n{what} {len(asked)}개에 답해 본다(길어야 {seconds:.0f}초). Ctrl+C를 누르면 답만 그만두고, 어댑터와 기록은 "
        "그대로 남는다")
    finished: list[Asked] = []
    shortened: set[str] = set()  # 메모리가 모자라 짧게 답했으면 그 말
    with telling(say, lambda: f"  답 {len(finished)}/{total}개, 길어야 {until - time.perf_counter():.0f}초 남았다"):
        for name, group in groups:
            answer(decoder, inputs, group, name, until)
            finished += group
            shortened.add(decoder.notice)
            if name == "tuned":
                samples.rows.extend(one.sample for one in group if name in one.sample)
    for notice in sorted(shortened - {""}):
        say(notice)
    answered = sum("tuned" in one.sample for one in asked)
    if answered < len(asked):
        say(f"{seconds:.0f}초가 다 되어 학습한 모델이 {what} {len(asked)}개 가운데 {answered}개에만 답했다")


def answer(decoder: Decoder, inputs: Inputs, group: list[Asked], name: str, until: float) -> None:
    """기반 모델(base)이나 학습한 모델(tuned)의 답과 답이 끝난 이유를 표본마다 적는다. 다 못 만든 답은 적지 않는다."""
    decoder.use_adapter(name == "tuned")
    replies = decoder.answer_many([one.ids for one in group], GREEDY, until)
    for one, reply in zip(group, replies, strict=True):
        if reply.finish_reason != "cancelled":
            one.sample[name] = readable(inputs.tokenizer, reply.ids)
            one.sample[f"{name}_finish"] = reply.finish_reason


def questions_to_ask(settings: Settings, inputs: Inputs) -> list[Asked]:
    """사용자의 질문 `MAX_SAMPLES`개까지. 함께 든 데이터면 페이지의 예시 질문도 앞에 둔다."""
    is_shipped = Path(settings.data_path).resolve() == DATA_DEMO
    return [*(example_questions(inputs) if is_shipped else ()), *user_questions(inputs)]


def user_questions(inputs: Inputs) -> list[Asked]:
    """사용자의 검증 질문. 검증하지 않았으면 학습에 쓴 질문 몇 개다."""
    asked = inputs.documents.asked
    if len(inputs.parts.held_out):
        return row_questions(inputs, asked(inputs.parts.held_out), HELD_OUT)
    return row_questions(inputs, asked(np.sort(np.concatenate(inputs.train_set.blocks))), TRAINED)[:N_COMPARED]


def example_questions(inputs: Inputs) -> list[Asked]:
    asked = []
    for instruction, context in EXAMPLES:
        turns = as_talk(instruction, context)
        asked.append(Asked(inputs.encoder.encode_asked(inputs.prompter.talk(turns)[0]),
                           {"kind": EXAMPLE, "question": fill_placeholder(instruction, context)}))
    return asked


def row_questions(inputs: Inputs, members: np.ndarray, kind: str) -> list[Asked]:
    """데이터의 행에서 물을 것 `MAX_SAMPLES`개까지. 질문 없이 글만 있는 행은 건너뛴다."""
    found: list[Asked] = []
    for member in members:
        if len(found) == MAX_SAMPLES:
            break
        row = read_question(inputs.documents, member)
        if len(row.prompt):
            question = plain_question(inputs.tokenizer, inputs.prompter, row.prompt)
            sample = {"kind": kind, "question": question, "reference": readable(inputs.tokenizer, row.answer)}
            found.append(Asked(row.prompt.tolist(), sample))
    return found
