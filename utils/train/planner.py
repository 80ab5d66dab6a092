"""모델을 올리기 전에 config.json만으로 VRAM을 예측하고, 카드에 들어가는 학습 방식을 고르는 일을 맡는다."""

import sys
from dataclasses import dataclass, field

import torch

from utils.errors import UsageError

GB = 1e9
MARGIN = 0.3 * GB  # 다른 프로그램이 조금 늘어나도 견디는 여유
CONTEXT = 0.55 * GB  # CUDA context와 라이브러리가 할당기 밖에서 차지하는 양
WORKSPACE = 0.06 * GB  # cuBLAS의 작업 공간
FRAGMENTS = 0.02  # 할당기가 쪼개져 쓰지 못하고 남기는 비율
SAFETY = 1.03  # 예측이 이만큼 모자라도 예산을 넘지 않게 한다
TARGET_TOKENS = 1024  # micro-step의 토큰이 이보다 적으면 행렬 곱이 GPU를 채우지 못한다
MOST_TOKENS = 4096  # 이보다 많으면 메모리만 늘고 거의 빨라지지 않는다
LOSS_CHUNK = 512  # 손실을 한 번에 계산하는 토큰 수
RANK_UNIT = 8
LARGE, SEGMENT = 10 << 20, 2 << 20  # 할당기는 10 MiB부터 2 MiB의 배수로 잡는다


@dataclass(frozen=True)
class MemoryPlan:
    """어떻게 학습할지와 그때의 예측.

    Attributes:
        micro_batch_size: 한 번에 계산하는 블록의 수.
        recompute_layers: backward에서 다시 계산할 층의 수.
        parts: 이름 -> 예측한 바이트. 비어 있으면 VRAM을 쓰지 않는다.
        budget: 쓸 수 있는 바이트(CUDA context 포함).
    """

    micro_batch_size: int
    recompute_layers: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    budget: float = 0.0

    @property
    def reserved(self) -> float:
        """torch의 할당기가 잡을 최댓값(바이트)의 예측."""
        return sum(size for name, size in self.parts.items() if name != "CUDA context")

    def lines(self) -> list[str]:
        """사람이 읽는 계획."""
        if not self.parts:
            return []
        listed = ", ".join(f"{name} {size / GB:.2f}" for name, size in self.parts.items())
        how = f"재계산 {self.recompute_layers}층" if self.recompute_layers else "재계산 없음"
        return [f"VRAM 예측: {sum(self.parts.values()) / GB:.2f} GB({listed}). 쓸 수 있는 양 {self.budget / GB:.2f} GB",
                f"  micro batch {self.micro_batch_size}블록, {how}"]

    def outcome(self, peak: float) -> str:
        """실제로 할당기가 잡은 최댓값 `peak`(바이트)을 예측과 견주는 한 줄."""
        return (f"VRAM: 할당기가 가장 많이 잡은 것 {peak / GB:.2f} GB(예측 {self.reserved / GB:.2f} GB, "
                f"{self.reserved / peak - 1:+.1%})")


def make_plan(config: dict, *, device, cutoff_len: int, batch_size: int, micro_batch_size: int | None, lora_r: int,
              targets: tuple[str, ...], vram_gb: float | None, max_documents: int) -> MemoryPlan:
    """카드에 들어가는 계획을 고른다.

    micro-step이 1,024토큰을 넘는 가장 작은 micro batch를, 되도록 재계산 없이 쓴다. 그보다 크면 메모리는 토큰에
    비례해 늘고 빨라지는 것은 조금이다. 모자라면 재계산하는 층을 필요한 만큼만 늘리고, 그다음에 micro batch를
    줄인다. `vram_gb`를 적으면 그 안에서 재계산 없이 들어가는 가장 큰 micro batch(4,096토큰까지)를 쓴다.

    Args:
        device: `loader.Device`.
        vram_gb: 쓸 VRAM의 상한(CUDA context 포함). None이면 지금 비어 있는 양에서 여유를 뺀다.
        max_documents: 블록 하나에 든 문서의 최대 수.

    Raises:
        UsageError: 어떻게 해도 들어가지 않는다. 들어가는 블록 길이나 모델을 말한다.
    """
    if device.device.type != "cuda":
        return MemoryPlan(micro_batch_size or 1)
    free, total = torch.cuda.mem_get_info(device.device)
    budget = min(free + CONTEXT - MARGIN, total) if vram_gb is None else vram_gb * GB
    return fit(config, budget, cutoff_len, batch_size, micro_batch_size, lora_r, targets, max_documents,
               grow=vram_gb is not None)


def cap_allocator(plan: MemoryPlan, device: torch.device, vram_gb: float | None) -> None:
    """torch의 할당기가 계획의 예산을 넘지 못하게 막는다. 상한을 적었거나 Windows일 때만이다.

    Windows의 드라이버는 모자라는 VRAM을 말없이 RAM으로 메워 열 배 느려진다. 막아 두면 메모리 부족으로 드러난다.
    """
    if device.type == "cuda" and (vram_gb is not None or sys.platform == "win32"):
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min((plan.budget - CONTEXT) / total, 1.0))


def fit(config: dict, budget: float, cutoff_len: int, batch_size: int, micro_batch_size: int | None, lora_r: int,
        targets: tuple[str, ...], max_documents: int, grow: bool = False) -> MemoryPlan:
    """`budget` 바이트에 들어가는 계획. 규칙은 `make_plan`과 같고, `grow`는 상한을 직접 적었다는 뜻이다."""
    layers = config["num_hidden_layers"]
    fused = config["model_type"] == "gpt_neox" and tuple(targets) == ("query_key_value",)

    def attempt(micro: int, recompute: int, block: int = cutoff_len) -> MemoryPlan:
        parts = predict(config, block, micro, recompute, lora_r, max(2, max_documents), fused)
        return MemoryPlan(micro, recompute, parts, budget)

    def fits(plan: MemoryPlan) -> bool:
        return plan.reserved * SAFETY + CONTEXT <= budget

    divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    enough = next((size for size in divisors if size * cutoff_len >= TARGET_TOKENS), batch_size)
    micros = [micro_batch_size] if micro_batch_size else [size for size in reversed(divisors) if size <= enough]
    if grow and not micro_batch_size:
        larger = (size for size in reversed(divisors) if enough < size and size * cutoff_len <= MOST_TOKENS)
        micros = [*(size for size in larger if fits(attempt(size, 0))), *micros]
    most = layers - 1 if fused else layers
    steps = range(most + 1) if fused else (0, layers)
    for micro in micros:
        if fits(attempt(micro, most)):
            return next(plan for plan in (attempt(micro, count) for count in steps) if fits(plan))
    least = attempt(1, most)
    shorter = next((block for block in (1024, 512, 256, 128) if block < cutoff_len and fits(attempt(1, most, block))),
                   None)
    advice = f"--cutoff_len {shorter}로 줄이면 들어간다" if shorter else "더 작은 모델을 쓴다"
    if micro_batch_size and micro_batch_size > 1 and fits(least):
        advice = "--micro_batch_size를 빼면 들어간다"
    raise UsageError(f"이 모델과 {cutoff_len}토큰 블록은 적어도 {sum(least.parts.values()) / GB:.1f} GB가 필요한데 "
                     f"쓸 수 있는 VRAM은 {budget / GB:.1f} GB다. {advice}")


def predict(config: dict, block: int, micro: int, recompute: int, rank: int, max_documents: int,
            fused: bool = True) -> dict[str, float]:
    """부분마다의 바이트. 가중치는 NF4 이중 양자화, 나머지는 16비트다."""
    layers, hidden, vocab = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
    inner = config.get("intermediate_size") or 4 * hidden
    heads, tokens, padded = config.get("num_attention_heads") or 1, block * micro, -(-rank // RANK_UNIT) * RANK_UNIT
    matrices = [3 * hidden * hidden, hidden * hidden, inner * hidden, inner * hidden]
    if not fused and config["model_type"] != "gpt_neox":
        matrices[2] *= 2  # 문이 달린 MLP는 행렬이 셋이다
    quantized = sum(_segments(count / 2) + count * (1 / 64 + 4 / 64 / 256) for count in matrices)
    table = 2 * vocab * hidden
    small = layers * 2 * (9 * hidden + inner + hidden * 4)
    one_table = config.get("tie_word_embeddings", False) or fused  # fused는 입력 embedding을 CPU 메모리에 둔다
    adapter = layers * rank * 4 * hidden * 4
    parts = {"가중치": layers * quantized + small + table * (1 if one_table else 2),
             "어댑터와 optimizer": 5 * adapter}
    if fused:
        kept = layers - min(recompute, layers - 1)
        act = 2 * tokens * (3 * hidden + inner + padded)
        attended = tokens * (2 * hidden + 4 * heads)
        parts["저장하는 활성값"] = 2 * (layers + 1) * tokens * hidden + (kept - 1) * (act + attended)
        scratch = 2 * max(inner * hidden, 3 * hidden * (hidden + padded), min(LOSS_CHUNK, tokens) * vocab)
        flash = 4 * (tokens + 128 * max_documents * micro) * hidden + 2 * 3 * tokens * hidden
        work = act + attended + 2 * tokens * (3 * hidden + padded + max(inner, 3 * hidden)) + scratch
        parts["작업 공간"] = work + flash
    else:
        per_layer = 2 * tokens * (10 * hidden + 4 * inner)
        parts["저장하는 활성값"] = 2 * layers * tokens * hidden if recompute else layers * per_layer
        parts["작업 공간"] = per_layer + 2 * max(matrices) + 2 * micro * block * block
    parts["손실"] = 4 * tokens * hidden + (0 if fused else 8 * min(LOSS_CHUNK, tokens) * vocab)
    parts["작업 공간"] += FRAGMENTS * sum(parts.values()) + WORKSPACE
    parts["CUDA context"] = CONTEXT
    return parts


def _segments(size: float) -> float:
    """할당기가 큰 덩어리를 2 MiB의 배수로 잡는 것을 셈한 크기."""
    return -(-size // SEGMENT) * SEGMENT if size >= LARGE else size
