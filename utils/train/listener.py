"""학습을 지켜보는 것의 모양. 화면(`progress`)과 wandb, TensorBoard(`tracking`)가 이 모양을 따른다."""

from pathlib import Path
from typing import Protocol

from utils.train.state import TrainState


class Listener(Protocol):
    """학습을 지켜보는 것."""

    def begin(self, state: TrainState) -> None: ...

    def log(self, row: dict[str, float], state: TrainState) -> None:
        """학습한 step의 한 줄(`loss`가 있다)이나 검증의 한 줄(`eval_loss`가 있다)."""

    def saved(self, folder: Path, state: TrainState, final: bool) -> None:
        """폴더에 체크포인트를, `final`이면 끝난 어댑터를 썼다."""

    def close(self) -> None: ...
