"""wandb와 TensorBoard를 켜고 끄는 일을 맡는다. 켜라고 하지 않으면 아무것도 부르지 않는다."""

import os
from pathlib import Path
from types import SimpleNamespace

from utils.errors import UsageError

WATCH = ("false", "gradients", "parameters", "all")
LOG_MODEL = ("false", "checkpoint", "end")
OFFLINE_MODES = ("offline", "disabled", "dryrun")


def choose_trackers(settings: SimpleNamespace) -> list[str]:
    """기록할 곳을 고르고 그 환경 변수를 정한다. 모델을 올리기 전에 부른다.

    Args:
        settings: `report_to`, `wandb_*`, `output_dir`이 든 설정.

    Returns:
        TrainingArguments의 `report_to`에 줄 이름들.

    Raises:
        UsageError: wandb에 로그인하지 않았거나(물어보며 멈추지 않는다) 값이 틀렸다.
    """
    if settings.wandb_project is not None or settings.report_to == "wandb":
        _prepare_wandb(settings)
    if settings.report_to == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(settings.output_dir) / "tensorboard")
    asked = ["wandb"] if settings.wandb_project is not None else []
    return sorted({*asked, *([] if settings.report_to == "none" else [settings.report_to])})


def _prepare_wandb(settings: SimpleNamespace) -> None:
    watch, log_model = settings.wandb_watch or "false", settings.wandb_log_model or "false"
    for flag, value, allowed in (("wandb_watch", watch, WATCH), ("wandb_log_model", log_model, LOG_MODEL)):
        if value not in allowed:
            raise UsageError(f"{flag}는 {', '.join(allowed)} 가운데 하나다: {value}")
    if os.environ.get("WANDB_MODE") not in OFFLINE_MODES:
        _require_login()
    os.environ.update(WANDB_PROJECT=settings.wandb_project or "polyglot-ko-lite", WANDB_WATCH=watch,
                      WANDB_LOG_MODEL=log_model, WANDB_DIR=str(settings.output_dir))


def _require_login() -> None:
    import wandb

    offline = "이 컴퓨터에만 기록하려면 환경 변수 WANDB_MODE=offline을 준다"
    try:
        if not wandb.login(prompt=False):
            raise UsageError(f"wandb에 로그인하지 않았다. wandb login을 한 번 실행한다. {offline}")
    except wandb.errors.AuthenticationError as error:
        raise UsageError(f"wandb에 로그인하지 못했다: {error}. {offline}") from None
