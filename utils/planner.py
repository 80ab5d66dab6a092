"""메모리를 계획한다."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPlan:
    micro_batch_size: int

    def lines(self) -> list[str]:
        return []


def make_plan(config: dict, *, device, cutoff_len: int, batch_size: int, micro_batch_size: int | None, lora_r: int,
              targets: tuple[str, ...], vram_gb: float | None, max_documents: int) -> MemoryPlan:
    return MemoryPlan(micro_batch_size or 1)
