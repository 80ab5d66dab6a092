"""한 모델의 길 전체(4비트 학습, 병합, 대화)를 지나며, 단계마다 transformers와 peft로 따로 구한 값과 비교한다.

참값은 문서를 하나씩, 캐시 없이, 묶지 않고 부른 모델의 logits에서 구한다. 학습의 기록(loss와 기울기의 크기),
저장한 어댑터, 합친 폴더, 답의 토큰만 보므로 안쪽을 어떻게 고쳐도 같은 것을 묻는다.
"""

import contextlib
import io
import json
import traceback
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from conftest import ROOT, load_script
from torch.nn import functional

# 문서마다의 합과 묶은 합은 더하는 순서만 다르다. 합친 모델은 가중치를 16비트로 한 번 반올림한다
LIMITS = {"loss": 1e-4, "gradient": 1e-3, "validation": 1e-4, "merged": 5e-3, "merged_4bit": 5e-3, "answer": 0.0,
          "answer_4bit": 0.0}
ANSWER_TOKENS = 10
NEAR = 1e-3  # 두 logit의 차이가 이보다 작으면 반올림이 고른 것이므로 어느 쪽이든 맞다
FLAGS = {"cutoff_len": 56, "batch_size": 8, "micro_batch_size": 2, "num_train_epochs": 2, "val_set_size": 13,
         "learning_rate": 1e-2, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": ("auto",),
         "verbose": True}
QUESTIONS = ("3 더하기 4는?", "하늘은 왜 파랗습니까?")


@dataclass
class Road:
    """지난 결과.

    Attributes:
        outcome: pass, fallback, refused_start(데이터를 읽기 전), refused_check(첫 step 전), refused_late(학습한 다음),
            wrong(값이 다르다), traceback.
        path: 학습한 길.
        note: 거절한 말, 또는 실패한 곳.
        gaps: 비교한 것 -> 차이. `LIMITS`보다 크면 틀린 것이다.
    """

    outcome: str
    path: str = ""
    note: str = ""
    gaps: dict[str, float] = field(default_factory=dict)
    said: str = ""


def write_rows(file: Path, n: int = 8) -> Path:
    """질문과 답이 있는 행과, 한 블록에 여럿이 묶이는 짧은 글."""
    form = "### 질문: {0} 더하기 {0}는?\n\n### 답변: {1}입니다.<|endoftext|>"
    texts = [form.format(at, 2 * at) if at % 2 else f"하늘은 {at}번 파랗습니다.<|endoftext|>" for at in range(n)]
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return file


def walk(base: Path, folder: Path, *, both_bases: bool = True, **flags) -> Road:
    """`base`를 학습하고, 합치고, 물으며 참값과 비교한다.

    Args:
        folder: 결과를 쓸 빈 폴더.
        both_bases: NF4를 다녀온 가중치에 합친 모델도 본다.
        flags: 학습의 플래그. `FLAGS`를 덮는다.
    """
    from utils.errors import UsageError

    said = io.StringIO()
    road = Road("pass")
    try:
        with contextlib.redirect_stdout(said), hurrying():
            _walk(base, folder, both_bases, flags, road)
    except UsageError as error:
        text = said.getvalue()
        road.outcome = ("refused_start" if "데이터:" not in text else
                        "refused_late" if (folder / "run" / "run.json").exists() else "refused_check")
        road.note = " ".join(str(error).split())
    except Exception as error:
        road.outcome = "traceback"
        ours = [frame for frame in traceback.extract_tb(error.__traceback__)
                if Path(frame.filename).is_relative_to(ROOT / "utils")]
        place = ours[-1] if ours else traceback.extract_tb(error.__traceback__)[-1]
        road.note = (f"{Path(place.filename).name}:{place.lineno} {type(error).__name__}: "
                     f"{' '.join(str(error).split())[:160]}")
        road.said = traceback.format_exc()
    else:
        wrong = {name: gap for name, gap in road.gaps.items() if not gap <= LIMITS[name]}
        if wrong:
            road.outcome = "wrong"
            road.note = ", ".join(f"{name} {gap:.2g}" for name, gap in wrong.items())
        elif "다른 길을 쓴다" in said.getvalue():
            road.outcome = "fallback"
            lines = said.getvalue().splitlines()
            at = next(number for number, line in enumerate(lines) if "다른 길을 쓴다" in line)
            road.note = " ".join(lines[at:at + 2])
    road.said += said.getvalue()
    return road


@contextlib.contextmanager
def hurrying():
    """학습의 끝에 남기는 것을 줄인다: 시험 답은 하나, 곡선은 없다. 답은 `answer_gap`이 따로 참값과 비교한다."""
    from utils.train import results, samples

    kept = samples.N_COMPARED, results.report.draw_curves
    samples.N_COMPARED, results.report.draw_curves = 1, lambda *given: None
    try:
        yield
    finally:
        samples.N_COMPARED, results.report.draw_curves = kept


def _walk(base: Path, folder: Path, both_bases: bool, flags: dict, road: Road) -> None:
    from utils.errors import UsageError

    folder.mkdir(parents=True, exist_ok=True)
    data, run = write_rows(folder / "rows.jsonl"), folder / "run"
    flags = {**FLAGS, **flags, "base_model": str(base), "data_path": str(data), "output_dir": str(run)}
    load_script("finetune-lora.py").train(**flags)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    road.path = record["path"]
    train_set, eval_set = read_blocks(record["settings"])
    road.gaps |= training_gaps(base, run, record, train_set, eval_set)
    texts = [document["input_ids"] for block in train_set for document in documents(block)
             if (document["labels"] != -100).any()]

    merge, model = load_script("merge-lora.py").merge, tuned(base, run)
    merge(peft_root=str(run), output_dir=str(folder / "merged"))
    merged = load(folder / "merged")
    road.gaps["merged"] = logit_gap(merged, model, texts)
    road.gaps["answer"] = answer_gap(merged, base_model=str(folder / "merged"), load_4bit=False)
    model = tuned(base, run, four_bit=True)
    road.gaps["answer_4bit"] = answer_gap(model, peft_root=str(run), load_4bit=True)
    if both_bases:
        try:
            merge(peft_root=str(run), output_dir=str(folder / "quantized"), merge_onto="quantized")
        except UsageError as error:  # 기본이 아닌 방법이다. 쓰기 전에 거절하고 되는 방법을 말하면 길은 막히지 않는다
            if (folder / "quantized").exists():
                raise
            road.note = str(error)
        else:
            road.gaps["merged_4bit"] = logit_gap(load(folder / "quantized"), model, texts)


def read_blocks(settings: dict) -> tuple[list[dict], list[dict]]:
    """학습한 블록과 검증한 블록."""
    from utils.train import stage
    from utils.train.records import Settings

    settings = {**settings, "lora_target_modules": tuple(settings["lora_target_modules"])}
    inputs = stage.prepare(Settings(**settings), lambda line: None)
    return tuple([part[at] for at in range(len(part))] if part else [] for part in (inputs.train_set, inputs.eval_set))


def documents(block: dict) -> list[dict]:
    """블록을 문서로 나눈다. 자리 번호가 0이면 새 문서다."""
    starts = [*torch.nonzero(block["position_ids"] == 0).flatten().tolist(), len(block["position_ids"])]
    return [{name: values[start:stop] for name, values in block.items()} for start, stop in pairwise(starts)]


def load(folder: Path, four_bit: bool = False):
    """fp32로 올린 모델. attention은 transformers가 스스로 고른 것이다(Falcon의 ALiBi는 eager와 sdpa의 값이 다르다)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32) if four_bit else None
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, quantization_config=quantization,
                                                 device_map={"": "cpu"})
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # 켜 두면 첫 forward가 4비트 가중치를 제자리에서 바꾼다
    return model.eval()


def tuned(base: Path, adapter: Path, four_bit: bool = False, trainable: bool = False):
    """기반 모델에 어댑터를 얹은 것."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base, four_bit), str(adapter), is_trainable=trainable).eval()


def training_gaps(base: Path, run: Path, record: dict, train_set: list[dict], eval_set: list[dict]) -> dict:
    """step마다의 loss와 기울기의 크기, 학습 앞뒤의 검증 loss가 참값과 얼마나 다른지(비율).

    첫 체크포인트의 A는 처음의 A와 같다: B가 0이면 A의 기울기도 0이다. 그래서 B만 0으로 되돌리면 첫 step의 모델이 된다.
    """
    steps = [entry for entry in record["history"] if "grad_norm" in entry]
    model = tuned(base, run / "checkpoint-1", four_bit=True, trainable=True)
    second = mean_loss(model, train_set, backward=True), gradient_norm(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    first = mean_loss(model, train_set, backward=True), gradient_norm(model)
    before = mean_loss(model, eval_set) if eval_set else None
    ours = [(entry["loss"], entry["grad_norm"]) for entry in steps[:2]]
    pairs = list(zip(ours, (first, second), strict=True))
    gaps = {"loss": max(apart(mine[0], truth[0]) for mine, truth in pairs),
            "gradient": max(apart(float(mine[1]), truth[1]) for mine, truth in pairs)}
    if eval_set:
        after = mean_loss(tuned(base, run, four_bit=True), eval_set)
        gaps["validation"] = max(apart(record["eval_loss_before"], before), apart(record["eval_loss_after"], after))
    return gaps


def apart(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs)


def mean_loss(model, blocks: list[dict], backward: bool = False) -> float:
    """정답이 있는 토큰마다의 loss의 평균. `backward`면 gradient를 `.grad`에 남긴다."""
    model.zero_grad()
    count = sum(int((block["labels"][1:] != -100).sum()) for block in blocks)
    total = 0.0
    with torch.set_grad_enabled(backward):
        for block in blocks:
            for document in documents(block):
                if len(document["input_ids"]) < 2 or (document["labels"][1:] == -100).all():
                    continue
                logits = model(input_ids=document["input_ids"][None], use_cache=False).logits[0, :-1].float()
                loss = functional.cross_entropy(logits, document["labels"][1:], reduction="sum") / count
                if backward:
                    loss.backward()
                total += float(loss.detach())
    return total


def gradient_norm(model) -> float:
    return float(sum((p.grad.double() ** 2).sum() for p in model.parameters() if p.grad is not None) ** 0.5)


@torch.no_grad()
def logit_gap(ours, theirs, texts: list[torch.Tensor]) -> float:
    """두 모델의 logits의 차이의 크기를 토큰마다 재어 가운데 값을 낸다. 참값에서 평균을 뺀 크기가 1이다.

    16비트 반올림이 전문가를 바꾸어 고르는 토큰이 드물게 있어, 가장 큰 것을 보지 않는다.
    """
    gaps = []
    for ids in texts:
        one, other = (model(input_ids=ids[None], use_cache=False).logits[0].double() for model in (ours, theirs))
        gaps.append((one - other).norm(dim=-1) / (other - other.mean(-1, keepdim=True)).norm(dim=-1))
    return float(torch.cat(gaps).median())


def answer_gap(model, **source) -> float:
    """generate.py의 답이 모델의 탐욕적인 답과 갈라지는 자리의 logit 차이. 같은 답이면 0이다."""
    from utils.sampling import Sampling
    from utils.talk.answerer import Answer
    from utils.talk.source import find_source, load_answerers

    def quiet(line: str) -> None:
        """알리지 않는다."""

    load_4bit = source.pop("load_4bit")
    found = find_source(source.get("base_model"), source.get("peft_root"), quiet)
    answerer = load_answerers([found], None, load_4bit, False, None, quiet)[0]
    worst = 0.0
    for question in QUESTIONS:
        answer = Answer(answerer.ask(question), Sampling(temperature=0.0, max_new_tokens=ANSWER_TOKENS))
        list(answerer.pieces(answer))
        worst = max(worst, greedy_gap(model, answer.input_ids, answer.ids, answerer.end_id, len(answerer.tokenizer)))
    return worst


@torch.no_grad()
def greedy_gap(model, prompt: list[int], answer: list[int], end_id: int, vocab: int) -> float:
    """답의 토큰마다, 캐시 없이 처음부터 다시 구한 logits에서 가장 큰 것과의 차이. 모두 가장 크면 0이다."""
    ids = list(prompt)
    full = answer if len(answer) == ANSWER_TOKENS else [*answer, end_id]
    for token in full:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :vocab].double()
        gap = float(logits.max() - logits[token])
        if gap > NEAR * float(logits.std()):
            return gap
        ids.append(token)
    return 0.0
