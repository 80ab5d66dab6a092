"""질문 여럿에 함께 답하는 커널들의 차례. 가중치를 한 번 읽어 모든 줄에 곱한다."""

import torch

from utils.engine.decode_plan import ATTENDERS, CHOOSERS, THREADS
from utils.engine.decode_step import DecodeStep, lora_of_act, norm_argument
from utils.engine.kv_cache import KvCache
from utils.engine.lines_plan import LINES
from utils.engine.norms import Norm


class DecodeRows:
    """함께 답하는 줄 LINES개의 메모리와, 토큰 하나씩의 커널들.

    Attributes:
        x: 잔차 fp32 [LINES, hidden].
        state: int32 [LINES, 6]. 줄마다 `DecodeStep.state`와 같다.
        told: 고른 토큰 int32 [LINES, 문맥]. 핀 고정된 CPU 메모리.
    """

    def __init__(self, step: DecodeStep):
        self._step, self._weights, self._plan, self._kernels = step, step.weights, step.plan, step.kernels
        family, device, dtype = self._weights.family, step.x.device, torch.int16
        self.x = torch.zeros(LINES, family.hidden, device=device)
        self._y = torch.zeros_like(self.x) if family.post_norm else self.x
        self._qkv = torch.zeros(LINES, family.qkv_width, device=device)
        self._attended = torch.zeros(LINES, 2, family.q_width, dtype=dtype, device=device)
        self._act = torch.zeros(2, LINES, family.ff, dtype=dtype, device=device)
        self._shares = torch.zeros(step.plan.lines.mlp * max(1, self._weights.rank) * LINES, device=device)
        self._partial = torch.zeros(LINES, family.heads, step.plan.lines.splits, family.head_dim + 2, device=device)
        self._done = torch.zeros(LINES, family.heads, dtype=torch.int32, device=device)
        plan = step.plan
        self._parts = torch.zeros(max(plan.lines.out_cuts, plan.lines.down_cuts), LINES, family.hidden, device=device)
        self._parts_done = torch.zeros(max(plan.lines.out, plan.lines.down), dtype=torch.int32, device=device)
        self.logits = torch.zeros(LINES, -(-len(step.logits) // 4) * 4, device=device)[:, : len(step.logits)]
        self.state = torch.zeros(LINES, 6, dtype=torch.int32, device=device)
        self._answer = torch.zeros(LINES, family.context, dtype=torch.int32, device=device)
        self.told = torch.zeros(LINES, family.context, dtype=torch.int32)
        if device.type == "cuda":
            self.told = self.told.pin_memory()
        self._table = torch.zeros(LINES, len(step.cache.table), dtype=torch.int64, device=device)
        # attention이 볼 K, V가 L2의 절반에 들어갈 때만 미리 당긴다
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self._most_prefetched = l2 // 2 // (LINES * 2 * family.kv_heads * family.head_dim)
        self._caches = [KvCache(family, self._weights.rotary, device, row) for row in self._table]

    def begin(self, prefill, questions: list[list[int]], answer: int, choices: list[list[int]]) -> None:
        """질문들을 읽고 줄마다 첫 토큰을 고른다. 모자라는 줄은 첫 줄과 같은 것을 같은 자리에 적으며 헛돈다.

        Args:
            prefill: `Prefill`.
            answer: 줄마다 만들 수 있어야 하는 토큰의 수.
            choices: 줄마다의 [top_k, n-gram의 크기, 시드 둘].
        """
        self.release()  # 앞의 답이 도중에 끊겼을 수 있다
        for cache, question in zip(self._caches, questions, strict=False):
            cache.grow(len(question) + answer)
        self.x[: len(questions)] = prefill.many(questions, self._table)
        lines = list(range(len(questions))) + [0] * (LINES - len(questions))
        self.x.copy_(self.x[lines])
        self._table.copy_(self._table[lines])
        self.state.copy_(torch.tensor([[len(questions[line]) - 1, 0, *choices[line]] for line in lines]))
        self.choose(overlap=False)

    def release(self) -> None:
        """K, V의 쪽을 돌려준다."""
        for cache in self._caches:
            cache.clear()

    def capture(self) -> torch.cuda.CUDAGraph:
        """토큰 하나의 graph. 쪽은 한 줄씩 답할 때의 것을 빌린다."""
        overlap = torch.cuda.get_device_capability() >= (9, 0)
        self._table[:] = self._step.cache.table
        self.state.zero_()
        self.run(overlap)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            self.run(overlap)
        return graph

    def run(self, overlap: bool) -> None:
        """모든 줄의 토큰 하나. overlap은 `DecodeStep.run`과 같다."""
        plan, kernels, family = self._plan, self._kernels, self._weights.family
        code, adapter = self._weights.code, self._step.adapter_on
        for index, layer in enumerate(self._weights.layers):
            linear, (norm1, norm2) = self._step.linear_arguments(index), map(norm_argument, (layer.norm1, layer.norm2))
            lora = lora_of_act(layer.down.adapter, self._shares)
            project = (norm1, linear["qkv"], norm2, linear["mlp"], lora, code, adapter)
            contract = (self.x, self._y, self._attended, self._act, code, adapter, linear["out"], linear["down"], lora,
                        plan.lines.mlp, self._parts, self._parts_done)
            both = plan.lines.mlp if family.parallel else 0
            attention = (self._step.attention_argument(index), self._table, self.state)
            self._matrix("project_lines", plan.lines.qkv + both, self.x, *project, plan.lines.qkv, self._qkv, self._act,
                         *attention, self._most_prefetched, overlap=overlap and index > 0)
            kernels["attend"]((family.heads // plan.queries, plan.lines.splits, LINES), (ATTENDERS,), self._qkv,
                              *attention, self._partial, self._done, self._attended, overlap=overlap)
            if family.parallel:
                self._matrix("contract_lines", plan.lines.out, *contract, overlap=overlap)
                continue
            self._matrix("contract_attention_lines", plan.lines.out, *contract, overlap=overlap)
            self._post(layer.post1, overlap)
            self._matrix("project_lines", plan.lines.mlp, self.x, *project, 0, self._qkv, self._act, *attention,
                         self._most_prefetched, overlap=overlap)
            self._matrix("contract_mlp_lines", plan.lines.down, *contract, overlap=overlap)
            self._post(layer.post2, overlap)
        self.choose(overlap)

    def choose(self, overlap: bool) -> None:
        """줄마다 `x`의 로짓을 얻고 다음 토큰을 고른다."""
        self._matrix("head_lines", self._plan.lines.head, self.x, norm_argument(self._weights.final_norm),
                     self._step.head_argument, self.logits, overlap=overlap)
        self._kernels["choose"]((LINES,), (CHOOSERS,), self.logits, self.state, self._step.settings, self._answer,
                                self.told, self._weights.embedding, self.x, shared=self._plan.choose_shared,
                                overlap=overlap)

    def _matrix(self, name: str, blocks: int, *args, overlap: bool) -> None:
        self._kernels[name]((blocks,), (THREADS,), *args, shared=self._plan.lines.shared, overlap=overlap)

    def _post(self, norm: Norm | None, overlap: bool) -> None:
        """출력에 norm을 거는 구조에서 출력 y를 잔차에 더한다."""
        if norm is not None:
            self._kernels["post_lines"]((LINES,), (THREADS,), self.x, self._y, norm.weight, overlap=overlap)
