"""가중치를 미리 푸는 자리: 쓰는 동안 다른 것이 덮지 않고, 미리 푼 것도 제때 제 것이 나온다."""

import random

import pytest
import torch

from utils.engine.train_layers import Projection
from utils.engine.train_ops import TorchOps
from utils.engine.unpacked import Unpacker, size_of


def walk(unpacker: Unpacker, order: list[Projection | None], early: list[int]) -> None:
    """차례를 한 번 지난다. 쓰고 있는 가중치와 logits에 제 값만 있어야 한다. `early`에는 미리 풀린 것의 수를 더한다."""
    unpacker.begin("train")
    for projection in order:
        if projection is None:
            unpacker.lend().fill_(-1.0)
            continue
        early.append(len(unpacker.held))
        weight = unpacker.take(projection)
        assert weight.shape == (projection.rows, projection.columns + projection.tail)
        assert (weight == projection.tail).all()
        unpacker.give_back()
    assert not unpacker.held


@pytest.mark.parametrize("room", [1.0, 1.3, 2.5])
def test_weights_are_whole_while_used(room):
    dice = random.Random(int(room * 10))
    kinds = [Projection((), (), None, dice.randint(1, 40), dice.randint(8, 90), tail) for tail in range(1, 8)]
    order = [dice.choice(kinds) for _ in range(60)]
    order[30] = None
    buffer = torch.zeros(int(room * max(map(size_of, kinds))))

    def unpack(projection, out):
        return TorchOps.unpacked_view(projection, out).fill_(projection.tail)

    unpacker, early = Unpacker(unpack, buffer, buffer), []
    walk(unpacker, order, early)
    assert not any(early)  # 처음에는 차례를 모른다
    walk(unpacker, order, early)
    assert max(early) >= 1
    with pytest.raises(RuntimeError):
        walk(unpacker, order[::-1], early)
    walk(unpacker, order, early)  # 그만둔 다음에도 처음부터 다시 한다
