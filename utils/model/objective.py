"""micro-step이 줄이는 손실: 토큰마다의 음의 로그 가능도, 또는 선호 쌍(고른 답과 버린 답)의 DPO.

DPO(Rafailov 외, 2023. arXiv:2305.18290)에서 쌍 하나의 손실은

    m = beta ((lp_c - ref_c) - (lp_r - ref_r)),    L = -log sigmoid(m)

이다. c는 고른 답, r은 버린 답이고, lp는 배우는 모델이, ref는 어댑터를 끈 모델이 그 답 전체에 매긴 로그 가능도다. m을
보상의 차이라 한다. dL/dm = -sigmoid(-m)이고 lp = -sum nll이므로, 답의 토큰 하나의 nll에 대한 기울기는

    고른 답:  dL/dnll = beta sigmoid(-m)        버린 답:  dL/dnll = -beta sigmoid(-m)

이다. 한 쌍의 두 답은 블록에서 잇달은 두 문서(2k번째와 2k + 1번째)이고, batch에는 보통의 것에 더해 다음이 있다.

    reference: 문서마다의 ref [rows, 2 pairs], fp32. 고른 답과 버린 답이 번갈아 놓이고, 문서가 없는 자리는 NaN이다.
    beta: [rows], fp32.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from utils.data.blocks import document_ids

Batch = dict[str, torch.Tensor]
# 손실과, 선호 쌍에서 함께 재는 것: 보상의 차이, 고른 답의 보상이 더 높은 비율, 고른 답의 보상 beta (lp_c - ref_c), 고른
# 답이 더 그럴듯한(lp_c > lp_r) 비율. 고른 답의 보상이 크게 내려가면 두 답 모두 말하지 않게 된 것이다
FIGURES = ("loss", "reward_margin", "reward_accuracy", "chosen_reward", "chosen_likelier")


def is_preference(batch: Batch) -> bool:
    """선호 쌍의 batch인가."""
    return "reference" in batch


def objective(nll: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`batch["factor"]`를 곱한 손실. nll로 미분할 수 있다.

    Args:
        nll: 블록의 자리마다의 음의 로그 가능도 [rows * block], fp32. 정답이 없는 자리는 0이다.

    Returns:
        스칼라. 선호 쌍이면 `FIGURES`의 앞의 넷을 쌍마다 더한 [4]이고 손실만 미분한다.
    """
    if not is_preference(batch):
        return nll.sum() * batch["factor"]
    return score(log_ratios(nll, batch), batch) * batch["factor"]


def measured(nll: torch.Tensor, batch: Batch) -> torch.Tensor:
    """평가할 값: 음의 로그 가능도의 합(스칼라). 선호 쌍이면 문서마다의 `log_ratios` [rows, 2 pairs]."""
    return log_ratios(nll, batch) if is_preference(batch) else nll.sum()


def tally(value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`measured`의 값에서 평균을 낼 합들. 차례는 `FIGURES`와 같다."""
    if not is_preference(batch):
        return value[None]
    policy = value + batch["reference"]  # lp
    likelier = (policy[:, 0::2] > policy[:, 1::2]).sum()
    return torch.cat([score(value, batch), likelier[None]])


def learn(batch: Batch, gradient: torch.Tensor, measure: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """손으로 쓴 backward의 시작. `objective`를 돌려주고, 그 마지막 은닉값에 대한 gradient를 `gradient`에 남긴다.

    토큰 하나의 gradient는 dL/dh = (dL/dnll) dnll/dh로 나뉜다. 앞의 수는 쌍의 nll을 다 알아야 나오지만 토큰마다 하나뿐인
    수라서, 뒤의 것을 먼저 구해 두고 곱하면 출력 행렬을 두 번 곱하지 않는다.

    Args:
        gradient: [tokens, hidden].
        measure: 손실에 곱할 스칼라를 받아, 토큰마다의 nll [tokens]을 돌려주고 `gradient`를 채우는 함수.
    """
    if not is_preference(batch):
        return measure(batch["factor"]).sum() * batch["factor"]
    nll = measure(torch.ones_like(batch["factor"]))
    gradient.mul_(slopes(nll, batch).flatten()[:, None])
    return objective(nll, batch)


def log_ratios(nll: torch.Tensor, batch: Batch) -> torch.Tensor:
    """문서마다의 lp - ref [rows, 2 pairs]. 문서가 없는 자리는 NaN이다."""
    rows, block = batch["position_ids"].shape
    slots = torch.arange(batch["reference"].shape[1], device=nll.device)
    inside = _documents(batch)[:, None] == slots[:, None]  # [rows, 2 pairs, block]
    sums = (nll.view(rows, 1, block) * inside).sum(-1)  # 더하는 순서가 정해져 있어 다시 계산해도 비트까지 같다
    return -sums - batch["reference"]


def score(ratios: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`FIGURES`의 앞의 넷의 합 [4]. 두 답의 보상이 같은 쌍은 반만 맞은 것으로 센다."""
    rewards = _rewards(ratios, batch)
    chosen, rejected = rewards[:, 0::2], rewards[:, 1::2]  # [rows, pairs]
    margins = chosen - rejected
    real = ~ratios[:, 0::2].isnan()  # 쌍이 있는 자리
    loss = torch.where(real, F.softplus(-margins), 0.0).sum()  # -log sigmoid(m) = log(1 + e^-m)
    right = torch.where(real, (margins.sign() + 1) / 2, 0.0)
    figures = [value.sum().detach() for value in (margins, right, chosen)]
    return torch.stack([loss, *figures])


def slopes(nll: torch.Tensor, batch: Batch) -> torch.Tensor:
    """자리마다의 factor * dL/dnll [rows, block]. 정답이 없는 자리의 값은 뜻이 없다."""
    rewards = _rewards(log_ratios(nll, batch), batch)
    chosen, rejected = rewards[:, 0::2], rewards[:, 1::2]  # [rows, pairs]
    wrong = torch.sigmoid(rejected - chosen)  # 쌍의 순서를 거꾸로 볼 확률
    slope = batch["factor"] * batch["beta"][:, None] * wrong
    slope = torch.stack([slope, -slope], -1).flatten(1)  # 고른 답, 버린 답의 차례로 [rows, 2 pairs]
    place = _documents(batch).clamp(max=slope.shape[1] - 1)
    return slope.gather(1, place)


def _rewards(ratios: torch.Tensor, batch: Batch) -> torch.Tensor:
    """문서마다의 보상 beta (lp - ref) [rows, 2 pairs]. 문서가 없는 자리는 0이다."""
    return torch.where(ratios.isnan(), 0.0, batch["beta"][:, None] * ratios)


def _documents(batch: Batch) -> torch.Tensor:
    """자리마다 블록에서 몇 번째 문서인지 [rows, block]. 0부터 센다."""
    return document_ids(batch["position_ids"]) - 1
