"""환경을 검사해, 찾은 것마다 한 줄과 고치는 법 한 줄을 말한다.

`python -m utils.doctor`는 모두 검사한다(60초 안). 세 스크립트는 시작할 때 빠른 검사만 한다(2초 안).
"""

from collections.abc import Callable

from utils.doctor.facts import PAGE_PORT, REAL_BASE, Full, look_full
from utils.environment import (
    BAD,
    MIN_MEMORY_GB,
    MIN_VRAM_GB,
    OK,
    QUICK_CHECKS,
    WARN,
    Finding,
    check_python,
    check_versions,
    install_cuda,
    look_quick,
    required_versions,
)
from utils.model.folder import download_command
from utils.paths import ROOT

OLDEST_DRIVER = {"13": 580, "12": 525}
SPILLING_DRIVER = 536


def check_torch_loads(facts: Full) -> Finding:
    if facts.torch_error:
        return Finding(BAD, f"torch를 불러오지 못했다: {facts.torch_error}",
                       f"python -m pip install --force-reinstall \"torch{required_versions()['torch']}\"")
    return Finding(OK, "torch를 불러왔다")


def check_driver(facts: Full) -> Finding:
    if not facts.nvidia:
        return Finding(OK, "NVIDIA 카드가 없어 CPU로 계산한다" if not facts.gpu else f"{facts.gpu}")
    name, _, driver = facts.nvidia.partition(",")
    needed = OLDEST_DRIVER.get((facts.torch_cuda or "").split(".")[0], 0)
    if _major(driver) < needed:
        return Finding(BAD, f"드라이버가 CUDA {facts.torch_cuda}에 낮다: {driver.strip()}",
                       f"NVIDIA 드라이버를 {needed} 이상으로 올린다(WSL은 Windows 쪽만 올린다)")
    if facts.torch_cuda and not facts.gpu:
        return Finding(BAD, f"카드가 있지만 torch가 쓰지 못한다: {name}",
                       "다시 켠 뒤에도 같으면 드라이버를 새로 설치한다. CUDA_VISIBLE_DEVICES가 비어 있는지도 본다")
    return Finding(OK, f"{name}, 드라이버 {driver.strip()}")


def check_bf16(facts: Full) -> Finding:
    if facts.capability is not None and facts.capability < (8, 0):
        return Finding(WARN, f"bf16 회로가 없는 카드라 fp16으로 학습한다: {facts.gpu}",
                       "loss가 nan이 되면 --learning_rate를 절반으로 줄인다")
    return Finding(OK, "bf16을 직접 계산한다" if facts.capability else "CPU에서는 fp32를 쓴다")


def check_attention(facts: Full) -> Finding:
    if facts.gpu and facts.attention in ((), ("math",)):
        return Finding(WARN, "빠른 attention이 돌지 않아 느리고 메모리를 더 쓴다", install_cuda())
    return Finding(OK, f"attention: {', '.join(facts.attention)}")


def check_4bit(facts: Full) -> Finding:
    if facts.matmul_4bit_error:
        return Finding(BAD, f"4비트 행렬 곱이 되지 않는다: {facts.matmul_4bit_error}",
                       f"python -m pip install --force-reinstall --no-deps "
                       f"\"bitsandbytes{required_versions()['bitsandbytes']}\"")
    return Finding(OK, "4비트 행렬 곱을 앞뒤로 계산해 맞는 값을 얻었다")


def check_vram(facts: Full) -> Finding:
    text = f"VRAM {facts.total_vram_gb:.1f} GB 가운데 {facts.free_vram_gb:.1f} GB가 비어 있다"
    if facts.gpu and facts.free_vram_gb < MIN_VRAM_GB:
        return Finding(WARN, text, "브라우저, 게임, 다른 학습을 닫는다. 쓰는 프로그램은 nvidia-smi로 본다")
    return Finding(OK, text if facts.gpu else "VRAM을 쓰지 않는다")


def check_spill(facts: Full) -> Finding:
    driver = _major(facts.nvidia.partition(",")[2])
    if facts.gpu and facts.system == "win32" and driver >= SPILLING_DRIVER:
        return Finding(WARN, "이 드라이버는 VRAM이 차면 말없이 RAM으로 넘쳐 10배쯤 느려진다. 학습과 대화는 상한을 둔다",
                       "NVIDIA 제어판 > 3D 설정 관리 > CUDA - 시스템 메모리 폴백 정책 > '폴백 없음 우선'")
    return Finding(OK, "VRAM이 RAM으로 넘치지 않는다" if facts.gpu else "VRAM 넘침과 상관없다")


def check_memory(facts: Full) -> Finding:
    text = f"빈 RAM {facts.free_ram_gb:.1f} GB, 페이지 파일(스왑) {facts.swap_gb:.1f} GB"
    if facts.free_ram_gb + facts.swap_gb < MIN_MEMORY_GB:
        return Finding(WARN, f"{text}: 모자라다", "다른 프로그램을 닫거나, 페이지 파일(스왑)을 8 GB 이상으로 늘린다")
    return Finding(OK, text)


def check_paths(facts: Full) -> Finding:
    odd = [path for path in facts.paths if not path.isascii() or " " in path]
    if odd and facts.system == "win32":
        return Finding(WARN, f"한글이나 빈칸이 든 경로: {odd[0]}. 일부 라이브러리가 읽지 못할 수 있다",
                       r"오류가 나면 저장소를 C:\pgko 같은 곳으로 옮기고 set TEMP=C:\temp로 바꾼다")
    return Finding(OK, f"저장소: {facts.paths[0] if facts.paths else ROOT}")


def check_console(facts: Full) -> Finding:
    if facts.code_page not in (None, 65001):
        return Finding(WARN, f"콘솔의 코드 페이지가 {facts.code_page}이다. 출력을 파일로 보내면 한글이 깨질 수 있다",
                       "chcp 65001")
    if "utf" not in facts.encoding:
        return Finding(WARN, f"출력의 문자 집합이 {facts.encoding}이다. 파일로 보내면 한글이 깨질 수 있다",
                       "set PYTHONUTF8=1" if facts.system == "win32" else "export PYTHONUTF8=1 LANG=C.UTF-8")
    return Finding(OK, "콘솔이 UTF-8이다")


def check_proxy(facts: Full) -> Finding:
    if facts.proxy:
        setter = "set" if facts.system == "win32" else "export"
        return Finding(WARN, "127.0.0.1로 가는 요청이 프록시를 거쳐 페이지가 뜨지 않을 수 있다",
                       f"{setter} no_proxy=localhost,127.0.0.1")
    return Finding(OK, "127.0.0.1로 가는 요청이 프록시를 거치지 않는다")


def check_port(facts: Full) -> Finding:
    if facts.port_taken:
        return Finding(WARN, f"다른 프로그램이 포트 {PAGE_PORT}번을 쓴다. generate.py는 다음 빈 포트를 쓰고 알려 준다",
                       f"이 포트가 꼭 필요하면 그 프로그램을 닫는다. 다른 포트는 --server_port {PAGE_PORT + 1}")
    return Finding(OK, f"포트 {PAGE_PORT}이 비어 있다")


def check_demo(facts: Full) -> Finding:
    if facts.demo_error:
        return Finding(BAD, f"데모 모델이 온전하지 않다: {facts.demo_error}",
                       "git checkout -- resources/polyglot-ko-demo")
    return Finding(OK, "데모 모델이 온전하다")


def check_base(facts: Full) -> Finding:
    command = download_command(REAL_BASE.relative_to(ROOT))
    if facts.base_error is None:
        return Finding(OK, f"polyglot-ko-1.3b는 아직 받지 않았다. 받는 명령: {command}")
    if facts.base_error:
        return Finding(BAD, f"polyglot-ko-1.3b가 온전하지 않다: {facts.base_error}", command)
    return Finding(OK, "polyglot-ko-1.3b가 온전하다")


FULL_CHECKS: tuple[Callable[[Full], Finding], ...] = (
    *QUICK_CHECKS, check_torch_loads, check_driver, check_bf16, check_attention, check_4bit, check_vram, check_spill,
    check_memory, check_paths, check_console, check_proxy, check_port, check_demo, check_base)


def diagnose(facts: Full) -> list[Finding]:
    if facts.torch_error:
        return [check(facts) for check in (*QUICK_CHECKS, check_torch_loads)]
    return [check(facts) for check in FULL_CHECKS]


def _major(driver: str) -> int:
    head = driver.strip().split(".")[0]
    return int(head) if head.isdigit() else 0


def main() -> int:
    """검사한 것을 한 줄씩 출력하고, 고쳐야 할 것이 있으면 1을 돌려준다. 패키지가 없으면 그것부터 말한다."""
    facts = look_quick()
    is_installed = check_versions(facts).level != BAD
    findings = diagnose(look_full()) if is_installed else [check_python(facts), check_versions(facts)]
    for finding in findings:
        print(f"[{finding.level}] {finding.text}")
        if finding.fix:
            print(f"       -> {finding.fix}")
    count = {level: sum(finding.level == level for finding in findings) for level in (OK, WARN, BAD)}
    print("\n" + ", ".join(f"{level} {number}" for level, number in count.items()))
    return 1 if count[BAD] else 0
