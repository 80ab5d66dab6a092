"""고를 수 있는 모델들: 한 기반 모델 위의 어댑터마다 하나, 그리고 어댑터를 끈 기반 모델."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from utils.errors import UsageError
from utils.talk.answerer import Answerer

BASE = "base"


class UnknownModel(UsageError):
    """그런 이름의 모델이 없다."""


@dataclass(frozen=True)
class Choice:
    """고를 수 있는 모델 하나. `tuned`가 False면 `answerer`의 어댑터를 끄고 답한다."""

    name: str
    answerer: Answerer
    tuned: bool = True


class Models:
    """API의 `model`과 페이지에서 이름으로 고르는 모델들.

    Args:
        choices: 첫째가 이름을 적지 않았을 때의 것이다.
    """

    def __init__(self, choices: Sequence[Choice]):
        self._choices = {choice.name: choice for choice in choices}
        self.default = choices[0]

    @property
    def names(self) -> list[str]:
        return list(self._choices)

    @property
    def tuned(self) -> list[Choice]:
        """어댑터가 켜진 것들. 어댑터를 얹지 않았으면 모델 하나다."""
        return [choice for choice in self._choices.values() if choice.tuned]

    def choose(self, name: object) -> Choice:
        """이름으로 고른다. None이면 첫째다.

        Raises:
            UnknownModel: 없는 이름이다. 있는 이름을 말한다.
        """
        if name is None:
            return self.default
        found = self._choices.get(name) if isinstance(name, str) else None
        if found is None:
            raise UnknownModel(f"그런 모델이 없다: {str(name)[:80]}. 쓸 수 있는 이름: {', '.join(self._choices)}")
        return found


def unique_names(names: Iterable[str]) -> list[str]:
    """겹치는 이름과 기반 모델의 이름에는 -2, -3을 붙인다."""
    given: list[str] = []
    for name in names:
        number, wanted = 2, name
        while wanted == BASE or wanted in given:
            wanted, number = f"{name}-{number}", number + 1
        given.append(wanted)
    return given
