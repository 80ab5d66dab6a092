"""합친 모델을 디스크에서 다시 읽어, 합치지 않은 기반 모델 + 어댑터와 같은 답을 하는지 견준다."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utils import dataset, loader, nf4, shards, streamed
from utils.errors import UsageError
from utils.lora import find_tensor
from utils.merger import Job
from utils.modelfolder import open_model_folder
from utils.paths import DATA_DEMO, find_input
from utils.prompter import make_prompter

N_PROMPTS = 8
LOGIT_BYTES = 32 * 2**20
ROWS = 16
MIN_TOP1, MAX_KL, MIN_RETAINED = 0.98, 1e-3, 0.95
MIN_GAIN = 0.02  # 토큰당 nat. 어댑터가 이만큼도 낫게 하지 못했으면 남은 몫을 따지지 않는다


@dataclass(frozen=True)
class Windows:
    """검증 행에서 잘라 낸 토큰들. ids [n, length], 실제 토큰이면 True인 real, 답의 토큰이면 True인 answer."""

    ids: torch.Tensor
    real: torch.Tensor
    answer: torch.Tensor
    source: str


def read_windows(job: Job) -> Windows:
    """학습에서 검증에 쓴 행. 실행의 기록이 없으면 함께 든 데이터의 행이다. logits이 메모리에 맞게 짧게 자른다."""
    tokenizer = loader.load_tokenizer(job.base.path)
    end_id = loader.end_token_id(tokenizer)
    info = loader.read_prompt_info(job.adapter) or loader.read_prompt_info(job.root)
    settings = _run_settings(job.root)
    data = find_input(str(settings.get("data_path", DATA_DEMO)))
    if not Path(data).is_file():
        data, settings = str(DATA_DEMO), {}
    prompter = make_prompter(info.template if info else "default", tokenizer)
    encoder = dataset.Encoder(tokenizer, end_id, special_in_prompt=prompter.name == "chat")
    documents = dataset.load_documents(data, prompter, encoder, settings.get("cutoff_len", 1024), end_id,
                                       settings.get("cache_dir"), skip_bad=bool(settings.get("skip_bad")))
    percent = settings.get("val_set_size") or 5
    _, held_out = dataset.split_by_content(documents, percent, settings.get("seed", 42))
    chosen = (held_out if len(held_out) else np.arange(len(documents)))[:N_PROMPTS]  # 모두 같은 행이면 나뉘지 않는다
    budget = min(512, max(64, LOGIT_BYTES // (4 * job.base.config["vocab_size"])))
    length = budget // len(chosen)
    ids = np.full((len(chosen), length), end_id, np.int64)
    real, answer = np.zeros((2, len(chosen), length), bool)
    for row, member in enumerate(chosen):
        tokens, is_answer = documents.document(member)
        begin = max(0, int(np.argmax(is_answer)) - length // 3)
        cut = slice(begin, begin + length)
        n = len(tokens[cut])
        ids[row, :n], real[row, :n], answer[row, :n] = tokens[cut], True, is_answer[cut]
    return Windows(torch.from_numpy(ids), torch.from_numpy(real), torch.from_numpy(answer), str(data))


def prove(job: Job, merged: Path) -> dict:
    """디스크의 합친 모델과 기반 모델 + 어댑터를 견준 결과.

    Returns:
        top1(가장 높은 토큰이 같은 비율), kl(토큰당 평균 nat), largest_gap(logit 차이의 최댓값), base_loss,
        adapter_loss, merged_loss(답의 토큰 평균), retained(남은 개선; 개선이 거의 없으면 None).
    """
    windows = read_windows(job)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    written = open_model_folder(merged)
    quantised = {entry.name for name in nf4.quantised_modules(job.base.path)
                 if (entry := find_tensor(job.base.tensors, f"{name}.weight"))}

    def plain(entry):
        return lambda start, stop: shards.read_rows(entry, start, stop).float()

    def rounded(entry):
        return nf4.NF4Rows(entry, job.trained_dtype).rows if entry.name in quantised else plain(entry)

    under = rounded if job.onto == "quantized" else plain
    expected = _logits(job, streamed.Source(job.base, under, job.updates), windows, device)
    actual = _logits(job, streamed.Source(written, plain, {}), windows, device)
    report = {"prompts": len(windows.ids), "tokens": int(windows.real[:, 1:].sum()), "data": windows.source,
              **_compare(expected, actual)}
    before = _logits(job, streamed.Source(job.base, under, {}), windows, device)
    losses = [_answer_loss(values, windows) for values in (before, expected, actual)]
    report |= dict(zip(("base_loss", "adapter_loss", "merged_loss"), losses, strict=True))
    gain = losses[0] - losses[1]
    report["retained"] = (losses[0] - losses[2]) / gain if gain >= MIN_GAIN else None
    return report


def judge(report: dict) -> None:
    """합친 모델이 배운 모델이 아니면 까닭을 말한다.

    Raises:
        UsageError: 기준에 못 미친다.
    """
    retained = report["retained"]
    if not (report["top1"] >= MIN_TOP1 and report["kl"] <= MAX_KL and (retained is None or retained >= MIN_RETAINED)):
        raise UsageError(f"합친 모델이 기반 모델 + 어댑터와 다르다. {describe(report)} (기준: 같은 첫 토큰 "
                         f"{MIN_TOP1:.0%}, 남은 개선 {MIN_RETAINED:.0%} 이상, KL {MAX_KL:g} 이하). "
                         "디스크와 어댑터를 살피고 다시 합친다")


def describe(report: dict) -> str:
    kept = "개선이 거의 없어 따지지 않음" if report["retained"] is None else f"{report['retained']:.1%}"
    return (f"프롬프트 {report['prompts']}개, 토큰 {report['tokens']}개: 같은 첫 토큰 {report['top1']:.1%}, "
            f"평균 KL {report['kl']:.1e}, 가장 큰 logit 차이 {report['largest_gap']:.3f}, 남은 개선 {kept}")


@torch.no_grad()
def _logits(job: Job, source: streamed.Source, windows: Windows, device: torch.device) -> torch.Tensor:
    """[실제 토큰의 수, vocab]의 logit. 길이를 맞추려 채운 뒤쪽은 앞을 바꾸지 못하므로 버리기만 하면 된다."""
    model = streamed.build(job.base.path, source, device)
    positions = torch.arange(windows.ids.shape[1], device=device).expand(windows.ids.shape)
    logits = model(input_ids=windows.ids.to(device), position_ids=positions, use_cache=False).logits[:, :-1]
    return logits[windows.real[:, 1:].to(device)].cpu()


def _compare(expected: torch.Tensor, actual: torch.Tensor) -> dict:
    same, kl, gap = 0, 0.0, 0.0
    for one, other in zip(expected.split(ROWS), actual.split(ROWS), strict=True):
        same += int((one.argmax(-1) == other.argmax(-1)).sum())
        kl += F.kl_div(F.log_softmax(other.double(), -1), F.log_softmax(one.double(), -1), log_target=True,
                       reduction="sum").item()
        gap = max(gap, (one - other).abs().max().item())
        if not torch.isfinite(other).all():
            raise UsageError("합친 모델의 logit에 NaN이나 inf가 있다. 기반 모델과 어댑터를 살핀다")
    return {"top1": same / len(expected), "kl": max(0.0, kl / len(expected)), "largest_gap": gap}


def _answer_loss(logits: torch.Tensor, windows: Windows) -> float:
    goal = windows.ids[:, 1:][windows.real[:, 1:]]
    scored = windows.answer[:, 1:][windows.real[:, 1:]]
    return F.cross_entropy(logits[scored], goal[scored]).item()


def _run_settings(root: Path) -> dict:
    file = root / "run.json"
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{file}을 읽지 못했다. 깨졌으면 지우면 함께 든 데이터로 검산한다") from None
