"""GPT-NeoX를 위한 빠른 길을 맡는다: 토큰 하나의 계산과 뽑기 전체가 CUDA graph 하나다. 한 번에 답 하나만 만든다."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from utils.engine.cuda import CompileError, load_kernels
from utils.engine.prefill import Prefill
from utils.engine.weights import ROWS, Weights
from utils.sampling import Sampling

SOURCES = ("decode_math.cu", "decode_product.cu", "decode_attention.cu", "decode.cu", "decode_sample.cu",
           "decode_prefill.cu")
KERNELS = ["project", "attend", "contract", "head", "choose", "dequantize", "both_norms", "split_heads", "read_cache"]
WARPS = 16
THREADS = WARPS * 32
CHUNK = 64
ATTENDERS = 256
TABLE = 32768  # NF4 표의 바이트


def kernel_source() -> str:
    """커널 소스 전체."""
    return "".join((Path(__file__).parent / "kernels" / name).read_text(encoding="utf-8") for name in SOURCES)


def kernel_defines(config, vocab: int, rank: int, nf4: bool, double_quant: bool, bf16: bool) -> dict[str, int]:
    """모델 하나를 위한 커널의 상수."""
    head = config.hidden_size // config.num_attention_heads
    return {"HIDDEN": config.hidden_size, "FF": config.intermediate_size, "HEADS": config.num_attention_heads,
            "HEAD_DIM": head, "ROTARY": int(head * config.rope_parameters.get("partial_rotary_factor", 1.0)),
            "CONTEXT": config.max_position_embeddings, "VOCAB": vocab, "RANK": rank, "NF4": int(nf4),
            "DOUBLE_QUANT": int(double_quant), "BF16": int(bf16), "GROUP": 16 if head % 32 else 32}


class KvCache:
    """층마다의 K, V. GROUP칸마다 fp16 scale을 둔 int8이다. values, scales: [2][층][머리][위치][칸]."""

    def __init__(self, sizes: dict[str, int], layers: int, device: torch.device):
        shape = 2, layers, sizes["HEADS"], sizes["CONTEXT"], sizes["HEAD_DIM"]
        values = torch.zeros(shape, dtype=torch.int8, device=device)
        scales = torch.zeros(*shape[:-1], shape[-1] // sizes["GROUP"], dtype=torch.float16, device=device)
        self.layers = [(values[0, i], scales[0, i], values[1, i], scales[1, i]) for i in range(layers)]


class NeoxDecode:
    """병렬 잔차를 쓰는 GPT-NeoX에서 토큰을 만든다. `why_not`이 None인 모델만 받는다.

    Attributes:
        path: 이 길을 설명하는 한 줄.

    Raises:
        CompileError: 커널을 컴파일하지 못했다.
    """

    def __init__(self, model, vocab: int):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        weights = self._weights = Weights(model)
        device = weights.embedding.device
        sizes = self._sizes = kernel_defines(base.config, vocab, weights.rank, weights.nf4, weights.double_quant,
                                             weights.dtype == torch.bfloat16)
        self._kernels = load_kernels(kernel_source(), KERNELS, sizes)
        properties = torch.cuda.get_device_properties(device)
        self._multiprocessors = properties.multi_processor_count
        self._shared_limit = properties.shared_memory_per_block_optin
        self._plan_grids()

        hidden, acts, heads = sizes["HIDDEN"], sizes["FF"] + sizes["HIDDEN"], sizes["HEADS"]
        self._splits = -(-sizes["CONTEXT"] // CHUNK)
        self._x = torch.zeros(hidden, device=device)
        self._qkv = torch.zeros(3 * hidden, device=device)
        self._act = torch.zeros(2, acts, dtype=torch.int16, device=device)
        self._partial = torch.zeros(heads, self._splits, sizes["HEAD_DIM"] + 2, device=device)
        self._done = torch.zeros(heads, dtype=torch.int32, device=device)
        self._logits = torch.zeros(vocab, device=device)
        self._state = torch.zeros(6, dtype=torch.int32, device=device)
        self._settings = torch.zeros(3, device=device)
        self._adapter_on = torch.ones(1, device=device)
        self._answer = torch.zeros(sizes["CONTEXT"], dtype=torch.int32, device=device)
        self._told = torch.zeros(sizes["CONTEXT"], dtype=torch.int32).pin_memory()
        self._cache = KvCache(sizes, len(weights.layers), device)
        self._prefill = Prefill(weights, self._kernels, sizes, self._cache)
        self._bias = [layer.dense.bias + layer.down.bias for layer in weights.layers]
        self._told_events = [torch.cuda.Event(), torch.cuda.Event()]
        self._graph = self._capture()
        kind = "NF4" if weights.nf4 else str(weights.dtype).removeprefix("torch.")
        self.path = f"전용 CUDA 커널({kind} GPT-NeoX, 토큰 하나가 CUDA graph 하나)"

    def use_adapter(self, on: bool) -> None:
        """어댑터를 켜거나 끈다. 커널이 읽는 값 하나를 바꿀 뿐이다."""
        self._adapter_on.fill_(float(on))
        self._prefill.adapter_on = on

    def room(self, tokens: int) -> int:
        """cache는 모델이 읽을 수 있는 길이만큼 처음부터 잡아 둔다."""
        return tokens

    def answer_rows(self, questions: list[list[int]], settings: Sampling, limits: list[int],
                    end_ids: Sequence[int], until: float = math.inf) -> list[list[int]]:
        """질문에 하나씩 답한다."""
        answers = []
        for question, limit in zip(questions, limits, strict=True):
            answers.append([])
            for token in self.tokens(question, settings, limit):
                answers[-1].append(token)
                if token in end_ids or time.perf_counter() > until:
                    break
        return answers

    def tokens(self, input_ids: list[int], settings: Sampling, limit: int) -> Iterator[int]:
        """토큰을 최대 `limit`개 내놓는다. GPU는 읽는 쪽보다 한 토큰만 앞서 간다."""
        seed = settings.seed_number()
        halves = [half - 2**32 if half >= 2**31 else half for half in (seed & 0xFFFFFFFF, seed >> 32)]
        state = [len(input_ids) - 1, 0, settings.top_k, settings.no_repeat_ngram_size, *halves]
        self._state.copy_(torch.tensor(state, dtype=torch.int32))
        self._settings.copy_(torch.tensor([settings.temperature, settings.top_p, settings.repetition_penalty]))
        self._x.copy_(self._prefill(input_ids))
        self._choose()
        self._told_events[0].record()
        for index in range(limit):
            if index + 1 < limit:
                self._graph.replay()
                self._told_events[(index + 1) % 2].record()
            self._told_events[index % 2].synchronize()
            yield int(self._told[index])

    def logits(self, input_ids: list[int], answer: list[int]) -> torch.Tensor:
        """`answer`를 한 토큰씩 먹이며 얻은 로짓 [답의 길이, 어휘]. 정확도를 잴 때 쓴다."""
        self._state.copy_(torch.tensor([len(input_ids) - 1, 0, 0, 0, 0, 0], dtype=torch.int32))
        self._settings.copy_(torch.tensor([0.0, 1.0, 1.0]))
        self._x.copy_(self._prefill(input_ids))
        self._choose()
        rows = [self._logits.clone()]
        for token in answer[:-1]:
            self._x.copy_(self._weights.embedding[token])
            self._graph.replay()
            rows.append(self._logits.clone())
        return torch.stack(rows)

    def _plan_grids(self) -> None:
        sizes, table = self._sizes, TABLE if self._weights.nf4 else 0
        hidden, rank = sizes["HIDDEN"], sizes["RANK"]
        qkv, up, slot = 3 * hidden // ROWS, sizes["FF"] // ROWS, ROWS * WARPS * 4
        norm = WARPS * 8 + hidden * 4
        lora = -(-2 * rank // ROWS) * slot + -(-rank // 4) * 16
        blocks, _ = self._grid(qkv + up, table + lora + 1024 + norm + slot, slot)
        self._qkv_blocks = max(1, round(blocks * qkv / (qkv + up)))
        up_blocks = max(1, blocks - self._qkv_blocks)
        self._project_slots = max(-(-qkv // self._qkv_blocks), -(-up // up_blocks))
        self._project_grid = self._qkv_blocks + up_blocks
        self._project_shared = table + lora + 1024 + norm + self._project_slots * slot
        inputs = (sizes["FF"] + hidden) * (2 if self._weights.nf4 else 4)
        self._contract_grid, self._contract_slots = self._grid(hidden // ROWS, table + 1024 + inputs, 2 * slot)
        self._contract_shared = table + 1024 + inputs + self._contract_slots * 2 * slot
        self._head_grid, self._head_slots = self._grid(-(-sizes["VOCAB"] // ROWS), norm, slot)
        self._head_shared = norm + self._head_slots * slot
        for name in ("project", "contract", "head"):
            self._kernels[name].allow_shared(getattr(self, f"_{name}_shared"))

    def _grid(self, tiles: int, extra: int, slot: int) -> tuple[int, int]:
        """(블록 수, 블록 하나의 최대 행 묶음). extra와 slot은 블록 하나와 묶음 하나의 공유 메모리(바이트)다.

        Raises:
            CompileError: 이 GPU의 공유 메모리에 들어가지 않는다.
        """
        most = min(THREADS // ROWS, (self._shared_limit - extra) // slot)
        if most < 1:
            raise CompileError(f"공유 메모리가 모자란다: {self._shared_limit}바이트")
        blocks = min(tiles, self._multiprocessors * -(-tiles // (self._multiprocessors * most)))
        return blocks, -(-tiles // blocks)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """토큰 하나의 graph. 커널을 겹쳐 시작하는 쪽과 아닌 쪽 가운데 여기서 더 빠른 것을 고른다."""
        ways = [False, True] if torch.cuda.get_device_capability() >= (9, 0) else [False]
        graphs = []
        for self._overlap in ways:
            self._step()
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                self._step()
            graphs.append((self._seconds(graph), graph))
        return min(graphs, key=lambda pair: pair[0])[1]

    def _seconds(self, graph: torch.cuda.CUDAGraph, times: int = 10) -> float:
        self._state.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def _step(self) -> None:
        weights, kernels, overlap = self._weights, self._kernels, self._overlap
        none = (None, None)
        for index, layer in enumerate(weights.layers):
            lora = (layer.adapter.split_down, layer.adapter.up) if layer.adapter else none
            kernels["project"](
                (self._project_grid,), (THREADS,), self._x, weights.eps, weights.code, self._adapter_on,
                self._qkv_blocks, self._project_slots, *layer.norm1, *layer.qkv.pointers(), layer.qkv.bias, *lora,
                self._qkv, *layer.norm2, *layer.up.pointers(), layer.up.bias, self._act,
                shared=self._project_shared, overlap=overlap and index > 0)
            kernels["attend"]((self._sizes["HEADS"], self._splits), (ATTENDERS,), self._qkv, weights.turns, self._state,
                              *self._cache.layers[index], self._partial, self._done, self._act, overlap=overlap)
            kernels["contract"]((self._contract_grid,), (THREADS,), self._x, self._act, weights.code,
                                self._bias[index], self._contract_slots, *layer.down.pointers(),
                                *layer.dense.pointers(), shared=self._contract_shared, overlap=overlap)
        self._choose()

    def _choose(self) -> None:
        weights = self._weights
        self._kernels["head"]((self._head_grid,), (THREADS,), self._x, weights.eps, *weights.final_norm, weights.head,
                              self._logits, self._head_slots, shared=self._head_shared, overlap=self._overlap)
        self._kernels["choose"]((1,), (1024,), self._logits, self._state, self._settings, self._answer, self._told,
                                weights.embedding, self._x, overlap=self._overlap)
