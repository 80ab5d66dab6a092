"""카드의 메모리: 더 쓸 수 있는 양과 할당기의 상한."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from utils.errors import first_line, lacks_vram

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


@contextmanager
def shortage() -> Iterator[None]:
    """라이브러리가 제 말로 던진 VRAM의 부족(cuBLAS의 handle, 커널 올리기)도 `torch.OutOfMemoryError`로 올린다."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not lacks_vram(error):
            raise
        raise torch.OutOfMemoryError(first_line(error)) from error


def load_libraries(device: torch.device, dtype: torch.dtype) -> float:
    """cuBLAS와 attention을 한 번 불러 두고, 그것들이 할당기 밖에서 차지하는 바이트를 돌려준다.

    라이브러리는 처음 계산할 때에야 카드를 차지한다. 그때 할당기가 나머지를 다 쥐고 있으면 죽으므로, 남은 양을 재기 전에
    부른다. 자동미분은 제 thread에서 handle을 따로 만든다.
    """
    before = _outside(device)
    x = torch.ones(1, 1, 64, 128, device=device, dtype=dtype, requires_grad=True)
    with torch.enable_grad():
        (nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True) @ x.mT).float().sum().backward()
    del x
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()  # stream마다 하나인데 학습은 다른 stream에서 한다
    torch.cuda.empty_cache()
    return max(0.0, _outside(device) - before)


def _outside(device: torch.device) -> float:
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def gather(model: nn.Module) -> None:
    """얼어 있는 가중치를 큰 덩어리들로 옮겨, 양자화하기 전의 값이 지나간 틈을 카드에 돌려준다. 값은 그대로다.

    할당기는 10 MiB보다 작은 것을 20 MiB의 덩어리에 담고, 놓은 자리에 다음 것을 담는다. 그대로 두면 가중치 사이에
    틈이 남고 학습의 버퍼는 거기에 들어가지 못한다. Llama 2.1B의 학습이 3.89 GB에서 3.76 GB가 되었다.
    """
    packed = [parameter for parameter in model.parameters() if getattr(parameter, "quant_state", None) is not None]
    if not packed:
        return
    most = 4 * max(parameter.nbytes for parameter in packed)  # 4비트의 네 배, 곧 16비트의 크기. 틈은 이보다 크지 않다
    waiting: list[nn.Parameter] = []
    for parameter in packed:
        waiting.append(parameter)
        if sum(map(_room, waiting)) > most:
            _move_together(waiting)
            waiting = []
    _move_together(waiting)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _move_together(parameters: list[nn.Parameter]) -> None:
    """덩어리 하나로 옮긴다. 옮길 자리가 없으면 그대로 둔다."""
    if not parameters:
        return
    try:
        whole = torch.empty(sum(map(_room, parameters)), dtype=torch.uint8, device=parameters[0].device)
    except torch.OutOfMemoryError:
        return
    begin = 0
    for parameter in parameters:
        place = whole[begin:begin + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter.data)
        begin += _room(parameter)


def _room(parameter: nn.Parameter) -> int:
    """덩어리에서 차지하는 바이트. 다음 것이 512의 배수에서 시작한다."""
    return -(-parameter.nbytes // 512) * 512
