"""답을 만드는 속도를 잰다: 흔한 방법(4비트 + 어댑터 + generate)과 이 도구를 한 번의 실행에서 번갈아.

사용법: python tests/bench/bench_generate.py [1.3b,5.8b]
사람이 읽는 표 다음에, 마지막 줄이 JSON이다. 가중치는 모양만 같은 무작위 수다.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from standin import add_lora, build, config_of

from utils.decode.decoder import Decoder
from utils.sampling import Sampling

PROMPT, ANSWER, REPEATS, VOCAB = 64, 128, 3, 30_003
PLAIN, OURS = "흔한 방법", "이 도구"


def copy_bandwidth() -> float:
    """GPU 안에서 베끼는 속도(바이트/초). 읽기와 쓰기를 함께 센다."""
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda")
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = max(best, 2 * source.numel() / begin.elapsed_time(end) * 1000)
    return best


def bf16_model(shape: str):
    sizes = {key: value for key, value in config_of(shape).items() if key != "model_type"}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    torch.set_default_dtype(default)
    return model.eval()


def read_bytes(model) -> int:
    """토큰 하나를 만들 때 읽는 가중치의 바이트. embedding은 한 행만 읽으므로 뺀다."""
    total = 0
    for name, parameter in model.named_parameters():
        if "embed_in" not in name:
            total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
    return total


def measure_generate(model) -> dict:
    ids = torch.arange(100, 100 + PROMPT, device="cuda")[None]

    def answer(count):
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                              do_sample=False, pad_token_id=2)

    answer(4)
    whole, first = [], []
    for _ in range(REPEATS):
        for count, times in ((ANSWER, whole), (1, first)):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            answer(count)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    return {"tokens_per_second": ANSWER / statistics.median(whole), "first_token_ms": statistics.median(first) * 1000}


def measure_decoder(model) -> dict:
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    decoder = Decoder(model, range(VOCAB), (-1,))
    result = {"start_seconds": time.perf_counter() - begin, "path": decoder.path}
    prompt = list(range(100, 100 + PROMPT))
    ways = ("", Sampling(0.0, 1.0, 0, ANSWER)), ("sampled_", Sampling(0.7, 0.9, 40, ANSWER, 1.1, 4, seed=1))
    for name, settings in ways:
        list(decoder.stream(prompt, settings))
        rows = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            list(decoder.stream(prompt, settings))
            rows.append((ANSWER / (time.perf_counter() - begin), decoder.stats.tokens_per_second,
                         decoder.stats.first_token_seconds * 1000))
        whole, steady, first = map(statistics.median, zip(*rows, strict=True))
        result |= {f"{name}tokens_per_second": whole, f"{name}steady_tokens_per_second": steady,
                   f"{name}first_token_ms": first}
    long = list(range(1000, 2920))
    list(decoder.stream(long, Sampling(0.0, 1.0, 0, ANSWER)))
    list(decoder.stream(long, Sampling(0.0, 1.0, 0, ANSWER)))
    return result | {"long_first_token_ms": decoder.stats.first_token_seconds * 1000,
                     "long_tokens_per_second": decoder.stats.tokens_per_second,
                     "peak_mb_over_weights": (torch.cuda.max_memory_allocated() - weights) / 1e6}


def measure_4bit(shape: str) -> dict:
    model = add_lora(build(shape, torch.float16, False, torch.bfloat16), up=0.02).eval()
    result = {PLAIN: measure_generate(model)}
    del model
    torch.cuda.empty_cache()
    model = add_lora(build(shape, torch.bfloat16, True, torch.bfloat16), up=0.02).eval()
    result[OURS] = measure_decoder(model) | {"read_bytes": read_bytes(model)}
    return result


def measure_bf16(shape: str) -> dict:
    model = bf16_model(shape)
    return {PLAIN: measure_generate(model), OURS: measure_decoder(model) | {"read_bytes": read_bytes(model)}}


def main(shapes: str = "1.3b,5.8b") -> None:
    names = shapes.split(",")
    bandwidth, results = copy_bandwidth(), {}
    for shape in names:
        results[f"{shape} 4-bit + LoRA"] = measure_4bit(shape)
        torch.cuda.empty_cache()
    results[f"{names[0]} bf16"] = measure_bf16(names[0])

    print(f"{torch.cuda.get_device_name()}, 복사 {bandwidth / 1e12:.2f} TB/s, 질문 {PROMPT}토큰, 답 {ANSWER}토큰, "
          f"{REPEATS}번의 중앙값")
    print("| 모델 | generate | 이 도구 | 배 | 대역폭 한계의 | 첫 토큰 ms | 뽑기 | 문맥 2,048의 VRAM MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, sides in results.items():
        ours, plain = sides[OURS], sides[PLAIN]
        ours["bound_share"] = ours["steady_tokens_per_second"] * ours["read_bytes"] / bandwidth
        print(f"| {name} | {plain['tokens_per_second']:.0f} | {ours['tokens_per_second']:.0f} | "
              f"{ours['tokens_per_second'] / plain['tokens_per_second']:.1f} | {ours['bound_share']:.0%} | "
              f"{ours['first_token_ms']:.1f} | {ours['sampled_tokens_per_second']:.0f} | "
              f"{ours['peak_mb_over_weights']:.0f} |")
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "bandwidth": bandwidth, "results": results},
                     ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
