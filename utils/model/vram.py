"""카드의 메모리: 더 쓸 수 있는 양과 할당기의 상한."""

import sys

import torch

# Windows의 드라이버는 모자라는 VRAM을 말없이 RAM으로 메워 열 배 느려진다. 할당기를 막아 두면 메모리 부족으로 드러난다
SPILLS = sys.platform == "win32"


def cap(device: torch.device, n_bytes: float) -> None:
    """torch의 할당기가 `n_bytes`보다 많이 잡지 못하게 한다."""
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(n_bytes / total, 1.0)), device)


def left(device: torch.device) -> float:
    """할당기가 더 내줄 수 있는 바이트: 카드에 빈 것과 할당기가 쥐고만 있는 것. 상한을 두었으면 그 안에서다."""
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - used
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return max(0.0, min(free + unused, limit - used))
