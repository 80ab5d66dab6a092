"""학습하는 계산이 모델의 계산과 같은지를 첫 step 전에 확인하고, 다르면 같은 길로 내려간다.

micro-step은 블록을 묶고, 손실을 조각으로 구하고, 커널을 쓴다. 어느 것이든 모델의 `forward`가 하는 일을 하나라도
빠뜨리면 학습은 조용히 틀린다. 그래서 실제 데이터의 블록 하나에서 micro-step의 손실과 LoRA gradient를 참값(`truth`)과
비교하고, 한 블록에 든 문서들이 서로를 보지 못함을 확인한다.

16비트로 계산한 둘이 다르면 식이 틀린 것일 수도, 반올림에 크게 흔들리는 모델일 수도 있다. 그때는 같은 길을 fp32로 계산해
식을 보고(`is_exact`), 16비트의 값이 fp32에서 벗어난 정도를 모델의 forward가 벗어난 정도와 비교한다(`is_as_near`).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from utils.console import detail
from utils.data.blocks import IGNORE, document_ids
from utils.errors import UsageError, first_line
from utils.model import vram
from utils.train.dropout import without_dropout
from utils.train.micro_step import Batch, RunningStep, Step
from utils.train.truth import NO_MEMORY, Truth, find_exact, find_truth, in_fp32, nudged, take_gradients

SEED = (1, 1)  # 비교에서는 dropout을 끄므로 결과에 영향이 없다
# 계산 dtype -> (손실, gradient)의 허용 오차(비율). 묶으면 행렬 곱의 모양이 달라져 반올림이 다르다
TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.float16: (2e-3, 0.15), torch.bfloat16: (5e-3, 0.25)}
SLACK = 2.0  # 두 길이 저마다 반올림하므로 fp32에서 벗어난 정도도 다르다. Gemma 3 270M에서 잰 것은 많아야 1.8배였다
LOST = 0.5  # 모델의 16비트 gradient가 이보다 틀리면 비교할 수 없다
SAME_LOSS = 5e-7  # 앞 문서를 바꾸어도 뒤 문서의 손실이 이 비율보다 달라지지 않아야 한다


@dataclass(frozen=True)
class Measured:
    """micro-step이 참값의 두 블록에서 낸 값. 뜻과 모양은 `Truth`와 같다."""

    loss: float
    short_loss: float
    gradients: dict[str, torch.Tensor]


def choose_step(candidates: Sequence[Callable[[], Step]], model: nn.Module, dataset, max_documents: int,
                device: torch.device, say: Callable[[str], None], reject: Callable[[], None] = lambda: None) -> Step:
    """모델과 같은 값을 내는 첫 micro-step. 앞의 것이 다르면 이유를 말하고 다음 것으로 내려간다.

    Args:
        candidates: micro-step을 만드는 함수들. 빠른 것부터 적는다.
        model: PEFT로 감싼 모델. 배우는 가중치마다 `.grad`가 있다.
        dataset: 학습할 블록들.
        max_documents: 블록 하나에 든 문서의 최대 수.
        reject: 고르지 않은 micro-step이 모델에 해 둔 것을 되돌리는 함수.

    Raises:
        UsageError: 어느 길로도 모델과 같은 값이 나오지 않는다. 모델의 forward를 부를 수 없다.
    """
    try:
        with vram.shortage():
            truth = find_truth(model, dataset, max_documents, device)
    except (torch.OutOfMemoryError, UsageError):
        raise
    except Exception as error:
        raise UsageError(f"이 모델은 글만 주어 계산할 수 없어 학습하지 않는다({first_line(error)})") from error
    free_cache(device)
    exact, reason = None, ""
    for make in candidates:
        step = make()
        measured, reason = disagreement(step, model, truth, device)
        step.release()
        if reason is not None:
            reject()
            if measured is not None and model_dtype(model) is not torch.float32:
                exact = exact or find_exact(model, dataset, max_documents, device)
                free_cache(device)
                if exact is not None and is_as_near(measured, truth, exact) and is_exact(make, model, exact, device):
                    detail(f"{reason}. 16비트의 반올림 때문이고 fp32로 계산하면 같으므로 이 길을 쓴다")
                    step, reason = make(), None
        if reason is None:
            del truth, exact
            forget_comparison(device)
            return step
        say("빠른 계산의 값이 모델과 맞지 않아 다른 길을 쓴다. 결과는 같고 더 느리다(이유: --verbose True)")
        detail(reason)
    raise UsageError(f"이 모델의 학습 계산이 모델의 forward와 달라 학습하지 않는다. {reason}. 다른 기반 모델을 쓴다")


def disagreement(step: Step, model: nn.Module, truth: Truth,
                 device: torch.device) -> tuple[Measured | None, str | None]:
    """(`step`의 값, 참값과 다르면 무엇이 얼마나 다른지). 계산하지 못했으면 값이, 같으면 이유가 None이다."""
    measured = None
    while measured is None:
        try:
            with vram.shortage():
                measured = measure(step, model, truth, device)
        except torch.OutOfMemoryError:
            pass  # 덜 쓰는 길로 다시 잰다. 오류가 중간값을 붙들므로 메모리는 except의 밖에서 놓는다
        except UsageError as error:
            return None, str(error)
        except Exception as error:  # 부르는 모양이 다른 구조다. 다음 길이 그것을 받는다
            take_gradients(model)
            return None, f"{step.path}: 계산하지 못했다({first_line(error)})"
        if measured is None:
            take_gradients(model)
            step.release()
            torch.cuda.empty_cache()
            if not step.recompute_more():
                raise UsageError(NO_MEMORY)
    loss_limit, gradient_limit = TOLERANCE[model_dtype(model)]
    for ours, theirs, size in ((measured.loss, truth.loss, truth.loss),
                               (measured.short_loss, truth.short_loss, truth.short_size)):
        if not abs(ours - theirs) <= loss_limit * size:
            return measured, f"{step.path}: 손실이 모델의 forward에서는 {theirs:.4f}인데 {ours:.4f}다"
    apart, name = furthest(measured.gradients, truth.gradients)
    if not apart <= gradient_limit:
        return measured, f"{step.path}: {name}의 gradient가 모델의 forward와 {apart:.0%} 다르다"
    return measured, None


def is_as_near(measured: Measured, truth: Truth, exact: Truth) -> bool:
    """16비트의 `measured`가 16비트 모델의 forward만큼 fp32의 값에 가까운지.

    글머리 토큰이 없는 Gemma 3 270M의 짧은 문서에서는 모델의 bf16 gradient가 fp32와 14~43% 다르다. 그런 모델에서는 옳은
    길도 모델과 그만큼 다르므로, 둘 사이의 거리가 아니라 저마다 fp32에서 벗어난 거리를 비교한다.
    """
    if exact.short["input_ids"].shape != truth.short["input_ids"].shape:  # 메모리가 모자라 더 짧은 글로 쟀다
        return False
    limit = TOLERANCE[torch.bfloat16][0]
    for ours, theirs, right, size in ((measured.loss, truth.loss, exact.loss, exact.loss),
                                      (measured.short_loss, truth.short_loss, exact.short_loss, exact.short_size)):
        if not abs(ours - right) <= SLACK * max(abs(theirs - right), limit * size):
            return False
    # tensor 하나의 어긋남은 크게 흔들리므로 층마다 같은 자리에 있는 것들을 이어서 본다. 커널의 잘못은 모든 층에서 난다
    places: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in exact.gradients.items():
        places.setdefault(re.sub(r"\d+", "", name), {})[name] = value
    return overall(truth.gradients, exact.gradients) <= LOST and all(
        overall(measured.gradients, place) <= SLACK * overall(truth.gradients, place) for place in places.values())


def is_exact(make: Callable[[], Step], model: nn.Module, exact: Truth, device: torch.device) -> bool:
    """같은 길을 fp32로 계산하면 fp32의 참값과 같은지. 반올림이 작아 식의 잘못이 그대로 드러난다."""
    try:
        with in_fp32(model):
            step = make()
            try:
                return disagreement(step, model, exact, device)[1] is None
            finally:
                step.release()
    except (torch.OutOfMemoryError, UsageError):  # 확인하지 못한 길은 쓰지 않는다
        return False


def overall(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """gradient를 모두 이은 벡터의 차이의 비율 |a - b| / |b|. 이름 -> 그 가중치의 모양인 fp32."""
    # 이은 벡터의 크기 |v|^2은 조각마다의 |v_i|^2의 합이다
    apart = sum(float((ours[name] - value).norm()) ** 2 for name, value in theirs.items())
    size = sum(float(value.norm()) ** 2 for value in theirs.values())
    return math.sqrt(apart) / max(math.sqrt(size), 1e-12)


def measure(step: Step, model: nn.Module, truth: Truth, device: torch.device) -> Measured:
    """참값의 두 블록을 `step`으로 계산하고, 문서가 서로를 보지 않는지도 본다.

    Raises:
        UsageError: 문서가 서로를 본다.
    """
    with nudged(model), without_dropout(model):
        block = {**truth.block, **device_keys(device)}
        # 시드가 없으면 손으로 쓴 길도 dropout을 걸지 않고, 참값은 합의 gradient이므로 아무것도 곱하지 않는다
        short = {**truth.short, "keys": None, "factor": torch.ones((), device=device)}
        loss = float(step.evaluate(block))
        short_loss = float(step.train(short).flatten()[0])
        gradients = take_gradients(model)
        check_options(step, model, short)
    rows = model.get_input_embeddings().weight.shape[0]
    check_isolation(step, rows, 1, max(8, truth.short["input_ids"].shape[1]), device, device_keys(device))
    return Measured(loss, short_loss, gradients)


def check_options(step: Step, model: nn.Module, short: Batch) -> None:
    """batch를 보고 고르는 길(`Step.options`)이 보통의 길과 같은 gradient를 내는지. 첫 문서만 배우는 블록에서 본다.

    Raises:
        UsageError: 고른 길의 gradient가 다르다.
    """
    first = document_ids(short["position_ids"]) == 1
    alone = {**short, "labels": short["labels"].where(first, IGNORE)}
    alone = {name: value for name, value in alone.items() if name not in ("reference", "beta")}
    options = step.options({name: alone[name].cpu() for name in ("labels", "position_ids")})
    if not any(options.values()):
        return
    gradients = []
    for chosen in ({}, options):
        step.train(alone, **chosen)
        gradients.append(take_gradients(model))
    apart, name = furthest(gradients[1], gradients[0])
    if not apart <= TOLERANCE[model_dtype(model)][1]:
        raise UsageError(f"{step.path}: 문서가 하나인 블록에서 {name}의 gradient가 {apart:.0%} 다르다")


def check_isolation(step: Step | RunningStep, vocab: int, rows: int, block: int, device: torch.device,
                    extra: Batch) -> None:
    """한 블록에 든 두 문서가 서로를 보지 못함을 실제 micro-step으로 확인한다.

    첫 문서의 내용을 바꾸어도 둘째 문서의 손실은 그대로여야 하고, 둘째 문서의 첫 토큰을 바꾸면 달라져야 한다.

    Args:
        step: `evaluate`가 있는 micro-step(`Step`이나 `RunningStep`).
        vocab: 입력 embedding의 행 수.
        rows, block: 만들 글의 모양 [rows, block].
        extra: batch에 더할 것(dropout의 시드).

    Raises:
        UsageError: 문서가 서로를 본다. 조용히 틀린 학습이 되므로 시작하지 않는다.
    """
    cut = block // 2  # 앞의 cut토큰이 첫 문서, 나머지가 둘째 문서다
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab, (rows, block), generator=generator)  # int64
    labels = tokens.clone()
    labels[:, :cut + 1] = IGNORE  # 둘째 문서의 둘째 토큰부터만 손실에 든다
    two_documents = torch.cat([torch.arange(cut), torch.arange(block - cut)])
    positions = two_documents.expand(rows, block).contiguous()
    other_first, other_own = tokens.clone(), tokens.clone()
    other_first[:, :cut] = (other_first[:, :cut] + 1) % vocab
    other_own[:, cut] = (other_own[:, cut] + 1) % vocab
    losses = []
    for variant in (tokens, other_first, other_own):
        batch = {"input_ids": variant, "labels": labels, "position_ids": positions, **extra}
        losses.append(float(step.evaluate({name: value.to(device) for name, value in batch.items()})))
    plain, first_changed, own_changed = losses
    # 가려진 글은 0을 더할 뿐이므로 같은 모양의 계산은 거의 비트까지 같다
    leaks = abs(first_changed - plain) > SAME_LOSS * abs(plain)
    if leaks or own_changed == plain:
        raise UsageError(f"이 모델({step.path})은 한 블록에 든 문서들을 떼어 놓지 못해 묶어서 학습할 수 없다: "
                         f"앞 문서를 바꾸자 손실이 {plain:.4f}에서 {first_changed:.4f}로, 제 첫 토큰을 바꾸자 "
                         f"{own_changed:.4f}로 바뀌었다")


def free_cache(device: torch.device) -> None:
    """모델의 forward가 쓰고 놓은 VRAM을 돌려준다.

    모델의 forward는 중간값을 모두 간직하므로 micro-step과 다른 크기의 메모리를 잡는다. 남겨 두면 micro-step의 버퍼가 그
    틈에 들어가지 못해 더 잡는다.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_comparison(device: torch.device) -> None:
    """비교가 쓰던 VRAM을 돌려주고 최댓값을 새로 센다. 참값과 micro-step의 버퍼를 놓은 다음에 부른다.

    그래야 run.json의 `peak_vram_gb`와 계획의 예측이 비교가 아니라 학습을 잰다.
    """
    free_cache(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """(가장 많이 다른 tensor의 차이의 비율, 그 이름). 아주 작은 gradient는 가장 큰 것의 1%를 기준으로 잰다."""
    norms = {name: float(value.norm()) for name, value in theirs.items()}
    floor = max(norms.values(), default=0.0) / 100 or 1e-12
    gaps = {name: float((ours[name] - value).norm()) for name, value in theirs.items()}
    apart = {name: gap / max(norms[name], floor) for name, gap in gaps.items()}
    # NaN은 무엇과 비교해도 거짓이라 max가 지나칠 수 있다. 가장 나쁜 것으로 친다
    name = max(apart, key=lambda key: math.inf if math.isnan(apart[key]) else apart[key])
    return apart[name], name


def model_dtype(model: nn.Module) -> torch.dtype:
    """계산하는 dtype. LoRA는 fp32로 두므로 얼어 있는 norm이나 embedding에서 본다."""
    kinds = {parameter.dtype for parameter in model.parameters()
             if not parameter.requires_grad and parameter.is_floating_point()}
    return next((kind for kind in (torch.float16, torch.bfloat16) if kind in kinds), torch.float32)


def device_keys(device: torch.device) -> dict[str, torch.Tensor]:
    """블록 하나의 dropout 시드: keys [1, 2] int32."""
    return {"keys": torch.tensor([SEED], dtype=torch.int32, device=device)}
