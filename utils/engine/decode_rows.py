"""질문 여럿에 함께 답하는 커널들의 차례. 가중치를 한 번 읽어 모든 줄에 곱한다."""

import torch

from utils.engine.decode_plan import ATTENDERS, CHOOSERS, LINE_SPLITS, LINES, SPLITS, THREADS, WIDE
from utils.engine.decode_step import DecodeStep, KvCache, norm_argument
from utils.engine.weights import Adapter, Norm

LORA_THREADS = 256


class DecodeRows:
    """함께 답하는 줄 LINES개의 메모리와, 토큰 하나씩의 커널들.

    Attributes:
        x: 잔차 fp32 [LINES, hidden].
        state: int32 [LINES, 6]. 줄마다 `DecodeStep.state`와 같다.
        told: 고른 토큰 int32 [LINES, 문맥]. 핀 고정된 CPU 메모리.
        caches: 줄마다의 `KvCache`.
    """

    def __init__(self, step: DecodeStep):
        self._step, self._weights, self._plan, self._kernels = step, step.weights, step.plan, step.kernels
        family, device, dtype = self._weights.family, step.x.device, torch.int16
        self._blocks = step.plan.multiprocessors
        self.x = torch.zeros(LINES, family.hidden, device=device)
        self._y = torch.zeros_like(self.x) if family.post_norm else self.x
        self._in = torch.zeros(2, LINES, family.hidden, dtype=dtype, device=device)
        self._qkv = torch.zeros(LINES, family.qkv_width, device=device)
        self._attended = torch.zeros(LINES, 2, family.q_width, dtype=dtype, device=device)
        self._act = torch.zeros(2, LINES, family.ff, dtype=dtype, device=device)
        self._down = torch.zeros(LINES, 3 * max(1, self._weights.rank), device=device)
        self._partial = torch.zeros(LINES, family.heads, SPLITS, family.head_dim + 2, device=device)
        self._done = torch.zeros(LINES, family.heads, dtype=torch.int32, device=device)
        self.logits = torch.zeros(LINES, len(step.logits), device=device)
        self.state = torch.zeros(LINES, 6, dtype=torch.int32, device=device)
        self._answer = torch.zeros(LINES, family.context, dtype=torch.int32, device=device)
        self.told = torch.zeros(LINES, family.context, dtype=torch.int32)
        if device.type == "cuda":
            self.told = self.told.pin_memory()
        self._table = torch.zeros(LINES, len(step.cache.table), dtype=torch.int64, device=device)
        self.caches = [KvCache(family, step.plan, self._weights.rotary, device, row) for row in self._table]

    def begin(self, prefill, questions: list[list[int]], answer: int, choices: list[list[int]]) -> None:
        """질문들을 하나씩 읽고 줄마다 첫 토큰을 고른다. 모자라는 줄은 첫 질문으로 채운다.

        Args:
            prefill: `Prefill`.
            answer: 줄마다 만들 수 있어야 하는 토큰의 수.
            choices: 줄마다의 [top_k, n-gram의 크기, 씨앗 둘].
        """
        table = self._step.cache.table
        own = table.clone()
        for line in range(LINES):
            question = questions[line] if line < len(questions) else questions[0]
            self.caches[line].grow(len(question) + answer)
            table.copy_(self.caches[line].table)
            self.x[line].copy_(prefill(question))
            choice = choices[line] if line < len(questions) else choices[0]
            self.state[line].copy_(torch.tensor([len(question) - 1, 0, *choice], dtype=torch.int32))
        table.copy_(own)
        self.choose()

    def run(self, adapter_on: bool) -> None:
        """모든 줄의 토큰 하나. 어댑터는 켜거나 끈 채로 캡처한다."""
        family, kernels = self._weights.family, self._kernels
        whole, wide = LINES * family.hidden, self._weights.kind == WIDE
        pending = None
        for index, layer in enumerate(self._weights.layers):
            adapters = [linear.adapter if adapter_on else None
                        for linear in (layer.qkv, layer.out, layer.mlp, layer.down)]
            linear = self._step.linear_arguments(index)
            self._norm(layer.norm1, pending, self._in)
            self._multiply("qkv_lines", linear["qkv"], adapters[0], self._in, family.hidden, self._qkv, whole)
            kernels["attend"]((family.heads // self._plan.queries, LINE_SPLITS, LINES), (ATTENDERS,), self._qkv,
                              self._step.attention_argument(index), self._table, self.state, self._partial, self._done,
                              self._attended)
            if family.parallel:  # 더하기 전의 잔차를 읽는다
                self._norm(layer.norm2, None, self._in)
            self._multiply("out_lines", linear["out"], adapters[1], self._attended, family.q_width, self._y,
                           family.q_width if wide else 0, 2 * family.q_width)
            if not family.parallel:
                self._norm(layer.norm2, layer.post1, self._in)
            self._multiply("mlp_lines", linear["mlp"], adapters[2], self._in, family.hidden, self._act, whole)
            self._multiply("down_lines", linear["down"], adapters[3], self._act, family.ff, self._y,
                           LINES * family.ff if wide else 0)
            pending = layer.post2
        self.choose(pending)

    def choose(self, pending: Norm | None = None) -> None:
        """줄마다 `x`의 로짓을 얻고 다음 토큰을 고른다."""
        step = self._step
        self._norm(self._weights.final_norm, pending, self._in, to_head=True)
        self._kernels["head_lines"]((self._blocks,), (THREADS,), step.head_argument, self._in,
                                    self._weights.family.hidden, LINES * self._weights.family.hidden, None, 1,
                                    self._weights.code, self.logits,
                                    shared=self._plan.lines_shared)
        self._kernels["choose"]((LINES,), (CHOOSERS,), self.logits, self.state, step.settings, self._answer, self.told,
                                self._weights.embedding, self.x, shared=self._plan.choose_shared)

    def _norm(self, norm: Norm | None, pending: Norm | None, out: torch.Tensor, to_head: bool = False) -> None:
        y, post = (None, None) if pending is None else (self._y, pending.weight)
        self._kernels["norm_lines"]((LINES,), (THREADS,), self.x, y, post, norm_argument(norm), int(to_head), out)

    def _multiply(self, name: str, linear, adapter: Adapter | None, source: torch.Tensor, columns: int,
                  out: torch.Tensor, low: int, stride: int | None = None) -> None:
        """source [LINES, columns](줄의 간격은 stride)에 선형층을 곱한다. 아래 절반은 low칸 뒤에 있다(0이면 없다)."""
        stride, parts = stride or columns, 1
        if adapter is not None:
            parts, rank = adapter.down_fp32.shape[:2]
            self._kernels["lora_lines"]((parts * rank,), (LORA_THREADS,), adapter.down_fp32, source, stride, low,
                                        columns, self._down)
        self._kernels[name]((self._blocks,), (THREADS,), linear, source, stride, low,
                            None if adapter is None else self._down, parts, self._weights.code, out,
                            shared=self._plan.lines_shared)
