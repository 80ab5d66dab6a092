"""학습하는 계산이 모델의 계산과 같은지를 첫 step 전에 확인하고, 다르면 같은 길로 내려간다.

micro-step은 블록을 묶고, 손실을 조각으로 구하고, 커널을 쓴다. 어느 것이든 모델의 `forward`가 하는 일을 하나라도
빠뜨리면 학습은 조용히 틀린다. 그래서 실제 데이터의 블록 하나에서, 모델을 문서마다 따로 불러 얻은 손실과 LoRA
gradient를 micro-step의 것과 비교한다. 비교하는 동안 LoRA B에 작은 수를 더해 둔다: 처음의 B는 0이라 A의 gradient와
어댑터의 배율이 드러나지 않는다.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from utils.data.blocks import IGNORE, shifted_targets
from utils.errors import UsageError
from utils.model.loss import HEAD_CHUNK
from utils.train.graph_step import check_isolation

LOSS_TOKENS = 2048  # 손실을 비교하는 글의 가장 긴 길이. backward가 없어 메모리를 거의 쓰지 않는다
GRADIENT_TOKENS = 256  # gradient를 비교하는 글의 길이. 모델의 forward는 중간값을 모두 간직한다
LOGIT_VALUES = 1 << 25  # 한 번에 만드는 logits의 수. fp32로 128 MiB
LEAST_TOKENS = 16  # 이보다 짧은 글로는 비교하지 않는다
NUDGE = 0.02  # 비교하는 동안 LoRA B에 더하는 수의 크기
SEED = (1, 1)  # 비교에서는 dropout을 끄므로 결과에 영향이 없다
# 계산 dtype -> (손실, gradient)의 허용 오차(비율). 묶으면 행렬 곱의 모양이 달라져 반올림이 다르다
TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.float16: (2e-3, 0.15), torch.bfloat16: (5e-3, 0.25)}
NO_MEMORY = "메모리가 모자라 학습을 시작할 수 없다. --cutoff_len을 줄이거나 더 작은 모델을 쓴다"


@dataclass(frozen=True)
class Truth:
    """모델을 문서마다 따로 불러 얻은 참값.

    Attributes:
        block: 손실을 비교할 블록. `input_ids`, `labels`, `position_ids` 모두 [1, tokens].
        loss: 그 블록의 음의 로그 가능도의 합.
        short: gradient를 비교할 짧은 블록.
        short_loss: 짧은 블록의 음의 로그 가능도의 합.
        gradients: 이름 -> 짧은 블록에서의 LoRA gradient.
    """

    block: dict[str, torch.Tensor]
    loss: float
    short: dict[str, torch.Tensor]
    short_loss: float
    gradients: dict[str, torch.Tensor]


def choose_step(candidates: Sequence[Callable[[], object]], model: nn.Module, dataset, max_documents: int,
                device: torch.device, say: Callable[[str], None], reject: Callable[[], None] = lambda: None):
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
    reason = ""
    try:
        truth = find_truth(model, dataset, max_documents, device)
    except (torch.OutOfMemoryError, UsageError):
        raise
    except Exception as error:
        raise UsageError(f"이 모델은 글만 주어 계산할 수 없어 학습하지 않는다({first_line(error)})") from error
    for make in candidates:
        step = make()
        reason = disagreement(step, model, truth, device)
        step.release()
        if reason is None:
            return step
        reject()
        say(f"{reason}. 다른 길을 쓴다")
    raise UsageError(f"이 모델의 학습 계산이 모델의 forward와 달라 학습하지 않는다. {reason}. 다른 기반 모델을 쓴다")


def disagreement(step, model: nn.Module, truth: Truth, device: torch.device) -> str | None:
    """`step`의 값이 참값과 다르면 어느 길의 무엇이 얼마나 다른지. 같으면 None."""
    loss_limit, gradient_limit = TOLERANCE[model_dtype(model)]
    try:
        with nudged(model), without_dropout(model):
            block = {**truth.block, **device_keys(device)}
            short = {**truth.short, "keys": None}  # 씨앗이 없으면 손으로 쓴 길도 dropout을 걸지 않는다
            loss = float(step.evaluate(block))
            one = torch.ones((), device=device)
            short_loss = float(step.train({**short, "factor": one}))
            gradients = take_gradients(model)
        rows = model.get_input_embeddings().weight.shape[0]
        check_isolation(step, rows, 1, max(8, truth.short["input_ids"].shape[1]), device, device_keys(device))
    except torch.OutOfMemoryError:
        take_gradients(model)
        step.release()
        torch.cuda.empty_cache()
        if not step.recompute_more():
            raise UsageError(NO_MEMORY) from None
        return disagreement(step, model, truth, device)
    except UsageError as error:
        return str(error)
    except Exception as error:  # 부르는 모양이 다른 구조다. 다음 길이 그것을 받는다
        take_gradients(model)
        return f"{step.path}: 계산하지 못했다({first_line(error)})"
    for ours, theirs in ((loss, truth.loss), (short_loss, truth.short_loss)):
        if not abs(ours - theirs) <= loss_limit * abs(theirs):
            return f"{step.path}: 손실이 모델의 forward에서는 {theirs:.4f}인데 {ours:.4f}다"
    apart, name = furthest(gradients, truth.gradients)
    if not apart <= gradient_limit:
        return f"{step.path}: {name}의 gradient가 모델의 forward와 {apart:.0%} 다르다"
    return None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


def find_truth(model: nn.Module, dataset, max_documents: int, device: torch.device) -> Truth:
    """실제 블록 하나와, 거기서 모델을 문서마다 따로 불러 얻은 손실과 gradient.

    Raises:
        UsageError: 모델이 뒤의 글을 본다.
    """
    documents, longest = take_documents(dataset), len(dataset[0]["input_ids"])
    block = make_block(documents, LOSS_TOKENS, min(LOSS_TOKENS, longest), max_documents, device)
    training, tokens = model.training, min(GRADIENT_TOKENS, longest)
    model.eval()
    take_gradients(model)
    with nudged(model):
        with torch.no_grad():
            require_causal(model, block["input_ids"][:, :32])
            loss = float(sum(plain_loss(model, document) for document in split_documents(block)))
        while True:
            short = make_block(documents, tokens // 2, tokens, max_documents, device)
            try:
                short_loss = plain_backward(model, short)
                break
            except torch.OutOfMemoryError:  # 재계산해야 들어가는 카드에서는 더 짧은 글로 비교한다
                take_gradients(model)
                torch.cuda.empty_cache()
                tokens //= 4
                if tokens < LEAST_TOKENS:
                    raise UsageError(NO_MEMORY) from None
    model.train(training)
    return Truth(block, loss, short, short_loss, take_gradients(model))


def plain_backward(model: nn.Module, block: dict[str, torch.Tensor]) -> float:
    """문서마다 따로 낸 gradient를 `.grad`에 더하고 음의 로그 가능도의 합을 돌려준다."""
    total = 0.0
    with torch.enable_grad():
        for document in split_documents(block):
            nll = plain_loss(model, document)
            nll.backward()
            total += float(nll.detach())
    return total


def require_causal(model: nn.Module, ids: torch.Tensor) -> None:
    """마지막 토큰을 바꾸어도 앞의 logits가 그대로인지 본다. 뒤의 글을 보는 모델(BERT)은 답을 베끼게 된다."""
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % model.get_input_embeddings().weight.shape[0]
    ours, theirs = (model(input_ids=each, use_cache=False).logits[0, :-1].float() for each in (ids, other))
    if (ours - theirs).abs().max() > 1e-4 * ours.abs().max():
        raise UsageError("이 모델은 뒤의 글을 보고 앞을 맞힌다. 글을 잇는 모델(causal LM)이 아니라 학습하지 않는다")


def plain_loss(model: nn.Module, document: dict[str, torch.Tensor]) -> torch.Tensor:
    """문서 하나만 준 모델의 logits에서 구한 음의 로그 가능도의 합. 어휘가 크면 logits를 몇 토큰씩 얻는다."""
    ids, targets = document["input_ids"], shifted_targets(document["labels"])
    vocab = model.get_input_embeddings().weight.shape[0]
    at_once = max(1, LOGIT_VALUES // vocab)
    if torch.is_grad_enabled() or ids.shape[1] <= at_once or not keeps_some_logits(model):
        return sum_nll(model(input_ids=ids, use_cache=False).logits, targets)
    total = 0.0
    for kept in torch.arange(ids.shape[1], device=ids.device).split(min(at_once, HEAD_CHUNK)):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
        total = total + sum_nll(logits, targets[:, kept])
    return total


def sum_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum",
                                       ignore_index=IGNORE)


def keeps_some_logits(model: nn.Module) -> bool:
    """`forward`가 logits를 얻을 자리를 고르게 해 주는가."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def take_documents(dataset) -> list[torch.Tensor]:
    """블록 몇 개에 든 문서들. 가장 긴 문서가 든 블록과 짧은 문서가 든 블록을 모두 본다."""
    documents = []
    for index in sorted({0, len(dataset) // 2, len(dataset) - 1}):
        block = {name: dataset[index][name][None] for name in ("input_ids", "labels", "position_ids")}
        documents += [part["input_ids"][0] for part in split_documents(block)
                      if (part["labels"] != IGNORE).any()]
    return documents


def split_documents(block: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """블록의 문서를 하나씩 [1, tokens]로 나눈다."""
    starts = torch.nonzero(block["position_ids"][0] == 0)[:, 0].tolist()
    for start, end in pairwise([*starts, block["position_ids"].shape[1]]):
        yield {name: value[:, start:end] for name, value in block.items()}


def make_block(documents: list[torch.Tensor], longest: int, total: int, max_documents: int,
               device: torch.device) -> dict[str, torch.Tensor]:
    """문서들을 `longest`토큰까지 잘라 `total`토큰까지 이어 붙인 블록. 첫 토큰 말고는 모두 정답이다."""
    pieces, room = [], total
    for document in documents[:max(1, max_documents)]:
        piece = document[:min(longest, room)]
        if len(piece) < 2:
            break
        pieces.append(piece)
        room -= len(piece)
    labels = torch.cat([torch.cat([piece.new_full((1,), IGNORE), piece[1:]]) for piece in pieces])
    block = {"input_ids": torch.cat(pieces), "labels": labels,
             "position_ids": torch.cat([torch.arange(len(piece)) for piece in pieces])}
    return {name: value[None].to(device) for name, value in block.items()}


def device_keys(device: torch.device) -> dict[str, torch.Tensor]:
    return {"keys": torch.tensor([SEED], dtype=torch.int32, device=device)}


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def take_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """gradient를 꺼내고 0으로 지운다. `.grad`의 주소는 그대로다."""
    taken = {}
    for name, parameter in trainable(model):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        taken[name] = parameter.grad.detach().clone()
        parameter.grad.zero_()
    return taken


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """(가장 많이 다른 tensor의 차이의 비율, 그 이름). 아주 작은 gradient는 가장 큰 것의 1%를 기준으로 잰다."""
    norms = {name: float(value.norm()) for name, value in theirs.items()}
    floor = max(norms.values(), default=0.0) / 100 or 1e-12
    apart = {name: float((ours[name] - value).norm()) / max(norms[name], floor) for name, value in theirs.items()}
    name = max(apart, key=lambda key: math.inf if math.isnan(apart[key]) else apart[key])
    return apart[name], name


def model_dtype(model: nn.Module) -> torch.dtype:
    """계산하는 dtype. LoRA는 fp32로 두므로 얼어 있는 norm이나 embedding에서 본다."""
    kinds = {parameter.dtype for parameter in model.parameters()
             if not parameter.requires_grad and parameter.is_floating_point()}
    return next((kind for kind in (torch.float16, torch.bfloat16) if kind in kinds), torch.float32)


@contextlib.contextmanager
def nudged(model: nn.Module) -> Iterator[None]:
    """LoRA B에 작은 수를 더해 두고, 끝나면 비트까지 되돌린다. 모든 프로세스에서 같은 수다."""
    generator = torch.Generator().manual_seed(0)
    kept = [(parameter, parameter.detach().clone()) for name, parameter in trainable(model) if "lora_B" in name]
    try:
        for parameter, value in kept:
            noise = torch.randn(value.shape, generator=generator) * NUDGE
            parameter.data.copy_(value + noise.to(value))
        yield
    finally:
        for parameter, value in kept:
            parameter.data.copy_(value)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """모든 dropout 확률을 0으로 두고, 끝나면 되돌린다. train과 eval에서 같은 값이 나오게 한다."""
    changed: list[tuple[object, str, float]] = []
    for owner in (*model.modules(), *configs_of(model)):
        for name, value in list(vars(owner).items()):
            chance = "drop" in name or (name == "p" and isinstance(owner, nn.Dropout))
            if chance and type(value) is float and value:
                changed.append((owner, name, value))
                setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def configs_of(model: nn.Module) -> list:
    found = {id(module.config): module.config for module in model.modules()
             if hasattr(getattr(module, "config", None), "get_text_config")}
    return list(found.values())
