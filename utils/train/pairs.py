"""선호 쌍의 학습에만 있는 단계: 긴 쌍을 빼고, 계획을 말하고, 기준이 되는 가능도를 재고, 결과를 말한다."""

from collections.abc import Callable

import torch

from utils.data import blocks
from utils.data.blocks import Split
from utils.data.documents import Documents
from utils.data.pair_check import answer_lengths
from utils.errors import UsageError
from utils.train.batches import evaluation_batches
from utils.train.loop import Loop
from utils.train.records import Result, Settings


def drop_long_pairs(settings: Settings, documents: Documents, parts: Split, say: Callable[[str], None]) -> Split:
    """두 답이 함께 블록에 들어가지 않는 선호 쌍을 뺀다. 쌍은 자르지 않는다.

    Raises:
        UsageError: 배울 쌍이 하나도 남지 않는다.
    """
    kept = Split(*(blocks.fitting_pairs(documents, members) for members in parts))
    dropped = [(len(members) - len(left)) // 2 for members, left in zip(parts, kept, strict=True)]
    if any(dropped):
        say(f"두 답을 합쳐 cutoff_len {settings.cutoff_len}보다 긴 쌍을 뺐다: 학습 {dropped[0]:,}, 검증 {dropped[1]:,}")
    if not len(kept.train):
        shortest = int(blocks.unit_lengths(documents, parts.train).min()) if len(parts.train) else 0
        raise UsageError(f"모든 쌍의 두 답이 cutoff_len {settings.cutoff_len}에 들어가지 않아 배울 것이 없다. 가장 "
                         f"짧은 쌍도 {shortest}토큰이다. --cutoff_len을 늘린다")
    return kept


def lengths_line(documents: Documents) -> str:
    """두 답의 평균 길이 한 줄."""
    chosen, rejected = answer_lengths(documents)
    return f"선호 쌍: 답의 평균 길이는 고른 답 {chosen:.0f}, 버린 답 {rejected:.0f} 토큰"


def plan_lines(settings: Settings, documents: Documents) -> list[str]:
    """계획에 더할 줄들: 선호 쌍을 어떻게 배우는지, 아니면 쓰지 않는 beta를 적었다는 말."""
    if documents.pairs:
        return [f"{lengths_line(documents)}. 고른 답을 버린 답보다 높이 매기도록 배운다",
                f"  DPO, beta {settings.dpo_beta:g}. 기준은 어댑터를 끈 모델이다"]
    if settings.dpo_beta is not None:
        return [f"dpo_beta {settings.dpo_beta:g}는 쓰지 않는다. 선호 쌍(prompt, chosen, rejected의 열)에만 쓰는 값이다"]
    return []


def measure_references(loop: Loop, say: Callable[[str], None]) -> None:
    """선호 쌍의 문서마다 ref를 재어 블록에 적는다. 선호 쌍이 아니면 할 일이 없다.

    어댑터를 끈 모델이 reference다. 학습을 시작하거나 체크포인트를 읽기 전의 LoRA는 B가 0이라 꺼져 있는 것과 비트까지
    같으므로, 같은 micro-step으로 잰다. 이어 갈 때 다시 재어도 같은 값이다.
    """
    paired = [dataset for dataset in (loop.train_set, loop.eval_set) if hasattr(dataset, "references")]
    if paired:
        say(f"어댑터를 끈 모델이 두 답에 매기는 가능도를 먼저 잰다(블록 {sum(map(len, paired)):,}개)")
    for dataset in paired:
        found = torch.zeros_like(dataset.references)
        for rows in evaluation_batches(len(dataset), loop.step.rows, loop.group):
            ratios = loop.measure(loop.read(dataset, rows)).nan_to_num().cpu()
            for row, ratio in zip(rows, ratios, strict=True):
                if row >= 0:
                    found[row] = ratio
        dataset.references += loop.group.add_up(found.to(loop.device)).cpu()


def outcome_line(result: Result) -> str | None:
    """검증 쌍에서 무엇이 달라졌는지 한 줄. 선호 쌍이 아니거나 검증하지 않았으면 None이다.

    학습 전의 보상은 두 답 모두 0이라 맞은 비율이 늘 50%다. 그래서 기반 모델의 취향은 고른 답이 더 그럴듯한 비율로 본다.
    """
    before, after = result.started, result.ended
    if "eval_reward_accuracy" not in after:
        return None
    return (f"검증 쌍에서 고른 답의 보상이 더 높은 비율 {before['eval_reward_accuracy']:.1%} -> "
            f"{after['eval_reward_accuracy']:.1%}, 보상의 차이 {before['eval_reward_margin']:.3f} -> "
            f"{after['eval_reward_margin']:.3f}, 고른 답이 더 그럴듯한 비율 {before['eval_chosen_likelier']:.1%} -> "
            f"{after['eval_chosen_likelier']:.1%}")
