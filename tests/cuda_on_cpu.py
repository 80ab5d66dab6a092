"""CUDA 커널을 GPU 없이 CPU에서 돌린다: 같은 소스를 g++로 컴파일하고, 스레드를 fiber로 흉내 낸다.

정확도를 확인할 때만 쓴다. 느리므로 아주 작은 모델에서 쓴다.
"""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

from utils.engine.cuda import _argument
from utils.engine.decode_plan import SOURCES

KERNELS = Path(__file__).resolve().parents[1] / "utils" / "engine" / "kernels"
AVAILABLE = shutil.which("g++") is not None and platform.machine() == "x86_64" and platform.system() == "Linux"


def load_kernels(names: list[str], defines: dict, folder: Path, sources: tuple[str, ...] = SOURCES) -> dict:
    """커널 소스를 `folder`에 컴파일해서 이름별로 부를 수 있는 것을 준다. `Kernel`과 부르는 법이 같다."""
    source = [f"#define {name} {value}" for name, value in defines.items()]
    source.append(Path(__file__).with_name("cuda_on_cpu.h").read_text(encoding="utf-8"))
    source += [(KERNELS / name).read_text(encoding="utf-8") for name in sources if name != "device.cuh"]
    source += [f'extern "C" void run_{name}(const u32* sizes, void** arguments) {{ launch({name}, sizes, arguments); }}'
               for name in names]
    file = folder / "kernels.cpp"
    file.write_text("\n".join(source).replace("extern __shared__ char shared[];", ""), encoding="utf-8")
    library = folder / "kernels.so"
    # -Og는 -O1만큼 빠르게 돌면서 컴파일이 40% 짧다
    flags = ["-std=c++17", "-Og", "-w", "-fpermissive", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *flags, "-o", library, file], check=True, capture_output=True, text=True)
    loaded = ctypes.CDLL(str(library))
    return {name: _runner(getattr(loaded, f"run_{name}")) for name in names}


def _runner(function):
    def run(grid, block, *args, shared: int = 0, overlap: bool = False) -> None:
        values = [_argument(argument) for argument in args]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        sizes = (ctypes.c_uint * 5)(*(*grid, 1, 1)[:3], block[0], shared)
        function(sizes, pointers)

    return run
