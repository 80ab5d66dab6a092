"""이 컴퓨터와 환경의 사실을 모은다. 좋고 나쁨의 판단은 `checks`의 몫이다."""

import os
import socket
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from utils.environment import Quick, ask_nvidia_smi, look_quick
from utils.errors import UsageError, first_line
from utils.model.folder import open_model_folder
from utils.paths import BASE_DEMO, ROOT

PAGE_PORT = 7860
REAL_BASE = ROOT / "resources" / "polyglot-ko-1.3b"
MAX_NF4_ERROR = 0.25  # 정상이면 0.1쯤이다


@dataclass(frozen=True)
class Full(Quick):
    """torch를 불러오고 계산까지 해 보아야 아는 사실. 못 한 것은 빈 값이고, 실패한 이유는 글자로 담는다."""

    torch_error: str = ""
    gpu: str = ""
    capability: tuple[int, int] | None = None
    free_vram_gb: float = 0.0
    total_vram_gb: float = 0.0
    attention: tuple[str, ...] = ()
    matmul_4bit_error: str = ""
    free_ram_gb: float = 0.0
    swap_gb: float = 0.0
    paths: tuple[str, ...] = ()
    encoding: str = "utf-8"
    code_page: int | None = None
    proxy: str = ""
    port_taken: bool = False
    demo_error: str = ""
    base_error: str | None = None


def look_full() -> Full:
    """모두 본다. 4비트 행렬 곱을 실제로 앞뒤로 계산한다."""
    import psutil

    quick = look_quick()
    facts = {**vars(quick), "nvidia": quick.nvidia or ask_nvidia_smi()}
    return Full(
        **facts, **_look_torch(),
        free_ram_gb=psutil.virtual_memory().available / 1e9, swap_gb=psutil.swap_memory().total / 1e9,
        paths=(str(ROOT), str(Path.home()), tempfile.gettempdir()),
        encoding=(sys.stdout.encoding or "").lower(), code_page=_code_page(), proxy=proxy_for_localhost(),
        port_taken=_is_taken(PAGE_PORT), demo_error=folder_error(BASE_DEMO),
        base_error=folder_error(REAL_BASE) if REAL_BASE.is_dir() else None)


def folder_error(folder: Path) -> str:
    """모델 폴더의 잘못. 온전하면 빈 글자다."""
    try:
        open_model_folder(folder)
    except UsageError as error:
        return str(error)
    return ""


def proxy_for_localhost() -> str:
    """127.0.0.1로 가는 요청이 거치는 프록시. 거치지 않으면 빈 글자다."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get("http") or proxies.get("all") or ""
    return "" if urllib.request.proxy_bypass("127.0.0.1") else proxy


def multiply_4bit(device: str, dtype) -> str:
    """NF4 선형층을 앞뒤로 실제로 계산해, 줄이기 전의 가중치로 계산한 답과 비교한다. 맞으면 빈 글자, 아니면 이유다."""
    import bitsandbytes as bnb
    import torch

    try:
        layer = bnb.nn.Linear4bit(256, 256, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
        layer.support_avx512bf16_for_cpu = False
        weight = layer.weight.data.to(device, dtype)
        layer = layer.to(device)
        inputs = torch.randn(8, 256, device=device, dtype=dtype, requires_grad=True)
        outputs = layer(inputs)
        outputs.sum().backward()
        forward = outputs.detach(), inputs.detach() @ weight.T
        backward = inputs.grad, weight.sum(0).expand_as(inputs)
        error = max(float((got - wanted).norm() / wanted.norm()) for got, wanted in (forward, backward))
        return "" if error < MAX_NF4_ERROR else f"답이 {error:.0%} 어긋난다"
    except Exception as error:  # 드라이버, 라이브러리, 메모리의 어떤 잘못이든 그대로 보여 준다
        return f"{type(error).__name__}: {first_line(error)}"


def _look_torch() -> dict:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"torch_error": f"{type(error).__name__}: {first_line(error)}"}
    if not torch.cuda.is_available():
        return {"matmul_4bit_error": multiply_4bit("cpu", torch.float32), "attention": ("math",)}
    capability = torch.cuda.get_device_capability()
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    free, total = torch.cuda.mem_get_info()
    return {"gpu": torch.cuda.get_device_name(), "capability": capability, "free_vram_gb": free / 1e9,
            "total_vram_gb": total / 1e9, "attention": _working_attention(dtype),
            "matmul_4bit_error": multiply_4bit("cuda", dtype)}


def _working_attention(dtype) -> tuple[str, ...]:
    """이 카드에서 실제로 도는 attention 구현들, 빠른 것부터."""
    import warnings

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.randn(1, 2, 64, 64, device="cuda", dtype=dtype)
    working = []
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with warnings.catch_warnings(), sdpa_kernel([getattr(SDPBackend, name)]):
                warnings.simplefilter("ignore")
                torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
            working.append(name.removesuffix("_ATTENTION").lower())
        except RuntimeError:
            continue
    return tuple(working)


def _code_page() -> int | None:
    if sys.platform != "win32":
        return None
    import ctypes

    return ctypes.windll.kernel32.GetConsoleOutputCP()


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
