"""학습이 어디까지 왔는지. 체크포인트와 run.json에 담긴다."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from utils.errors import UsageError

STATE_FILE = "trainer_state.json"


@dataclass
class TrainState:
    """학습의 지금.

    Attributes:
        global_step: 가중치를 고친 수.
        max_steps: 모두 몇 번 고칠지.
        epoch: 데이터를 몇 번 보았는지.
        best_metric: 가장 낮은 검증 loss.
        best_global_step: 그때의 step.
        waited: 검증 loss가 잇달아 나아지지 않은 수.
        log_history: step마다의 기록. 학습한 줄에는 `loss`, 검증한 줄에는 `eval_loss`가 있다.
    """

    max_steps: int
    global_step: int = 0
    epoch: float = 0.0
    best_metric: float | None = None
    best_global_step: int | None = None
    waited: int = 0
    log_history: list[dict[str, float]] = field(default_factory=list)

    def remember(self, eval_loss: float) -> None:
        """검증 loss 하나를 가장 좋은 것과 비교한다."""
        if eval_loss < (math.inf if self.best_metric is None else self.best_metric):
            self.best_metric = eval_loss
            self.best_global_step = self.global_step
            self.waited = 0
        else:
            self.waited += 1

    def write(self, folder: Path) -> None:
        (folder / STATE_FILE).write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, max_steps: int) -> "TrainState":
        """체크포인트의 상태. epoch을 늘려 이어 가면 `max_steps`는 지금의 것이다."""
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        try:
            return cls(**{**content, "max_steps": max_steps})
        except TypeError:
            raise UsageError(f"이 도구의 다른 버전이 저장해 이어 갈 수 없다: {folder}. "
                             "다른 --output_dir에서 새로 시작한다") from None
