"""모델을 문서마다 따로 불러 얻은 참값(`Truth`): 실제 블록 하나의 손실과 LoRA gradient.

비교하는 동안 LoRA B에 작은 수를 더해 둔다(`nudged`): 처음의 B는 0이라 A의 gradient와 어댑터의 배율이 드러나지 않는다.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn

from utils.data.blocks import IGNORE, shifted_targets
from utils.errors import UsageError
from utils.model import vram
from utils.model.adapter import base_of
from utils.model.loss import HEAD_CHUNK

LOSS_TOKENS = 2048  # 손실을 비교하는 글의 가장 긴 길이. backward가 없어 메모리를 거의 쓰지 않는다
GRADIENT_TOKENS = 256  # gradient를 비교하는 글의 길이. 모델의 forward는 중간값을 모두 간직한다
LOGIT_VALUES = 1 << 25  # 한 번에 만드는 logits의 수. fp32로 128 MiB
LEAST_TOKENS = 16  # 이보다 짧은 글로는 비교하지 않는다
NUDGE = 0.02  # 비교하는 동안 LoRA B에 더하는 수의 크기
Found = TypeVar("Found")
NO_MEMORY = "메모리가 모자라 학습을 시작할 수 없다. --cutoff_len을 줄이거나 더 작은 모델을 쓴다"


@dataclass(frozen=True)
class Truth:
    """모델을 문서마다 따로 불러 얻은 참값.

    Attributes:
        block: 손실을 비교할 블록. `input_ids`, `labels`, `position_ids` 모두 [1, tokens].
        loss: 그 블록의 음의 로그 가능도의 합(nat).
        short: gradient를 비교할 짧은 블록. 이름과 모양은 `block`과 같고, 선호 쌍이면 `reference`와 `beta`도 있다.
        short_loss: 짧은 블록의 음의 로그 가능도의 합. 선호 쌍이면 DPO의 손실의 합이다.
        short_size: 어긋남을 비율로 볼 때의 기준: 음의 로그 가능도의 합. 선호 쌍이면 거기에 beta를 곱한 것이다.
        gradients: 이름 -> 짧은 블록에서의 LoRA gradient. 모양은 그 가중치와 같고 fp32다.
    """

    block: dict[str, torch.Tensor]
    loss: float
    short: dict[str, torch.Tensor]
    short_loss: float
    short_size: float
    gradients: dict[str, torch.Tensor]


def find_truth(model: nn.Module, dataset, max_documents: int, device: torch.device) -> Truth:
    """실제 블록 하나와, 거기서 모델을 문서마다 따로 불러 얻은 손실과 gradient.

    Raises:
        UsageError: 모델이 뒤의 글을 본다. 가장 짧은 글의 gradient도 메모리에 들어가지 않는다.
    """
    documents, longest = take_documents(dataset), len(dataset[0]["input_ids"])

    def measure_loss(tokens: int) -> tuple[dict[str, torch.Tensor], float]:
        block = make_block(documents, tokens, tokens, max_documents, device)
        with torch.no_grad():
            return block, float(sum(plain_loss(model, document) for document in split_documents(block)))

    def measure_gradients(tokens: int) -> tuple[dict[str, torch.Tensor], float, float]:
        short = make_block(documents, tokens // 2, tokens, max_documents, device)
        if "reference" in dataset[0]:
            short = pair_up(short, dataset[0]["beta"])
        take_gradients(model)
        return short, *plain_backward(model, short)

    training = model.training
    model.eval()
    take_gradients(model)
    with nudged(model):
        with torch.no_grad():
            require_causal(model, make_block(documents, 32, 32, max_documents, device)["input_ids"])
        block, loss = as_long_as_fits(measure_loss, min(LOSS_TOKENS, longest))
        short, short_loss, short_size = as_long_as_fits(measure_gradients, min(GRADIENT_TOKENS, longest))
    model.train(training)
    return Truth(block, loss, short, short_loss, short_size, take_gradients(model))


def as_long_as_fits(measure: Callable[[int], Found], tokens: int) -> Found:
    """`measure(tokens)`. 메모리가 모자라면 더 짧은 글로 잰다. 재계산해야 들어가는 카드에서 그렇다.

    Raises:
        UsageError: 가장 짧은 글도 들어가지 않는다.
    """
    while tokens >= LEAST_TOKENS:
        with contextlib.suppress(torch.OutOfMemoryError), vram.shortage():
            return measure(tokens)
        torch.cuda.empty_cache()  # 오류가 붙들던 중간값까지 돌려준다. 그래서 except의 밖이다
        tokens //= 4
    raise UsageError(NO_MEMORY)


def find_exact(model: nn.Module, dataset, max_documents: int, device: torch.device) -> Truth | None:
    """`find_truth`를 fp32로 다시 구한 것. 메모리가 모자라면 None."""
    try:
        with in_fp32(model):
            return find_truth(model, dataset, max_documents, device)
    except (torch.OutOfMemoryError, UsageError):
        return None


@contextlib.contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """모델을 fp32로 계산하게 하고, 끝나면 되돌린다. 4비트 가중치도 fp32로 푼다."""
    halves = [(parameter, parameter.data) for parameter in model.parameters()
              if parameter.dtype in (torch.bfloat16, torch.float16) and not hasattr(parameter, "quant_state")]
    # 4비트 선형층이 계산하는 dtype과, 가중치를 푸는 dtype
    owners = [(module, "compute_dtype") for module in model.modules() if hasattr(module, "compute_dtype")]
    owners += [(parameter.quant_state, "dtype") for parameter in model.parameters()
               if getattr(parameter, "quant_state", None) is not None]
    kept = [(owner, name, getattr(owner, name)) for owner, name in owners]
    embedding = model.get_input_embeddings()  # 손으로 쓴 길은 이것을 CPU의 표로 바꾸어 둔다
    try:
        for parameter, value in halves:
            parameter.data = value.float()
        for owner, name in owners:
            setattr(owner, name, torch.float32)
        yield
    finally:
        if model.get_input_embeddings() is not embedding:
            model.set_input_embeddings(embedding)
        for parameter, value in halves:
            parameter.data = value
        for owner, name, dtype in kept:
            setattr(owner, name, dtype)


def take_documents(dataset) -> list[torch.Tensor]:
    """블록 몇 개에 든 문서들([tokens] int64). 가장 긴 문서가 든 블록과 짧은 문서가 든 블록을 모두 본다.

    선호 쌍이면 고른 답들이 앞에 온다. 한 쌍의 두 문서는 앞부분이 같아, 나란히 두면 그 gradient가 서로 지워진다.
    """
    documents = []
    for index in sorted({0, len(dataset) // 2, len(dataset) - 1}):
        block = {name: dataset[index][name][None] for name in ("input_ids", "labels", "position_ids")}
        documents += [part["input_ids"][0] for part in split_documents(block)
                      if (part["labels"] != IGNORE).any()]
    return documents[0::2] + documents[1::2] if "reference" in dataset[0] else documents


def make_block(documents: list[torch.Tensor], longest: int, total: int, max_documents: int,
               device: torch.device) -> dict[str, torch.Tensor]:
    """문서들을 `longest`토큰까지 잘라 `total`토큰까지 이어 붙인 블록. 첫 토큰 말고는 모두 정답이다."""
    pieces, room = [], total
    for document in documents[:max(1, max_documents)]:
        piece = document[:min(longest, room)]
        if len(piece) < 2:  # 한 토큰뿐이면 예측할 것이 없다
            break
        pieces.append(piece)
        room -= len(piece)
    labels = [torch.cat([piece.new_full((1,), IGNORE), piece[1:]]) for piece in pieces]
    positions = [torch.arange(len(piece)) for piece in pieces]
    block = {"input_ids": torch.cat(pieces), "labels": torch.cat(labels), "position_ids": torch.cat(positions)}
    return {name: value[None].to(device) for name, value in block.items()}  # [tokens] -> [1, tokens]


def pair_up(block: dict[str, torch.Tensor], beta: torch.Tensor) -> dict[str, torch.Tensor]:
    """블록의 문서들을 둘씩 선호 쌍으로 본 블록. 짝이 없는 마지막 문서에는 정답이 없다."""
    starts = torch.nonzero(block["position_ids"][0] == 0)[:, 0].tolist()
    labels = block["labels"].clone()
    if len(starts) % 2:
        labels[:, starts[-1]:] = IGNORE
    device = labels.device
    count = len(starts) // 2 * 2
    reference = torch.linspace(0.5, -0.5, count, device=device)[None]  # 값을 빠뜨리면 손실이 달라진다
    return {**block, "labels": labels, "reference": reference, "beta": beta[None].to(device)}


def split_documents(block: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """블록의 문서를 하나씩 [1, tokens]로 나눈다."""
    starts = torch.nonzero(block["position_ids"][0] == 0)[:, 0].tolist()
    for start, end in pairwise([*starts, block["position_ids"].shape[1]]):
        yield {name: value[:, start:end] for name, value in block.items()}


def require_causal(model: nn.Module, ids: torch.Tensor) -> None:
    """마지막 토큰을 바꾸어도 앞의 logits가 그대로인지 본다. 뒤의 글을 보는 모델(BERT)은 답을 베끼게 된다."""
    rows = model.get_input_embeddings().weight.shape[0]
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % rows
    logits = [model(input_ids=each, use_cache=False).logits for each in (ids, other)]  # [1, tokens, vocab]
    ours, theirs = (each[0, :-1].float() for each in logits)
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


def plain_backward(model: nn.Module, block: dict[str, torch.Tensor]) -> tuple[float, float]:
    """문서마다 따로 낸 gradient를 `.grad`에 더하고 (손실의 합, 그 크기)를 돌려준다. 뜻은 `Truth`와 같다."""
    if "reference" in block:
        return plain_preference(model, block)
    total = 0.0
    with torch.enable_grad():
        for document in split_documents(block):
            nll = plain_loss(model, document)
            nll.backward()
            total += float(nll.detach())
    return total, total


def plain_preference(model: nn.Module, block: dict[str, torch.Tensor]) -> tuple[float, float]:
    """선호 쌍마다 -log sigmoid(beta ((lp_c - ref_c) - (lp_r - ref_r)))의 (합, beta * 음의 로그 가능도의 합)."""
    documents = list(split_documents({name: block[name] for name in ("input_ids", "labels", "position_ids")}))
    beta, total, size = block["beta"][0], 0.0, 0.0
    with torch.enable_grad():
        for number, (ref_chosen, ref_rejected) in enumerate(block["reference"].view(-1, 2)):
            chosen, rejected = (plain_loss(model, document) for document in documents[2 * number:2 * number + 2])
            loss = -nn.functional.logsigmoid(beta * ((-chosen - ref_chosen) - (-rejected - ref_rejected)))
            loss.backward()
            total += float(loss.detach())
            size += float(beta * (chosen + rejected).detach())
    return total, size


def sum_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits [1, tokens, vocab], targets [1, tokens] -> 음의 로그 가능도의 합(fp32 스칼라)."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum",
                                       ignore_index=IGNORE)


def keeps_some_logits(model: nn.Module) -> bool:
    """`forward`가 logits를 얻을 자리를 고르게 해 주는가."""
    base = base_of(model)
    return "logits_to_keep" in inspect.signature(base.forward).parameters


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


def take_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """gradient를 꺼내고 0으로 지운다. `.grad`의 주소는 그대로다.

    Returns:
        이름 -> 그 가중치의 모양인 fp32. LoRA의 A면 [r, 입력], B면 [출력, r].
    """
    taken = {}
    for name, parameter in trainable(model):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        taken[name] = parameter.grad.detach().clone()
        parameter.grad.zero_()
    return taken


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
