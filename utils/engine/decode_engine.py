"""손으로 쓴 대화의 길: 토큰 하나의 계산과 뽑기 전체가 CUDA graph 하나다."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from utils.engine.cuda import load_kernels
from utils.engine.decode_plan import SOURCES, Plan, odd_size
from utils.engine.decode_rows import DecodeRows
from utils.engine.decode_space import NF4, WIDE
from utils.engine.decode_step import DecodeStep, kernel_names
from utils.engine.families import describe
from utils.engine.lines_plan import LINES
from utils.engine.prefill import CAPTURED, Prefill
from utils.engine.weights import Weights, shape_dtype, why_not_weights
from utils.model import vram
from utils.sampling import Sampling

FEW = 3        # 질문이 이보다 적으면 하나씩 답한다
AHEAD = 3      # 읽는 쪽보다 앞서 만들어 두는 토큰의 수. 멈추면 버린다
SPARE = 200e6  # 활성값과 라이브러리에 남겨 두는 바이트


def why_not(model) -> str | None:
    """이 모델에 커널을 쓸 수 없는 이유. 쓸 수 있으면 None."""
    family = describe(model)
    if isinstance(family, str):
        return family
    device = next(model.parameters()).device
    reason = odd_size(family)
    if reason is None and device.type != "cuda":
        reason = "GPU가 아님"
    reason = reason or why_not_weights(model, family)
    if reason is None and shape_dtype(model) == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] < 8:
        reason = "bf16이 없는 GPU"
    return reason


def kernel_source() -> str:
    """커널 소스 전체."""
    folder = Path(__file__).parent / "kernels"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in SOURCES)


class FastDecode:
    """커널로 토큰을 만든다. `why_not`이 None인 모델만 받는다.

    Attributes:
        path: 이 길을 설명하는 한 줄.

    Raises:
        CompileError: 커널을 컴파일하지 못했다.
    """

    def __init__(self, model, vocab: int):
        family = describe(model)
        weights = self._weights = Weights(model, family)
        device = weights.embedding.device
        properties = torch.cuda.get_device_properties(device)
        plan = Plan(family, vocab, weights.rank, weights.kind, weights.double_quant, weights.dtype == torch.bfloat16,
                    properties.multi_processor_count, properties.shared_memory_per_block_optin)
        kernels = load_kernels(kernel_source(), kernel_names(family), plan.defines)
        for name, kernel in kernels.items():
            kernel.allow_shared(plan.shared(name))
        self._step = DecodeStep(weights, plan, kernels, vocab)
        self._prefill = Prefill(self._step)
        self._step.cache.grow(1)
        for size in CAPTURED:
            self._prefill.capture(size)
        self._rows: DecodeRows | None = None
        self._rows_graph: torch.cuda.CUDAGraph | None = None
        self._told_events = [torch.cuda.Event() for _ in range(AHEAD + 1)]
        self._graph = self._capture(soon=False)
        self._soon_graph = self._capture(soon=True) if plan.attend_soon else self._graph
        kind = str(weights.dtype).removeprefix("torch.") if weights.kind == WIDE else (
            "NF4" if weights.kind == NF4 else "int8")
        self.path = f"전용 CUDA 커널({kind} {family.kind}, 토큰 하나가 CUDA graph 하나)"

    def use_adapter(self, on: bool) -> None:
        """어댑터를 켜거나 끈다. 커널이 읽는 값 하나를 바꿀 뿐이다."""
        self._step.adapter_on.fill_(float(on))

    def room(self, tokens: int) -> int:
        """질문과 답을 합쳐 `tokens`개 가운데 지금 메모리에 담을 수 있는 토큰의 수."""
        cache, tokens = self._step.cache, min(tokens, self._weights.family.context)
        if tokens <= cache.capacity:  # 이미 있는 쪽에 들어간다. 남은 메모리를 묻는 데 0.5 ms가 든다
            return tokens
        return min(tokens, max(cache.capacity, cache.fits(self._free_bytes())))

    def _free_bytes(self) -> float:
        """KV cache에 더 쓸 수 있는 바이트."""
        return max(0.0, vram.left(self._weights.embedding.device) - SPARE)

    def tokens(self, input_ids: list[int], settings: Sampling, limit: int) -> Iterator[int]:
        """토큰을 최대 `limit`개 내놓는다. GPU는 읽는 쪽보다 AHEAD개 앞서 가서 graph 사이에 쉬지 않는다."""
        self._begin(input_ids, settings, limit)
        self._told_events[0].record()
        launched = 1
        for index in range(limit):
            while launched < min(limit, index + 1 + AHEAD):
                self._replay(len(input_ids) + launched)
                self._told_events[launched % (AHEAD + 1)].record()
                launched += 1
            self._told_events[index % (AHEAD + 1)].synchronize()
            yield int(self._step.told[index])

    def answer_rows(self, questions: list[list[int]], settings: Sampling, limits: list[int],
                    end_ids: Sequence[int], until: float = math.inf) -> list[list[int]]:
        """질문 여럿에 답한다. 시각 `until`이 되면 만든 데까지 준다.

        LINES개까지, 메모리가 모자라면 들어가는 만큼씩 함께 답한다. 질문이 적거나 문맥의 끝에 닿는 것은 하나씩 답한다.
        """
        answers: list[list[int]] = [[] for _ in questions]
        context, most = self._weights.family.context, max(limits)
        together = [index for index, question in enumerate(questions) if len(question) + most <= context]
        while together and self._step.plan.lines.fits and time.perf_counter() <= until:
            lengths = [len(questions[index]) + most for index in together[:LINES]]
            count = max(1, self._step.cache.lines_that_fit(lengths, self._free_bytes()))
            group, together = together[:count], together[count:]
            if len(group) >= FEW:
                found = self._answer_lines([questions[index] for index in group], settings,
                                           [limits[index] for index in group], end_ids, until)
                for index, answer in zip(group, found, strict=True):
                    answers[index] = answer
        for index, answer in enumerate(answers):
            if not answer and time.perf_counter() <= until:
                for token in self.tokens(questions[index], settings, limits[index]):
                    answer.append(token)
                    if token in end_ids or time.perf_counter() > until:
                        break
        return answers

    @torch.inference_mode()
    def _answer_lines(self, questions: list[list[int]], settings: Sampling, limits: list[int], end_ids: Sequence[int],
                      until: float) -> list[list[int]]:
        """질문 LINES개 이하에 함께 답한다. 줄마다 따로 멈추고, 모두 멈추면 끝난다."""
        if self._rows is None:  # 버퍼와 graph는 한 번 만들어 두고 다음 질문들에도 쓴다
            self._rows = DecodeRows(self._step)
            self._rows_graph = self._rows.capture()
        rows, graph, most = self._rows, self._rows_graph, max(limits)
        self._step.settings.copy_(torch.tensor([settings.temperature, settings.top_p, settings.repetition_penalty]))
        rows.begin(self._prefill, questions, most, [_choice(settings) for _ in questions])
        self._told_events[0].record()
        answers: list[list[int]] = [[] for _ in questions]
        open_lines, launched = set(range(len(questions))), 1
        for index in range(most):
            while launched < min(most, index + 1 + AHEAD):
                graph.replay()
                self._told_events[launched % (AHEAD + 1)].record()
                launched += 1
            self._told_events[index % (AHEAD + 1)].synchronize()
            for line in list(open_lines):
                answers[line].append(int(rows.told[line, index]))
                if answers[line][-1] in end_ids or len(answers[line]) == limits[line]:
                    open_lines.remove(line)
            if not open_lines or time.perf_counter() > until:
                break
        torch.cuda.synchronize()  # 앞서 시작한 graph가 끝나야 줄들의 메모리를 돌려줄 수 있다
        rows.release()
        return answers

    def logits(self, input_ids: list[int], answer: list[int]) -> torch.Tensor:
        """`answer`를 한 토큰씩 먹이며 얻은 로짓 [답의 길이, 어휘]. 정확도를 잴 때 쓴다."""
        step = self._step
        self._begin(input_ids, Sampling(temperature=0.0), len(answer))
        rows = [step.logits.clone()]
        for count, token in enumerate(answer[:-1], start=1):
            step.x.copy_(self._weights.embedding[token].float() * self._weights.embedding_scale)
            self._replay(len(input_ids) + count)
            rows.append(step.logits.clone())
        return torch.stack(rows)

    @torch.inference_mode()
    def _begin(self, input_ids: list[int], settings: Sampling, limit: int) -> None:
        """질문을 읽고 첫 토큰을 고른다."""
        step = self._step
        step.cache.grow(len(input_ids) + limit)
        step.state.copy_(torch.tensor([len(input_ids) - 1, 0, *_choice(settings)], dtype=torch.int32))
        step.settings.copy_(torch.tensor([settings.temperature, settings.top_p, settings.repetition_penalty]))
        step.x.copy_(self._prefill(input_ids))
        step.choose(overlap=False)

    def _replay(self, seen: int) -> None:
        """토큰 하나를 만든다. seen은 그 토큰이 볼 위치의 수(자기 포함)다."""
        (self._soon_graph if seen <= self._step.plan.attend_soon else self._graph).replay()

    def _capture(self, soon: bool) -> torch.cuda.CUDAGraph:
        """토큰 하나의 graph. 커널을 겹쳐 시작하는 쪽과 아닌 쪽 가운데 빠른 것을 고른다. soon은 `run`의 것이다."""
        ways = [False, True] if torch.cuda.get_device_capability() >= (9, 0) else [False]
        graphs = []
        for overlap in ways:
            self._step.state.zero_()
            self._step.run(overlap, soon)
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                self._step.run(overlap, soon)
            graphs.append((self._seconds(graph), graph))
        return min(graphs, key=lambda pair: pair[0])[1]

    def _seconds(self, graph: torch.cuda.CUDAGraph, times: int = 10) -> float:
        self._step.state.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def _choice(settings: Sampling) -> list[int]:
    """고르는 커널의 정수 설정: [top_k, n-gram의 크기, 시드의 아래와 위 32비트]."""
    seed = settings.seed_number()
    halves = [half - 2**32 if half >= 2**31 else half for half in (seed & 0xFFFFFFFF, seed >> 32)]
    return [settings.top_k, settings.no_repeat_ngram_size, *halves]
