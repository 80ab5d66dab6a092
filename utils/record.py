"""학습 한 번의 기록 파일: run.json과 samples.md."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UsageError
from utils.files import read_json, staged_file

# 인용 안에서 제목, 가로줄, 코드 블록, 또 하나의 인용이 되는 줄의 앞
_STRUCTURE = re.compile(r"^(\s*)(?=#|>|```|~~~|[-=*_]+\s*$)")
_BACKSLASH = r"\1\\"
RUN_FILE, CURVES_FILE, SAMPLES_FILE = "run.json", "curves.png", "samples.md"


@dataclass(frozen=True)
class Model:
    """비교하는 두 모델의 하나. `name`은 기록에서 답의 열이고, `tuned`가 False면 어댑터를 끈다."""

    name: str
    title: str
    tuned: bool


@dataclass(frozen=True)
class Figure:
    """run.json의 수 하나를 사람에게 보이는 방법: 열, 제목, 표시 형식, 단위."""

    key: str
    title: str
    form: str
    unit: str = ""

    def shown(self, run: dict) -> str | None:
        """단위까지 적은 값. 기록에 수가 없으면 None이다."""
        value = run.get(self.key)
        return f"{value:{self.form}}{self.unit}" if isinstance(value, int | float) else None


MODELS = (Model("base", "기반 모델", tuned=False), Model("tuned", "학습한 모델", tuned=True))
FIGURES = (
    Figure("eval_loss_before", "학습 전 검증 loss", ".4f"),
    Figure("eval_loss_after", "학습 후 검증 loss", ".4f"),
    Figure("reward_accuracy_after", "보상 정확도(검증 쌍)", ".1%"),
    Figure("reward_margin_after", "보상의 차이(검증 쌍)", ".3f"),
    Figure("chosen_reward_after", "고른 답의 보상(검증 쌍)", ".3f"),
    Figure("chosen_likelier_before", "학습 전 고른 답이 더 그럴듯한 쌍", ".1%"),
    Figure("chosen_likelier_after", "학습 후 고른 답이 더 그럴듯한 쌍", ".1%"),
    Figure("train_seconds", "걸린 시간", ",.0f", "초"),
    Figure("tokens_per_second", "학습 속도", ",.0f", " 토큰/초"),
    Figure("peak_vram_gb", "최대 VRAM", ".2f", " GB"),
    Figure("peak_ram_gb", "최대 RAM", ".2f", " GB"),
)


def write_run(output_dir: str | Path, run: dict) -> Path:
    """학습의 기록을 run.json으로 쓴다. 쓰다 끊겨도 앞의 파일이 남는다.

    Args:
        run: `history`는 step마다의 dict(`step`, `loss`, `eval_loss` 따위)다. 그 밖의 항목은 그대로 담긴다. JSON에
            없는 값은 글자로, NaN과 inf는 null로 바꾼다.
    """
    file = Path(output_dir) / RUN_FILE
    with staged_file(file) as stream:
        stream.write(json.dumps(_plain(run), ensure_ascii=False, indent=2, allow_nan=False) + "\n")
    return file


def read_run(run_dir: str | Path) -> dict:
    """run.json을 읽는다.

    Raises:
        UsageError: 없거나 깨졌거나 그릴 history가 없다.
    """
    file = Path(run_dir) / RUN_FILE
    run = read_json(file, f"{RUN_FILE}이 없다: {file} (finetune-lora.py의 --output_dir를 적는다)")
    rows = run.get("history") if isinstance(run, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "step" in row for row in rows):
        raise UsageError(f"{file}에 step마다의 기록(history)이 없다")
    return run


def write_samples(output_dir: str | Path, samples: Sequence[dict]) -> Path:
    """질문마다 모범 답, 기반 모델의 답, 학습한 모델의 답을 나란히 적는다.

    Args:
        samples: `question`과 `tuned`가 든 dict들. `kind`(어디서 온 질문인지), `reference`(데이터에 적힌 답)와
            `base`는 있으면 적는다.
    """
    parts = ["# 질문과 답\n\n검증 질문은 학습에 쓰지 않은 행의 질문이고, 모범 답은 데이터에 적힌 답이다.\n"]
    if not samples:
        parts.append("아직 답이 없다. 답하다가 멈추었거나, 시간 안에 답을 끝내지 못했거나, 데이터에 질문이 없다.\n")
    for number, sample in enumerate(samples, 1):
        parts.append(f"## {number}. {sample.get('kind', '질문')}\n\n{_quoted(sample['question'])}\n")
        for key, title in (("reference", "모범 답"), *((model.name, model.title) for model in MODELS)):
            if key in sample:
                parts.append(f"**{title}**\n\n{_quoted(sample[key])}\n")
    file = Path(output_dir) / SAMPLES_FILE
    with staged_file(file) as stream:
        stream.write("\n".join(parts))
    return file


def _quoted(text: str) -> str:
    """글을 마크다운의 인용으로. 빈 줄은 하나만 남기고, 제목이나 HTML이 될 글자는 글자 그대로 보이게 한다."""
    lines: list[str] = []
    for line in str(text).strip().splitlines():
        if line.strip():
            escaped = line.replace("\\", "\\\\").replace("<", r"\<")
            lines.append(f"> {_STRUCTURE.sub(_BACKSLASH, escaped)}  ")
        elif lines[-1] != ">":
            lines.append(">")
    return "\n".join(lines) or "> (빈 답)"


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
