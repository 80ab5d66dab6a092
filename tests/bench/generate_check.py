"""만든 답을 본다: 탐욕적인 답을 generate와 fp32의 로짓에, 함께 답한 것을 하나씩 답한 것에, 뽑기를 확률에 비교한다.

`bench_generate.py check`가 부른다.
"""

import gc
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/bench")]

from families import exact  # noqa: E402
from modern import SHAPES  # noqa: E402

from utils.data.encoder import head_ids  # noqa: E402
from utils.decode.decoder import Decoder  # noqa: E402
from utils.engine.decode_plan import CHOOSERS  # noqa: E402
from utils.sampling import Sampling, penalize, probabilities  # noqa: E402

PROMPT, ANSWER = 64, 128
QUESTIONS, DRAWS, LINES = 20, 20_480, 256
TEXTS = ROOT / "ko-datasets/polyglot-ko-lite_textonly.json"
SAMPLED = (Sampling(0.9, 1.0, 0), Sampling(0.7, 0.9, 40), Sampling(1.2, 0.8, 0, repetition_penalty=1.3),
           Sampling(1.0, 0.95, 400, no_repeat_ngram_size=3))


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


def draw(step, logits: torch.Tensor, answer: list[int], settings: Sampling, times: int) -> torch.Tensor:
    """뽑는 커널로 시드를 바꾸어 times번 뽑은 토큰 [times]. 블록 하나가 한 번을 뽑으므로 LINES번씩 함께 뽑는다.

    Args:
        step: `DecodeStep`.
        logits: 로짓 [어휘]. 고를 수 있는 토큰의 수와 길이가 같다.
    """
    vocab, context, lines = len(logits), len(step.answer), min(LINES, times)
    line_logits = torch.empty(lines, -(-vocab // 4) * 4, device="cuda")
    answers = torch.zeros(lines, context, dtype=torch.int32, device="cuda")
    answers[:, : len(answer)] = torch.tensor(answer, dtype=torch.int32)
    told, x = torch.zeros(lines, context, dtype=torch.int32).pin_memory(), step.x.repeat(lines, 1)
    step.settings.copy_(torch.tensor([settings.temperature, settings.top_p, settings.repetition_penalty]))
    first, drawn = [0, len(answer), settings.top_k, settings.no_repeat_ngram_size], []
    for begin in range(0, times, lines):
        state = torch.tensor([[*first, begin + line, 77] for line in range(lines)], dtype=torch.int32, device="cuda")
        line_logits[:, :vocab] = logits
        step.kernels["choose"]((lines,), (CHOOSERS,), line_logits, state, step.settings, answers, told,
                               step.weights.embedding, x, shared=step.plan.choose_shared)
        drawn.append(answers[:, len(answer)].clone())
    return torch.cat(drawn)[:times].long()


def check_sampling(decoder: Decoder, question: list[int]) -> list[dict]:
    """질문 하나의 로짓에서 DRAWS번 뽑은 도수의 카이제곱. 자유도와 나란히 준다. z는 정규 근사의 값이다."""
    answer, results = [5, 6, 7, 5, 6, 9], []
    truth = decoder._engine.logits(question, [0])[0].clone()
    for settings in SAMPLED:
        expected = probabilities(penalize(truth, answer, settings), settings) * DRAWS
        drawn = draw(decoder._engine._step, truth, answer, settings, DRAWS)
        counts = torch.bincount(drawn, minlength=len(expected)).float()
        big = expected >= 5
        seen, wanted = (torch.cat((side[big], side[~big].sum()[None])) for side in (counts, expected))
        keep = wanted >= 5
        freedom = int(keep.sum()) - 1
        statistic = float(((seen - wanted) ** 2 / wanted)[keep].sum())
        results.append({"settings": str(settings), "impossible": int(counts[expected == 0].sum()), "chi": statistic,
                        "freedom": freedom, "z": (statistic - freedom) / (2 * max(1, freedom)) ** 0.5})
    return results


def check(cases: str, built) -> None:
    """경우마다 답을 보고 찍는다. built: 경우의 이름으로 모델을 만드는 함수."""
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
