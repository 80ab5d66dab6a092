"""모델을 올리기 전에 config.json만으로 VRAM을 예측하고, 카드에 들어가는 학습 방식을 고른다."""

import sys
from dataclasses import dataclass, field, replace

import torch

from utils.engine.families import describe
from utils.engine.family import Family
from utils.engine.train_memory import (
    TILE_ROWS,
    Tails,
    attention_bytes,
    kept_widths,
    saved_widths,
    scratch_elements,
    work_widths,
)
from utils.errors import UsageError

GB = 1e9
MARGIN = 0.3 * GB  # 다른 프로그램이 조금 늘어나도 견디는 여유
CONTEXT = 0.55 * GB  # CUDA context와 라이브러리가 할당기 밖에서 차지하는 양
WORKSPACE = 32 << 20  # cuBLAS의 작업 공간. 계산하는 stream 하나에만 있다
FRAGMENTS = 0.02  # 할당기가 쪼개져 쓰지 못하고 남기는 비율
SPARE = 20 << 20  # 할당기는 10 MiB보다 작은 것들을 20 MiB의 덩어리에 담는다. 모두 합쳐 그 하나쯤이 비어 있다
SAFETY = 1.03  # 예측이 이만큼 모자라도 예산을 넘지 않게 한다
TARGET_TOKENS = 1024  # micro-step의 토큰이 이보다 적으면 행렬 곱이 GPU를 채우지 못한다
MOST_TOKENS = 4096  # 이보다 많으면 메모리만 늘고 거의 빨라지지 않는다
LOSS_CHUNK = 512  # 손실을 한 번에 계산하는 토큰 수
EXACT_TOKENS = 512  # 문서가 이보다 길지 않으면 언제나 비트까지 같게 배운다. 1.3b가 많아야 7% 느려진다(1,024토큰은 30%)
LARGE, SEGMENT = 10 << 20, 2 << 20  # 할당기는 10 MiB부터 2 MiB의 배수로 잡는다


@dataclass(frozen=True)
class Workload:
    """배울 것 가운데 VRAM을 정하는 것.

    Attributes:
        config: 기반 모델의 config.json.
        targets: LoRA를 붙일 층의 이름.
        rank: LoRA의 r.
        block: 블록의 길이(토큰).
        max_documents: 블록 하나에 든 문서의 최대 수.
        processors: 비트까지 같은 attention을 쓰면 GPU의 SM 수. 아니면 0이다.
    """

    config: dict
    targets: tuple[str, ...]
    rank: int
    block: int
    max_documents: int
    processors: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """어떻게 학습할지와 그때의 예측.

    Attributes:
        micro_batch_size: 한 번에 계산하는 블록의 수.
        recompute_layers: backward에서 다시 계산할 층의 수.
        parts: 이름 -> 예측한 바이트. 비어 있으면 VRAM을 쓰지 않는다.
        budget: 쓸 수 있는 바이트(CUDA context 포함).
        exact: GPU에서 두 번 배워도 비트까지 같은 계산을 쓴다.
    """

    micro_batch_size: int
    recompute_layers: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    budget: float = 0.0
    exact: bool = False

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
        """실제로 할당기가 잡은 최댓값 `peak`(바이트)을 예측과 비교하는 한 줄."""
        return (f"VRAM: 할당기가 가장 많이 잡은 것 {peak / GB:.2f} GB(예측 {self.reserved / GB:.2f} GB, "
                f"{self.reserved / peak - 1:+.1%})")


def make_plan(work: Workload, device: torch.device, batch_size: int, micro_batch_size: int | None,
              vram_gb: float | None, exact: bool) -> MemoryPlan:
    """카드에 들어가는 계획을 고른다.

    micro-step이 1,024토큰을 넘는 가장 작은 micro batch를, 되도록 재계산 없이 쓴다. 그보다 크면 메모리는 토큰에
    비례해 늘고 빨라지는 것은 조금이다. 모자라면 재계산하는 층을 필요한 만큼만 늘리고, 그다음에 micro batch를
    줄인다. `vram_gb`를 적으면 그 안에서 재계산 없이 들어가는 가장 큰 micro batch(4,096토큰까지)를 쓴다.

    Args:
        batch_size: 프로세스 하나가 optimizer step마다 배울 블록의 수.
        micro_batch_size: 적으면 그대로 쓴다.
        vram_gb: 쓸 VRAM의 상한(CUDA context 포함). None이면 지금 비어 있는 양에서 여유를 뺀다.
        exact: 두 번 배워도 비트까지 같게 한다. attention의 backward가 메모리를 더 쓴다.

    Raises:
        UsageError: 어떻게 해도 들어가지 않는다. 들어가는 블록 길이나 모델을 말한다.
    """
    if device.type != "cuda":
        return MemoryPlan(micro_batch_size or 1)
    free, total = torch.cuda.mem_get_info(device)
    budget = min(free + CONTEXT - MARGIN, total) if vram_gb is None else vram_gb * GB
    if exact:
        work = replace(work, processors=torch.cuda.get_device_properties(device).multi_processor_count)
    plan = fit(work, budget, batch_size, micro_batch_size, grow=vram_gb is not None)
    return replace(plan, exact=exact)


def cap_allocator(plan: MemoryPlan, device: torch.device, vram_gb: float | None) -> None:
    """torch의 할당기가 계획의 예산을 넘지 못하게 막는다. 상한을 적었거나 Windows일 때만이다.

    Windows의 드라이버는 모자라는 VRAM을 말없이 RAM으로 메워 열 배 느려진다. 막아 두면 메모리 부족으로 드러난다.
    """
    if device.type == "cuda" and (vram_gb is not None or sys.platform == "win32"):
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min((plan.budget - CONTEXT) / total, 1.0))


def fit(work: Workload, budget: float, batch_size: int, micro_batch_size: int | None = None,
        grow: bool = False) -> MemoryPlan:
    """`budget` 바이트에 들어가는 계획. 규칙은 `make_plan`과 같고, `grow`는 상한을 직접 적었다는 뜻이다."""
    layers = work.config["num_hidden_layers"]
    fast = find_family(work.config, work.targets) is not None

    def attempt(micro: int, recompute: int, block: int = work.block) -> MemoryPlan:
        return MemoryPlan(micro, recompute, predict(replace(work, block=block), micro, recompute), budget)

    def fits(plan: MemoryPlan) -> bool:
        return plan.reserved * SAFETY + CONTEXT <= budget

    # effective batch는 batch_size 그대로여야 하므로 그 약수만 micro batch가 될 수 있다
    divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    enough = next((size for size in divisors if size * work.block >= TARGET_TOKENS), batch_size)
    smaller = [size for size in reversed(divisors) if size <= enough]  # 큰 것부터 들어가는지 본다
    micros = [micro_batch_size] if micro_batch_size else smaller
    if grow and not micro_batch_size:
        larger = [size for size in reversed(divisors) if enough < size and size * work.block <= MOST_TOKENS]
        micros = [*(size for size in larger if fits(attempt(size, 0))), *micros]
    # 손으로 쓴 길은 마지막 층의 중간값을 곧바로 backward에서 쓰므로 그 층은 재계산하지 않고, 몇 층을 재계산할지 고를 수
    # 있다. 자동미분의 길은 모두 재계산하거나 하나도 하지 않는다
    most = layers - 1 if fast else layers
    counts = range(most + 1) if fast else (0, layers)
    for micro in micros:
        if fits(attempt(micro, most)):  # 가장 아끼는 법으로도 넘치면 micro batch를 줄이는 수밖에 없다
            attempts = (attempt(micro, count) for count in counts)
            return next(plan for plan in attempts if fits(plan))
    least = attempt(1, most)
    shorter_blocks = [block for block in (1024, 512, 256, 128) if block < work.block]
    shorter = next((block for block in shorter_blocks if fits(attempt(1, most, block))), None)
    advice = f"--cutoff_len {shorter}로 줄이면 들어간다" if shorter else "더 작은 모델을 쓴다"
    if micro_batch_size and micro_batch_size > 1 and fits(least):
        advice = "--micro_batch_size를 빼면 들어간다"
    raise UsageError(f"이 모델과 {work.block}토큰 블록은 적어도 {sum(least.parts.values()) / GB:.1f} GB가 필요한데 "
                     f"쓸 수 있는 VRAM은 {budget / GB:.1f} GB다. {advice}")


def find_family(config: dict, targets: tuple[str, ...]) -> Family | None:
    """손으로 쓴 학습 길로 갈 구조. 자동미분으로 갈 것이면 None이다. 학습기와 같은 규칙(`describe`)에 묻는다."""
    family = describe(config, training=True)
    return family if isinstance(family, Family) and set(targets) <= set(family.linears()) else None


def predict(work: Workload, micro: int, recompute: int) -> dict[str, float]:
    """부분마다의 바이트. 가중치는 NF4 이중 양자화, 나머지는 16비트다.

    Args:
        micro: 한 번에 계산하는 블록의 수.
        recompute: backward에서 다시 계산하는 층의 수.
    """
    family = find_family(work.config, work.targets)
    if family is None:
        parts = _predict_autograd(work, micro, recompute)
    else:
        parts = _predict_engine(family, work, micro, recompute)
    parts["작업 공간"] += FRAGMENTS * sum(parts.values()) + WORKSPACE + SPARE
    parts["CUDA context"] = CONTEXT
    return parts


def _predict_engine(family: Family, work: Workload, micro: int, recompute: int) -> dict[str, float]:
    """손으로 쓴 길. 버퍼의 크기는 엔진이 실제로 잡을 때 쓰는 `train_memory`에서 온다."""
    layers, rank, tokens = family.layers, work.rank, work.block * micro
    tails = Tails.of(family, work.targets, rank)
    recompute = min(recompute, layers - 1)
    linears = family.linears()
    trained_linears = {name: shape for name, shape in linears.items() if name in work.targets}
    quantized = sum(_nf4_bytes(shape.rows * shape.columns) for shape in linears.values())
    # 층의 작은 것: norm의 weight와 bias(16비트와 엔진이 읽는 fp32 사본, 여섯 개까지)와 선형층의 bias(16비트)
    small = 6 * 6 * family.hidden + 2 * (family.qkv_width + family.mlp_width + 2 * family.hidden)
    # 출력 행렬 하나만 GPU에 있다. 입력 embedding은 그것과 한 tensor이거나 CPU 메모리로 옮긴다
    table = _segments(2 * family.vocab * family.hidden)
    # 층마다의 A [r, columns]와 B [rows, r]
    trained = layers * sum(rank * (shape.columns + shape.rows) for shape in trained_linears.values())
    # 아래의 2는 모두 16비트 값 하나의 바이트다
    kept = 2 * tokens * (layers * sum(kept_widths(family, tails).values()) + family.hidden)  # 마지막 층의 출력까지
    saved = 2 * tokens * sum(saved_widths(family, tails).values())
    # 재계산하는 층과 마지막 층은 한 벌을 함께 쓴다. attention의 출력은 마지막 층까지 저마다 살아 있다
    alone = max(layers - recompute - 1, 0)
    stored = kept + alone * saved + (layers - recompute) * tokens * attention_bytes(family)
    buffers = saved + 2 * tokens * sum(work_widths(family, tails).values())
    scratch = 2 * scratch_elements(family, tails, tokens, recompute)
    # dA [r, columns]는 토큰 TILE_ROWS개마다 따로 더한 fp32 부분합 [조각의 수, r, columns]을 거친다. 선형층 하나씩이다
    widest = max((shape.columns for shape in trained_linears.values()), default=0)
    tiles = -(-tokens // TILE_ROWS)  # 올림
    partial = 4 * tiles * rank * widest
    return {
        "가중치": layers * (quantized + small) + table,
        # fp32 네 벌: 값, gradient, Adam의 평균 둘
        "어댑터와 optimizer": 4 * 4 * trained,
        "저장하는 활성값": stored,
        "작업 공간": buffers + scratch + partial + _flash_backward(family, work, micro),
    }


def _flash_backward(family: Family, work: Workload, micro: int) -> float:
    """flash attention의 backward가 잠시 쓰는 바이트.

    fp32 dq의 합(문서마다 128행까지, 머리를 32의 배수까지 채운다. 비트까지 같게 하면 SM을 채울 만큼 여러 벌이다), 이어
    놓은 dout, 16비트 dq, q의 머리 수만큼 늘린 dk와 dv, 그것을 더한 kv_heads의 dk와 dv.
    """
    tokens, documents = work.block * micro, max(2, work.max_documents) * micro
    head_dim = -(-family.head_dim // 32) * 32
    copies = max(1, -(-work.processors // (documents * family.heads)))
    # fp32, 문서마다 끝을 128행까지 채운다
    accumulated = copies * 4 * (tokens + 128 * documents) * family.heads * head_dim
    wide = 4 * family.q_width  # dout, dq, 늘린 dk, 늘린 dv
    grouped = family.heads != family.kv_heads
    narrow = 2 * family.kv_heads * family.head_dim if grouped else 0  # 더한 dk와 dv
    return accumulated + 2 * tokens * (wide + narrow)


def _predict_autograd(work: Workload, micro: int, recompute: int) -> dict[str, float]:
    """자동미분의 길. 구조를 모르므로 흔한 transformer 한 층이 남기는 것으로 어림한다."""
    config, targets = work.config, len(work.targets)
    layers, hidden, vocab = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
    inner, tokens = config.get("intermediate_size") or 4 * hidden, work.block * micro
    gated = config["model_type"] != "gpt_neox"
    # 층의 행렬들의 원소 수: qkv를 이은 것, attention의 출력, MLP의 gate와 up과 down(문이 없으면 둘)
    matrices = [3 * hidden * hidden, hidden * hidden, *[inner * hidden] * (3 if gated else 2)]
    tables = 1 if config.get("tie_word_embeddings", False) else 2  # 입력 embedding과 출력 행렬
    # 한 층이 남기는 토큰당 16비트 값: 잔차와 norm 6, q, k, v, attention의 출력 4 x hidden, MLP 안쪽의 네 단계 x inner.
    # LoRA의 입력마다 dropout한 fp32 사본이 하나씩 더 남는다
    per_layer = 2 * tokens * (10 * hidden + 4 * inner + 2 * targets * hidden)
    stored = 2 * layers * tokens * hidden if recompute else layers * per_layer  # 재계산하면 층의 입력만 남는다
    # 16비트로 남는 벡터는 얼마 되지 않아 GPT-NeoX의 것으로 어림한다: norm 둘의 weight와 bias 4 x hidden,
    # 선형층의 bias 9 x hidden(qkv 3, 출력 1, MLP 4와 1)
    layer_weights = sum(_nf4_bytes(count) for count in matrices) + 2 * (4 + 9) * hidden
    return {
        "가중치": layers * layer_weights + 2 * vocab * hidden * tables,
        # 층마다 targets개의 A [r, hidden]와 B [hidden, r], 그 값의 fp32 다섯 벌(위와 같다)
        "어댑터와 optimizer": 5 * 4 * layers * targets * work.rank * 2 * hidden,
        "저장하는 활성값": stored,
        # 재계산하거나 되돌아가는 층 하나, 푼 가중치 하나, 블록마다의 mask
        "작업 공간": per_layer + 2 * max(matrices) + 2 * micro * work.block * work.block,
        # 은닉값과 그 gradient, logits 조각의 fp32 둘
        "손실": 4 * tokens * hidden + 8 * min(LOSS_CHUNK, tokens) * vocab,
    }


def _nf4_bytes(count: int) -> float:
    """값 count개의 NF4: 4비트 값, 64개마다 8비트 absmax, absmax 256개마다 fp32 하나."""
    codes = _segments(count / 2)
    absmax = count / 64
    return codes + absmax + 4 * absmax / 256


def _segments(size: float) -> float:
    """할당기가 큰 덩어리를 2 MiB의 배수로 잡는 것을 셈한 크기."""
    return -(-size // SEGMENT) * SEGMENT if size >= LARGE else size
