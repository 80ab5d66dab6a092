"""합친 모델을 디스크에서 다시 읽는 검산. 쓰려던 것이 쓰였는지와, 배운 것이 얼마나 남았는지를 따로 잰다."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utils.data import dataset
from utils.data.encoder import Encoder
from utils.data.questions import Question, held_out_members, read_question
from utils.errors import UsageError
from utils.merge import streamed, writer
from utils.merge.job import Job
from utils.model import adapter, diskmap
from utils.model.folder import open_model_folder
from utils.model.loader import load_config
from utils.model.tokenizer import answer_end_id, load_tokenizer
from utils.paths import DATA_DEMO, find_recorded
from utils.prompter import make_prompter
from utils.record import RUN_FILE

N_PROMPTS = 8  # 검산에 쓰는 행의 수
CONTEXT = 384  # 검산이 읽는 토큰의 수. 행들이 나누어 가진다(행 여덟이면 48토큰씩)
LOGIT_BYTES = 32 * 2**20  # 모델 하나의 logits에 쓰는 바이트
LEAST_COMPARED = 64  # 어휘가 커서 logits가 이 바이트를 넘어도 비교하는 토큰의 수
ROWS = 16  # 한 번에 비교하는 토큰의 수. fp64로 펼친 사본이 [16, vocab]에 머문다
MIN_TOP1, MAX_KL = 0.98, 1e-3  # 쓴 것이 쓰려던 것과 같다고 보는 기준
MIN_RETAINED = 0.9  # 배운 것이 이만큼 남지 않았으면 알린다
MIN_GAIN = 0.02  # 토큰당 nat. 어댑터가 이만큼도 낫게 하지 못했으면 남은 몫을 따지지 않는다


@dataclass(frozen=True)
class Windows:
    """비교할 검증 행들. 배울 때처럼 글머리부터 읽히고, 답 둘레의 토큰만 비교한다.

    Attributes:
        ids: 행마다의 토큰 [n, length] int64. 짧은 행은 뒤를 채운다.
        compared: 예측을 비교할 토큰이면 True [n, length].
        answer: 그 가운데 답의 토큰이면 True [n, length].
        source: 행을 읽은 파일.
        absent: 학습한 데이터인데 찾지 못한 파일.
    """

    ids: torch.Tensor
    compared: torch.Tensor
    answer: torch.Tensor
    source: str
    absent: str | None

    @property
    def targets(self) -> torch.Tensor:
        """비교하는 토큰들 [비교하는 토큰의 수]. `_logits`의 행과 같은 차례다."""
        return self.ids[:, 1:][self.compared[:, 1:]]

    @property
    def scored(self) -> torch.Tensor:
        """`targets` 가운데 답인지 [비교하는 토큰의 수] bool."""
        return self.answer[:, 1:][self.compared[:, 1:]]


@dataclass(frozen=True)
class Proof:
    """검산의 결과. merge-report.json의 `proof`다.

    Attributes:
        prompts, tokens: 비교한 행과 토큰의 수.
        data, absent_data: 행을 읽은 파일과, 학습한 데이터인데 찾지 못한 파일.
        merge_onto: 합친 바탕(original, quantized).
        top1: 가장 높은 토큰이 쓰려던 것과 같은 비율.
        kl: 쓰려던 것과의 KL. 토큰당 평균 nat다.
        largest_gap: 쓰려던 것과의 logit 차이의 최댓값.
        base_loss, trained_loss, merged_loss: 답의 토큰의 평균 loss. 차례로 NF4로 올린 기반 모델, 배운 모델, 합친 모델.
        retained: 배운 개선 가운데 남은 몫. 개선이 거의 없으면 None이다.
        kl_most, top1_most: KL이 큰 토큰 십분의 일을 뺀 나머지의 것. 반올림이 전문가를 바꾸어 고르는 토큰이 드물게 있다.
    """

    prompts: int
    tokens: int
    data: str
    absent_data: str | None
    merge_onto: str
    top1: float
    kl: float
    largest_gap: float
    base_loss: float
    trained_loss: float
    merged_loss: float
    retained: float | None
    kl_most: float = 0.0
    top1_most: float = 1.0


def read_windows(job: Job) -> Windows:
    """학습에서 검증에 쓴 행들. logits가 메모리에 맞도록 답 둘레의 토큰만 비교한다.

    run.json이 없거나 거기 적힌 데이터를 찾지 못하면 함께 든 데이터의 행이다(찾지 못한 것은 `absent`에 남는다). 검증하지
    않은 학습이면 학습한 데이터의 5%를 본다.
    """
    tokenizer = load_tokenizer(job.tokenizer_folder)
    info = adapter.read_prompt_info(job.adapter) or adapter.read_prompt_info(job.root)
    settings = _run_settings(job.root)
    data, absent = find_recorded(str(settings.get("data_path", DATA_DEMO))), None
    if not Path(data).is_file():
        data, settings, absent = str(DATA_DEMO), {}, data
    prompter = make_prompter(info.template if info else "default", tokenizer)
    end_id = answer_end_id(tokenizer, prompter)
    encoder = Encoder(tokenizer, end_id)
    documents = dataset.load_documents(data, prompter, encoder, settings.get("cutoff_len", 1024), end_id,
                                       settings.get("cache_dir"))
    held_out = held_out_members(documents, settings.get("val_set_size") or 5, settings.get("seed", 42))
    chosen = (held_out if len(held_out) else np.arange(len(documents)))[:N_PROMPTS]  # 모두 같은 행이면 나뉘지 않는다
    config = load_config(job.base.path)
    longest = int(documents.lengths()[chosen].max())
    limit = config.get("max_position_embeddings") or longest  # 자리의 표(learned, ALiBi) 밖을 읽지 않는다
    length = min(CONTEXT // len(chosen), longest, limit)
    budget = min(CONTEXT, max(LEAST_COMPARED, LOGIT_BYTES // (4 * config["vocab_size"])))
    rows = [read_question(documents, member) for member in chosen]
    return cut_windows(rows, len(encoder.head), length, budget // len(chosen), end_id, str(data), absent)


def cut_windows(rows: Sequence[Question], n_head: int, length: int, n_compared: int, end_id: int, source: str,
                absent: str | None = None) -> Windows:
    """행마다 `length` 토큰까지 읽고, 질문의 끝과 답에서 `n_compared` 토큰까지 비교한다. 3분의 2는 답의 몫이다.

    길면 글머리의 토큰 `n_head`개를 남기고 질문의 앞을 덜어 낸다. 글머리와 질문이 없는 글은 배운 글이 아니어서, 16비트의
    반올림에도 크게 흔들린다.
    """
    ids = np.full((len(rows), length), end_id, np.int64)
    compared, answer = np.zeros((2, len(rows), length), bool)
    for row, asked in enumerate(rows):
        first = max(0, len(asked.prompt) - n_compared // 3)  # 비교하는 첫 토큰
        tokens = np.concatenate([asked.prompt, asked.answer])[: first + n_compared]
        dropped = max(0, len(tokens) - length)
        tokens = np.concatenate([tokens[:n_head], tokens[n_head + dropped :]])
        ids[row, : len(tokens)] = tokens
        compared[row, max(n_head, first - dropped) : len(tokens)] = True
        answer[row, max(n_head, len(asked.prompt) - dropped) : len(tokens)] = True
    return Windows(*map(torch.from_numpy, (ids, compared, answer)), source, absent)


def prove(job: Job, windows: Windows, merged: Path) -> Proof:
    """디스크의 합친 모델을 쓰려던 것(합칠 바탕 + 어댑터), 배운 모델(NF4로 올린 기반 모델 + 어댑터)과 비교한 결과.

    Args:
        windows: `read_windows`가 읽은 것. 데이터의 잘못은 합친 것을 쓰기 전에 드러나야 하므로 먼저 읽어 둔다.
        merged: 합친 모델의 폴더.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    written = open_model_folder(merged)
    quantised, rounded = writer.quantised_entries(job), writer.quantised_built(job)

    def logits(kind: str, updates: dict) -> torch.Tensor:
        """기반 모델을 원래 값(original)이나 학습할 때처럼 올린 값(quantized)으로 읽은 것에 `updates`를 얹은 logit
        [비교하는 토큰의 수, vocab].
        """
        trained = kind == "quantized"
        source = streamed.Source(job.base, job.disk, lambda entry: job.base_rows(entry, quantised if trained else {}),
                                 updates, job.trained_dtype if trained else torch.float32,
                                 rounded if trained else frozenset())
        return _logits(source, windows, device)

    asked = logits(job.onto, job.updates)
    actual = _logits(streamed.Source(written, diskmap.read(written), streamed.read_plain, {}), windows, device)
    compared = _compare(asked, actual)
    merged_loss = _answer_loss(actual, windows)
    trained = asked if job.onto == "quantized" else logits("quantized", job.updates)
    trained_loss = _answer_loss(trained, windows)
    del asked, actual, trained
    base_loss = _answer_loss(logits("quantized", {}), windows)
    gain = base_loss - trained_loss
    retained = (base_loss - merged_loss) / gain if gain >= MIN_GAIN else None
    return Proof(len(windows.ids), len(windows.targets), windows.source, windows.absent, job.onto, **compared,
                 base_loss=base_loss, trained_loss=trained_loss, merged_loss=merged_loss, retained=retained)


def judge(proof: Proof) -> None:
    """쓴 것이 쓰려던 것과 다르면 이유를 말한다.

    Raises:
        UsageError: 기준에 못 미친다.
    """
    nearly_tied = 1 / proof.tokens  # 두 토큰의 logit이 거의 같으면 반올림이 고른다. 하나는 그럴 수 있다
    if not (proof.top1_most >= MIN_TOP1 - nearly_tied and proof.kl_most <= MAX_KL):
        raise UsageError(f"합친 모델이 기반 모델 + 어댑터와 다르다. {describe(proof)} (기준: 같은 첫 토큰 "
                         f"{MIN_TOP1:.0%} 이상, KL {MAX_KL:g} 이하). 디스크와 어댑터를 살피고 다시 합친다")


def warnings(proof: Proof) -> list[str]:
    """합친 것은 멀쩡하지만 사용자가 알아야 하는 것들."""
    said = []
    if proof.absent_data:
        said.append(f"학습한 데이터를 찾지 못해({proof.absent_data}) 함께 든 데이터({proof.data})로 검산했다. "
                    "남은 개선은 그 데이터의 것이다")
    lost = proof.merged_loss - proof.trained_loss
    gain = max(0.0, proof.base_loss - proof.trained_loss)
    if lost > max((1 - MIN_RETAINED) * gain, MIN_GAIN):
        how = ("기반 모델이 NF4로 반올림하면 많이 달라지는 모델이다. 배운 모델 그대로 합치려면 새 폴더에 "
               "--merge_onto quantized로 다시 합친다" if proof.merge_onto == "original" else
               "16비트로 적으면서 잃었다. generate.py --peft_root로 어댑터를 얹어 쓴다")
        said.append(f"합친 모델이 배운 것을 잃었다. 답의 loss가 배운 모델은 {proof.trained_loss:.3f}인데 "
                    f"합친 모델은 {proof.merged_loss:.3f}다(학습 전 {proof.base_loss:.3f}). {how}")
    return said


def describe(proof: Proof) -> str:
    """검산의 결과 한 줄."""
    kept = "개선이 거의 없어 따지지 않음" if proof.retained is None else f"{proof.retained:.1%}"
    return (f"프롬프트 {proof.prompts}개, 토큰 {proof.tokens}개. "
            f"쓴 것과 쓰려던 것: 같은 첫 토큰 {proof.top1:.1%}, 평균 KL {proof.kl:.1e}, "
            f"가장 큰 logit 차이 {proof.largest_gap:.3f}. 배운 모델과: 답의 loss "
            f"{proof.trained_loss:.3f} -> {proof.merged_loss:.3f}(학습 전 {proof.base_loss:.3f}), "
            f"남은 개선: {kept}")


@torch.no_grad()
def _logits(source: streamed.Source, windows: Windows, device: torch.device) -> torch.Tensor:
    """[비교하는 토큰의 수, vocab]의 logit(fp32, CPU). 길이를 맞추려 채운 뒤쪽은 앞을 바꾸지 못한다."""
    model = streamed.build(source, device)
    ids = windows.ids.to(device)  # [n, length]
    chosen = windows.compared[:, 1:].to(device)  # 자리 t의 은닉값이 토큰 t + 1을 예측하므로 한 칸 당긴다

    def choose(module, inputs: tuple) -> tuple:
        """출력 행렬에는 비교할 자리의 은닉값만 준다. logits 전체 [n, length, vocab]를 만들지 않는다."""
        return (inputs[0][:, :-1][chosen], *inputs[1:])

    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(choose)
    positions = torch.arange(ids.shape[1], device=device).expand(ids.shape)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return (logits if logits.ndim == 2 else logits[:, :-1][chosen]).cpu()


def _compare(expected: torch.Tensor, actual: torch.Tensor) -> dict:
    """두 logit [토큰, vocab]의 비교. KL(expected || actual) = sum_v p_v (log p_v - log q_v)의 토큰 평균이다.

    Raises:
        UsageError: 합친 모델의 logit이 유한하지 않다.
    """
    same, gap, kls = [], 0.0, []
    for one, other in zip(expected.split(ROWS), actual.split(ROWS), strict=True):
        same.append(one.argmax(-1) == other.argmax(-1))
        # KL이 1e-6이면 log p - log q는 fp32가 잃는 자리다. fp64로 계산한다
        log_p, log_q = (F.log_softmax(logits.double(), -1) for logits in (one, other))  # [ROWS, vocab]
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        gap = max(gap, (one - other).abs().max().item())
        if not torch.isfinite(other).all():
            raise UsageError("합친 모델의 logit에 NaN이나 inf가 있다. 기반 모델과 어댑터를 살핀다")
    kl, order = torch.cat(kls).sort()  # [토큰], 작은 것부터
    agreed = torch.cat(same).double()[order]  # 첫 토큰이 같으면 1
    dropped = len(kl) // 10 + 1 if len(kl) > 1 else 0
    most = slice(0, len(kl) - dropped)
    mean, mean_of_most = (max(0.0, each.mean().item()) for each in (kl, kl[most]))  # 반올림으로 -1e-17이 되기도 한다
    return {"top1": agreed.mean().item(), "top1_most": agreed[most].mean().item(), "kl": mean, "kl_most": mean_of_most,
            "largest_gap": gap}


def _answer_loss(logits: torch.Tensor, windows: Windows) -> float:
    """답의 토큰마다의 평균 음의 로그 가능도(nat). logits는 [비교하는 토큰의 수, vocab]이다."""
    return F.cross_entropy(logits[windows.scored], windows.targets[windows.scored]).item()


def _run_settings(root: Path) -> dict:
    file = root / RUN_FILE
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"읽지 못했다: {file}. 깨진 것이면 지운다. 그러면 함께 든 데이터로 검산한다") from None
