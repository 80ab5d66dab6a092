"""wandb와 TensorBoard에 기록한다. 켜라고 하지 않으면 어느 것도 import하지 않는다."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.errors import UsageError
from utils.train.listener import Listener
from utils.train.records import Settings
from utils.train.state import TrainState

WATCH = ("false", "gradients", "parameters", "all")
LOG_MODEL = ("false", "checkpoint", "end")
OFFLINE_MODES = ("offline", "disabled", "dryrun")
DEFAULT_PROJECT = "polyglot-ko-lite"
WATCH_EVERY = 100  # 몇 step마다 기울기와 가중치의 분포를 기록하는지


@dataclass(frozen=True)
class TrackerChoice:
    """기록할 곳.

    Attributes:
        project: wandb의 프로젝트. None이면 wandb에 기록하지 않는다.
        run_name: wandb에서 보일 이름. None이면 wandb가 짓는다.
        watch, log_model: wandb의 것.
        tensorboard: TensorBoard의 기록을 쓸 폴더. None이면 쓰지 않는다.
    """

    folder: Path
    project: str | None = None
    run_name: str | None = None
    watch: str = "false"
    log_model: str = "false"
    tensorboard: Path | None = None

    @property
    def names(self) -> list[str]:
        asked = {"tensorboard": self.tensorboard, "wandb": self.project}
        return [name for name, place in asked.items() if place is not None]


def choose_trackers(settings: Settings) -> TrackerChoice:
    """기록할 곳을 고른다. 모델을 올리기 전에 부른다.

    Raises:
        UsageError: wandb에 로그인하지 않았거나(물어보며 멈추지 않는다) 값이 틀렸다.
    """
    folder = Path(settings.output_dir)
    tensorboard = folder / "tensorboard" if settings.report_to == "tensorboard" else None
    if settings.wandb_project is None and settings.report_to != "wandb":
        return TrackerChoice(folder, tensorboard=tensorboard)
    watch, log_model = settings.wandb_watch or "false", settings.wandb_log_model or "false"
    for flag, value, allowed in (("wandb_watch", watch, WATCH), ("wandb_log_model", log_model, LOG_MODEL)):
        if value not in allowed:
            raise UsageError(f"{flag}의 값은 {', '.join(allowed)} 가운데 하나다: {value}")
    if os.environ.get("WANDB_MODE") not in OFFLINE_MODES:
        require_login()
    project = settings.wandb_project or DEFAULT_PROJECT
    return TrackerChoice(folder, project, settings.wandb_run_name, watch, log_model, tensorboard)


def require_login() -> None:
    """wandb에 로그인했는지 본다. 물어보며 멈추지 않는다.

    Raises:
        UsageError: wandb에 로그인하지 않았다.
    """
    import wandb

    offline = "이 컴퓨터에만 기록하려면 환경 변수 WANDB_MODE=offline을 준다"
    try:
        if not wandb.login(prompt=False):
            raise UsageError(f"wandb에 로그인하지 않았다. wandb login을 한 번 실행한다. {offline}")
    except wandb.errors.AuthenticationError as error:
        raise UsageError(f"wandb에 로그인하지 못했다: {error}. {offline}") from None


def open_trackers(choice: TrackerChoice, settings: Settings, model) -> list[Listener]:
    """고른 곳들을 연다. 첫 프로세스만 부른다."""
    opened: list[Listener] = []
    if choice.tensorboard is not None:
        opened.append(TensorBoard(choice.tensorboard, settings))
    if choice.project is not None:
        opened.append(Wandb(choice, settings, model))
    return opened


def scalars(row: dict[str, float]) -> dict[str, float]:
    """기록의 열을 두 곳이 쓰는 이름(`train/loss`, `eval/loss`)으로 바꾼다."""
    named = {}
    for key, value in row.items():
        if key != "step":
            named[f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"] = value
    return named


class TensorBoard:
    """TensorBoard의 기록."""

    def __init__(self, folder: Path, settings: Settings):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))
        self.writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in asdict(settings).items()))

    def begin(self, state: TrainState) -> None:
        """열 때 이미 시작했다."""

    def log(self, row: dict[str, float], state: TrainState) -> None:
        for name, value in scalars(row).items():
            self.writer.add_scalar(name, value, state.global_step)
        self.writer.flush()

    def saved(self, folder: Path, state: TrainState, final: bool) -> None:
        """모델은 올리지 않는다."""

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """wandb의 실행 하나. 파일은 `output_dir/wandb`에 둔다."""

    def __init__(self, choice: TrackerChoice, settings: Settings, model):
        import wandb

        self.choice = choice
        self.model = model
        self.wandb = wandb
        self.run = wandb.init(project=choice.project, name=choice.run_name, dir=str(choice.folder),
                              config={**asdict(settings), "model": model.config.to_dict()})
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step")

    def begin(self, state: TrainState) -> None:
        """열 때 이미 시작했다."""

    def log(self, row: dict[str, float], state: TrainState) -> None:
        watched = self.histograms() if "loss" in row and state.global_step % WATCH_EVERY == 1 else {}
        self.run.log({**scalars(row), **watched, "train/global_step": state.global_step})

    def histograms(self) -> dict:
        """배우는 가중치와 그 gradient의 분포. wandb의 `watch`는 자동미분만 엿보아, 손으로 쓴 backward를 보지 못한다."""
        found, watch = {}, self.choice.watch
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and watch in ("parameters", "all"):
                found[f"parameters/{name}"] = self.wandb.Histogram(parameter.detach().float().cpu())
            if parameter.grad is not None and watch in ("gradients", "all"):
                found[f"gradients/{name}"] = self.wandb.Histogram(parameter.grad.float().cpu())
        return found

    def saved(self, folder: Path, state: TrainState, final: bool) -> None:
        """체크포인트나 끝난 어댑터를 올린다. `checkpoint`는 둘 다, `end`는 끝난 어댑터만이다."""
        if self.choice.log_model == "checkpoint" or (self.choice.log_model == "end" and final):
            artifact = self.wandb.Artifact(f"model-{self.run.id}", type="model",
                                           metadata={"eval/loss": state.best_metric})
            for file in sorted(folder.iterdir()):
                if file.is_file() and not file.name.startswith("."):
                    artifact.add_file(str(file))
            self.run.log_artifact(artifact, aliases=["final" if final else folder.name])

    def close(self) -> None:
        self.run.finish()
