"""답을 만드는 속도를 잰다: 흔한 방법(4비트 + 어댑터 + generate)과 이 도구를 한 번의 실행에서.

사용법: python tests/bench/bench_generate.py [모양:어댑터:가중치,...] [긴 질문의 토큰 수]
        python tests/bench/bench_generate.py check [모양:어댑터:가중치,...]
    모양은 modern.py의 이름이나 모델 폴더의 경로, 어댑터는 all(모든 선형층), qkv, none, 가중치는 nf4, int8,
    wide(16비트)다.
    check는 속도 대신 답을 본다: 탐욕적인 답이 generate와 갈라지는 곳, 그 자리의 두 로짓을 fp32의 로짓과 비교한 것, 함께
    답한 것이 하나씩 답한 것과 갈라지는 곳, 뽑기의 카이제곱. 폴더의 모델에는 BOS와 함께 든 데이터의 글을 묻는다.
사람이 읽는 표 다음에, 마지막 줄이 JSON이다. 폴더를 주지 않으면 가중치는 모양만 같은 무작위 수다. 표의 "전체"는 첫
토큰까지 넣은 128토큰의 속도이고 "이어서"는 첫 토큰 뒤의 속도다.
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/bench")]

from generate_check import ANSWER, PROMPT, check  # noqa: E402
from modern import SHAPES, add_lora, build  # noqa: E402

from utils.decode.decoder import Decoder  # noqa: E402
from utils.model.loader import choose_device, load_base  # noqa: E402
from utils.sampling import Sampling  # noqa: E402

REPEATS, LONG, BATCH = 3, 1920, 16
DEFAULT = ("qwen3-1.7b:all:nf4,llama-1.5b:all:nf4,gemma3-270m:all:nf4,gemma3-270m:all:wide,polyglot-ko-1.3b:qkv:nf4,"
           "polyglot-ko-1.3b:all:nf4,qwen3-1.7b:none:wide,qwen3-1.7b:all:int8")
QKV = {"polyglot-ko-1.3b": ["query_key_value"]}
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


def read_bytes(model) -> int:
    """토큰 하나를 만들 때 읽는 가중치의 바이트. 묶이지 않은 embedding은 한 행만 읽으므로 뺀다."""
    head = model.get_output_embeddings().weight
    total = 0
    for name, parameter in model.named_parameters():
        if ("embed_in" in name or "embed_tokens" in name) and parameter is not head:
            continue
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
    return total


def prompt_of(model, tokens: int) -> list[int]:
    top = model.config.vocab_size - 1
    return [100 + index * 7 % (top - 100) for index in range(tokens)]


def measure_generate(model) -> dict:
    ids = torch.tensor([prompt_of(model, PROMPT)], device="cuda")

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


def measure_decoder(model, long: int) -> dict:
    gc.collect()
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    decoder = Decoder(model, range(model.config.vocab_size), (-1,))
    result = {"start_seconds": time.perf_counter() - begin, "path": decoder.path, "fits": decoder.context}
    prompt = prompt_of(model, PROMPT)
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
    for _ in range(2):
        list(decoder.stream(prompt_of(model, LONG), Sampling(0.0, 1.0, 0, ANSWER)))
    result |= {"long_first_token_ms": decoder.stats.first_token_seconds * 1000,
               "long_tokens_per_second": decoder.stats.tokens_per_second,
               "peak_mb_over_weights": (torch.cuda.max_memory_allocated() - weights) / 1e6}
    questions = [prompt_of(model, PROMPT + row) for row in range(BATCH)]
    decoder.answer_many(questions, ways[0][1])
    begin = time.perf_counter()
    answers = decoder.answer_many(questions, ways[0][1])
    result["batch_tokens_per_second"] = sum(len(answer.ids) for answer in answers) / (time.perf_counter() - begin)
    if long and decoder.context > long + ANSWER:
        torch.cuda.reset_peak_memory_stats()
        list(decoder.stream(prompt_of(model, long), Sampling(0.0, 1.0, 0, 16)))
        result |= {"longest": long, "longest_first_token_s": decoder.stats.first_token_seconds,
                   "longest_tokens_per_second": decoder.stats.tokens_per_second,
                   "longest_peak_mb_over_weights": (torch.cuda.max_memory_allocated() - weights) / 1e6}
    return result


def built(case: str):
    shape, adapter, kind = case.rsplit(":", 2)
    if shape in SHAPES:
        model = build(shape, kind)
    else:
        model = load_base(shape, choose_device(), {"nf4": "4bit", "int8": "8bit", "wide": None}[kind]).eval()
    if adapter == "none":
        return model
    return add_lora(model, QKV.get(shape, ["q_proj", "k_proj", "v_proj"]) if adapter == "qkv" else "all-linear")


def measure(case: str, long: int) -> dict:
    model = built(case)
    result = {PLAIN: measure_generate(model)}
    return result | {OURS: measure_decoder(model, long) | {"read_bytes": read_bytes(model)}}


def main(cases: str = DEFAULT, long: str = "0") -> None:
    if cases == "check":
        check(DEFAULT if long == "0" else long, built)
        return
    bandwidth, results = copy_bandwidth(), {}
    for case in cases.split(","):
        torch.cuda.empty_cache()
        results[case] = measure(case, int(long))
        print(case, json.dumps(results[case], ensure_ascii=False), flush=True)
        gc.collect()

    print(f"{torch.cuda.get_device_name()}, 복사 {bandwidth / 1e12:.2f} TB/s, 질문 {PROMPT}토큰, 답 {ANSWER}토큰, "
          f"{REPEATS}번의 중앙값. 속도는 토큰/초")
    print("| 모델 | generate 전체 | 이 도구 전체 | 배 | 이어서 | 대역폭 한계의 | 첫 토큰 ms | 뽑기 전체 | "
          f"{BATCH}개 함께 전체 | 하나씩의 | 2,048토큰의 VRAM MB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, sides in results.items():
        ours, plain = sides[OURS], sides[PLAIN]
        ours["bound_share"] = ours["steady_tokens_per_second"] * ours["read_bytes"] / bandwidth
        ours["batch_gain"] = ours["batch_tokens_per_second"] / ours["tokens_per_second"]
        print(f"| {name} | {plain['tokens_per_second']:.0f} | {ours['tokens_per_second']:.0f} | "
              f"{ours['tokens_per_second'] / plain['tokens_per_second']:.1f} | "
              f"{ours['steady_tokens_per_second']:.0f} | {ours['bound_share']:.0%} | "
              f"{ours['first_token_ms']:.1f} | {ours['sampled_tokens_per_second']:.0f} | "
              f"{ours['batch_tokens_per_second']:.0f} | {ours['batch_gain']:.1f}배 | "
              f"{ours['peak_mb_over_weights']:.0f} |")
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "bandwidth": bandwidth, "results": results},
                     ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
