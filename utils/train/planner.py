"""모델을 올리기 전에 고르는, 카드에 들어가는 학습 방식. 가장 빠른 것부터 예측(`prediction`)해 본다."""

from dataclasses import dataclass, field, replace

import torch

from utils.errors import UsageError
from utils.model import vram
from utils.train.prediction import Workload, find_family, predict

GB = 1e9
MARGIN = 0.2 * GB  # 다른 프로그램이 조금 늘어나거나, 찍은 graph와 커널이 할당기 밖에서 더 써도 견디는 여유
SAFETY = 1.03  # 예측이 이만큼 모자라도 예산을 넘지 않게 한다
TARGET_TOKENS = 1024  # micro-step의 토큰이 이보다 적으면 행렬 곱이 GPU를 채우지 못한다
MOST_TOKENS = 4096  # 이보다 많으면 메모리만 늘고 거의 빨라지지 않는다
EXACT_TOKENS = 512  # 문서가 이보다 길지 않으면 언제나 비트까지 같게 배운다. 1.3b가 많아야 7% 느려진다(1,024토큰은 18%)


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
        vram_gb: 쓸 VRAM의 상한(CUDA context 포함). 지금 비어 있는 양보다 크면 비어 있는 양이고, None이면 거기서 여유를
            뺀다.
        exact: 두 번 배워도 비트까지 같게 한다. attention의 backward가 메모리를 더 쓴다.

    Raises:
        UsageError: 어떻게 해도 들어가지 않는다. 들어가는 블록 길이나 모델을 말한다.
    """
    if device.type != "cuda":
        return MemoryPlan(micro_batch_size or 1)
    free, total = torch.cuda.mem_get_info(device)
    # 이미 잡혀 있어 `free`에 들지 않는 것: CUDA context와 라이브러리, 할당기가 쥔 cuBLAS의 작업 공간
    room = free + work.outside + torch.cuda.memory_reserved(device)
    budget = min(room - MARGIN if vram_gb is None else min(vram_gb * GB, room), total)
    if exact:
        work = replace(work, processors=torch.cuda.get_device_properties(device).multi_processor_count)
    plan = fit(work, budget, batch_size, micro_batch_size, grow=vram_gb is not None)
    return replace(plan, exact=exact)


def cap_allocator(plan: MemoryPlan, device: torch.device) -> None:
    """torch의 할당기가 계획의 예산을 넘지 못하게 막는다. 나머지는 할당기를 거치지 않는 라이브러리의 것이다."""
    if device.type == "cuda":
        vram.cap(device, plan.budget - plan.parts["CUDA context"])


def fit(work: Workload, budget: float, batch_size: int, micro_batch_size: int | None = None,
        grow: bool = False) -> MemoryPlan:
    """`budget` 바이트에 들어가는 계획. 규칙은 `make_plan`과 같고, `grow`는 상한을 직접 적었다는 뜻이다."""
    layers = work.config["num_hidden_layers"]
    fast = find_family(work.config, work.targets) is not None

    def attempt(micro: int, recompute: int, block: int = work.block) -> MemoryPlan:
        return MemoryPlan(micro, recompute, predict(replace(work, block=block), micro, recompute), budget)

    def fits(plan: MemoryPlan) -> bool:
        return plan.reserved * SAFETY + work.outside <= budget

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
    raise UsageError(f"이 모델과 {work.block}토큰 블록에는 적어도 {sum(least.parts.values()) / GB:.1f} GB가 필요한데 "
                     f"쓸 수 있는 VRAM은 {budget / GB:.1f} GB다. {advice}")
