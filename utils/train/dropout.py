"""모델의 모든 dropout을 잠시 끈다."""

import contextlib
from collections.abc import Iterator

from torch import nn


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
