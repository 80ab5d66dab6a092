"""CUDA C++ 소스를 실행 중에 컴파일하고(NVRTC) 실행하는 얇은 층.

torch의 CUDA 휠에는 NVRTC가 들어 있어서 Triton, CUDA toolkit, C++ 컴파일러가 없어도 된다. 그래서 Windows에서도
같은 커널이 돈다. 소스는 헤더를 쓰지 않는다. 휠에는 CUDA 헤더가 들어 있지 않기 때문이다.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch

from utils.engine.kernel_cache import cache_folder, remembered


class CompileError(RuntimeError):
    """커널을 컴파일하거나 올리지 못했다. 부르는 쪽은 torch 연산으로 된 길로 물러난다."""


@cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    if sys.platform == "win32":
        folders, names = [Path(torch.__file__).parent / "lib"], [f"nvrtc64_{major}0_0.dll"]
    else:
        site = Path(torch.__file__).parents[1] / "nvidia"
        folders = [site / f"cu{major}" / "lib", site / "cuda_nvrtc" / "lib"]
        names = [f"libnvrtc.so.{major}", "libnvrtc.so"]
    candidates = [str(folder / name) for folder in folders for name in names if (folder / name).exists()] + names
    for candidate in candidates:
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise CompileError(f"NVRTC({names[0]})를 찾지 못했다")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_to_cubin(source: str, capability: tuple[int, int], defines: dict[str, int | float | str]) -> bytes:
    """CUDA C++ 소스를 주어진 세대의 기계어로 컴파일한다. GPU가 없어도 된다.

    Args:
        source: `extern "C" __global__` 함수들이 든 소스.
        capability: (8, 6)처럼 나타낸 compute capability.
        defines: 컴파일할 때 정하는 상수. 모델의 크기를 넣어 그 모델만을 위한 커널을 만든다.

    Raises:
        CompileError: NVRTC가 없거나 컴파일러가 소스를 거절했다.
    """
    library = _nvrtc()
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17", "--use_fast_math"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    program = ctypes.c_void_p()
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    code = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    if code:
        raise CompileError(f"NVRTC 프로그램을 만들지 못했다: {library.nvrtcGetErrorString(code).decode()}")
    try:
        if library.nvrtcCompileProgram(program, len(options), encoded):
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise CompileError(log.value.decode(errors="replace"))
        size = ctypes.c_size_t()
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        if size.value == 0 or library.nvrtcGetCUBIN(program, cubin):
            raise CompileError(f"sm_{capability[0]}{capability[1]}의 기계어를 얻지 못했다")
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


class _LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")] + [
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_LaunchAttribute)), ("count", ctypes.c_uint)]


_OVERLAP = _LaunchAttribute(id=6, value=(1,))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Kernel:
    """컴파일된 커널 하나. `kernel(grid, block, *args)`로 지금의 stream에서 실행한다.

    Tensor는 포인터로, None은 널 포인터로, int는 int32로, float는 float32로, ctypes의 구조체는 값으로 넘어간다.
    핀 고정된 CPU tensor도 넘길 수 있다(GPU가 PCIe로 직접 읽는다). CUDA graph로 캡처할 수 있다.
    """

    def __init__(self, function: ctypes.c_void_p, name: str):
        self._function = function
        self.name = name

    def allow_shared(self, size: int) -> None:
        """블록 하나가 48 KB보다 큰 동적 공유 메모리(바이트)를 쓸 수 있게 한다."""
        _check(_driver().cuFuncSetAttribute(self._function, 8, size), self.name)

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], *args, shared: int = 0,
                 overlap: bool = False) -> None:
        """overlap이면 앞 커널이 끝나기 전에 시작할 수 있다(programmatic dependent launch, compute capability 9.0부터).

        그런 커널은 앞 커널의 결과를 읽기 전에 `griddepcontrol.wait`를 불러야 한다.
        """
        values = [_argument(argument) for argument in args]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        gx, gy, gz = (*grid, 1, 1)[:3]
        bx, by, bz = (*block, 1, 1)[:3]
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()))
        if overlap:
            config = _LaunchConfig(gx, gy, gz, bx, by, bz, shared, stream, ctypes.pointer(_OVERLAP), 1)
            code = _driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None)
        else:
            code = _driver().cuLaunchKernel(self._function, gx, gy, gz, bx, by, bz, shared, stream, pointers, None)
        _check(code, self.name)


def load_kernels(source: str, names: list[str], defines: dict[str, int | float | str]) -> dict[str, Kernel]:
    """소스를 지금의 GPU에 맞게 컴파일해서 이름별 `Kernel`로 돌려준다.

    Raises:
        CompileError: 컴파일하거나 올리지 못했다.
    """
    torch.cuda.current_stream().synchronize()  # CUDA context가 만들어진 뒤에야 모듈을 올릴 수 있다
    capability = torch.cuda.get_device_capability()
    facts = source, capability, sorted(defines.items()), torch.version.cuda, _nvrtc_version()
    cubin = remembered(cache_folder(), facts, lambda: compile_to_cubin(source, capability, defines))
    module = ctypes.c_void_p()
    code = _driver().cuModuleLoadData(ctypes.byref(module), cubin)
    if code:
        raise CompileError(f"컴파일한 커널을 GPU에 올리지 못했다: {error_name(code)}")
    kernels = {}
    for name in names:
        function = ctypes.c_void_p()
        if _driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()):
            raise CompileError(f"소스에 없는 커널: {name}")
        kernels[name] = Kernel(function, name)
    return kernels


def _argument(value) -> ctypes._SimpleCData:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, ctypes.Structure):
        return value
    if isinstance(value, int):
        return ctypes.c_int(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    raise TypeError(f"커널에 넘길 수 없는 값: {type(value)}")


def error_name(code: int) -> str:
    """드라이버의 오류 번호를 `이름(설명)`으로. 드라이버가 모르는 번호면 번호 그대로다."""
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    if _driver().cuGetErrorName(code, ctypes.byref(name)):
        return f"CUDA 오류 {code}"
    _driver().cuGetErrorString(code, ctypes.byref(text))
    return f"{name.value.decode()}({text.value.decode()})"


def _check(code: int, name: str) -> None:
    if code:
        raise RuntimeError(f"커널 {name}: {error_name(code)}")
