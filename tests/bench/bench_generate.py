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
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/bench")]

from families import exact  # noqa: E402
from modern import SHAPES, add_lora, build  # noqa: E402

from utils.data.encoder import head_ids  # noqa: E402
from utils.decode.decoder import Decoder  # noqa: E402
from utils.engine.decode_plan import CHOOSERS  # noqa: E402
from utils.model.loader import choose_device, load_base  # noqa: E402
from utils.sampling import Sampling, penalize, probabilities  # noqa: E402

PROMPT, ANSWER, REPEATS, LONG, BATCH = 64, 128, 3, 1920, 16
DEFAULT = ("qwen3-1.7b:all:nf4,llama-1.5b:all:nf4,gemma3-270m:all:nf4,gemma3-270m:all:wide,polyglot-ko-1.3b:qkv:nf4,"
           "polyglot-ko-1.3b:all:nf4,qwen3-1.7b:none:wide,qwen3-1.7b:all:int8")
QKV = {"polyglot-ko-1.3b": ["query_key_value"]}
PLAIN, OURS = "흔한 방법", "이 도구"
TEXTS = ROOT / "ko-datasets/polyglot-ko-lite_textonly.json"
QUESTIONS, DRAWS, LINES = 20, 20_480, 256
SAMPLED = (Sampling(0.9, 1.0, 0), Sampling(0.7, 0.9, 40), Sampling(1.2, 0.8, 0, repetition_penalty=1.3),
           Sampling(1.0, 0.95, 400, no_repeat_ngram_size=3))


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


def parted(left: list[int], right: list[int]) -> int | None:
    """두 답이 처음으로 갈라지는 자리. 같으면 None."""
    return next((place for place, (one, other) in enumerate(zip(left, right, strict=True)) if one != other), None)


def questions_of(model, case: str) -> list[list[int]]:
    """PROMPT토큰짜리 질문 QUESTIONS개: 폴더의 모델이면 그 토크나이저로 읽은 글, 아니면 무작위 토큰."""
    shape = case.rsplit(":", 2)[0]
    if shape in SHAPES:
        generator = torch.Generator().manual_seed(7)
        return torch.randint(100, model.config.vocab_size, (QUESTIONS, PROMPT), generator=generator).tolist()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shape)
    head, text = head_ids(tokenizer), TEXTS.read_text(encoding="utf-8")[: 1000 * QUESTIONS]
    ids, width = tokenizer(text, add_special_tokens=False)["input_ids"], PROMPT - len(head)
    return [head + ids[begin : begin + width] for begin in range(0, QUESTIONS * width, width)]


@torch.no_grad()
def check_greedy(model, decoder: Decoder, questions: list[list[int]], truth) -> dict:
    """질문들의 탐욕적인 답을 generate와, 함께 답한 것을 하나씩 답한 것과 비교한다. truth는 같은 가중치의 fp32 모델이다.

    generate와 갈라진 자리마다 (자리, generate가 두 토큰에 준 로짓의 차이, 그 자리에서 generate의 로짓과 fp32의 가장 큰
    차이, 이 도구의 것)을 준다. 함께 답해 갈라진 것은 (자리, 하나씩 답할 때 두 토큰의 로짓의 차이)다.
    """
    settings, partings = Sampling(0.0, 1.0, 0, ANSWER), []
    alone = [list(decoder.stream(question, settings)) for question in questions]
    ids = torch.tensor(questions, device="cuda")  # 하나씩이면 Qwen3-1.7B에서 4분이 든다
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, min_new_tokens=ANSWER,
                              do_sample=False, pad_token_id=2)[:, PROMPT:].tolist()
    for question, ours, theirs in zip(questions, alone, expected, strict=True):
        place = parted(ours, theirs)
        if place is None:
            continue
        read = torch.tensor([question + theirs[:place]], device="cuda")
        plain, right = (side(read).logits[0, -1].float() for side in (model, truth))
        mine = decoder._engine.logits(question, ours[: place + 1])[-1]
        partings.append((place, float(plain[theirs[place]] - plain[ours[place]]), float((plain - right).abs().max()),
                         float((mine - right[: len(mine)]).abs().max())))
    together = [reply.ids for reply in decoder.answer_many(questions, settings)]
    rows = []
    for question, one, other in zip(questions, alone, together, strict=True):
        if (place := parted(one, other)) is not None:
            mine = decoder._engine.logits(question, one[: place + 1])[-1]
            rows.append((place, float(mine[one[place]] - mine[other[place]])))
    return {"parted_from_generate": partings, "rows_parted_from_single": rows}


def draw(decoder: Decoder, logits: torch.Tensor, answer: list[int], settings: Sampling) -> torch.Tensor:
    """뽑는 커널로 씨앗을 바꾸어 DRAWS번 뽑은 토큰. 블록 하나가 한 번을 뽑으므로 LINES번씩 함께 뽑는다."""
    step, vocab = decoder._engine._step, len(logits)
    context = len(step.answer)
    line_logits = torch.empty(LINES, -(-vocab // 4) * 4, device="cuda")
    answers = torch.zeros(LINES, context, dtype=torch.int32, device="cuda")
    answers[:, : len(answer)] = torch.tensor(answer, dtype=torch.int32)
    told, x = torch.zeros(LINES, context, dtype=torch.int32).pin_memory(), step.x.repeat(LINES, 1)
    step.settings.copy_(torch.tensor([settings.temperature, settings.top_p, settings.repetition_penalty]))
    first, drawn = [0, len(answer), settings.top_k, settings.no_repeat_ngram_size], []
    for begin in range(0, DRAWS, LINES):
        state = torch.tensor([[*first, begin + line, 77] for line in range(LINES)], dtype=torch.int32, device="cuda")
        line_logits[:, :vocab] = logits
        step.kernels["choose"]((LINES,), (CHOOSERS,), line_logits, state, step.settings, answers, told,
                               step.weights.embedding, x, shared=step.plan.choose_shared)
        drawn.append(answers[:, len(answer)].clone())
    return torch.cat(drawn).long()


def check_sampling(decoder: Decoder, question: list[int]) -> list[dict]:
    """질문 하나의 로짓에서 DRAWS번 뽑은 도수의 카이제곱. 자유도와 나란히 준다. z는 정규 근사의 값이다."""
    answer, results = [5, 6, 7, 5, 6, 9], []
    truth = decoder._engine.logits(question, [0])[0].clone()
    for settings in SAMPLED:
        expected = probabilities(penalize(truth, answer, settings), settings) * DRAWS
        counts = torch.bincount(draw(decoder, truth, answer, settings), minlength=len(expected)).float()
        big = expected >= 5
        seen, wanted = (torch.cat((side[big], side[~big].sum()[None])) for side in (counts, expected))
        keep = wanted >= 5
        freedom = int(keep.sum()) - 1
        statistic = float(((seen - wanted) ** 2 / wanted)[keep].sum())
        results.append({"settings": str(settings), "impossible": int(counts[expected == 0].sum()), "chi": statistic,
                        "freedom": freedom, "z": (statistic - freedom) / (2 * max(1, freedom)) ** 0.5})
    return results


def check(cases: str) -> None:
    results = {}
    for case in cases.split(","):
        model = built(case)
        truth, questions = exact(model), questions_of(model, case)
        decoder = Decoder(model, range(model.config.vocab_size), (-1,))
        found = check_greedy(model, decoder, questions, truth) | {"sampling": check_sampling(decoder, questions[0])}
        results[case] = found | {"path": decoder.path}
        gaps = ", ".join(f"{place}번째({gap:.3g}, {theirs:.2g}, {ours:.2g})"
                         for place, gap, theirs, ours in found["parted_from_generate"]) or "없다"
        rows = ", ".join(f"{place}번째({gap:.2g})" for place, gap in found["rows_parted_from_single"]) or "없다"
        print(f"{case}: 질문 {QUESTIONS}개 x {ANSWER}토큰. generate와 갈라진 곳(generate의 두 로짓의 차이, "
              f"fp32와 generate의 차이, fp32와 이 도구의 차이): {gaps}. 함께 답해 갈라진 곳(두 로짓의 차이): {rows}")
        for one in found["sampling"]:
            print(f"    카이제곱 {one['chi']:.0f}, 자유도 {one['freedom']}(z {one['z']:+.1f}), "
                  f"나올 수 없는 것 {one['impossible']}번: {one['settings']}", flush=True)
        del model, truth, decoder
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "check": results}, ensure_ascii=False))


def main(cases: str = DEFAULT, long: str = "0") -> None:
    if cases == "check":
        check(DEFAULT if long == "0" else long)
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
