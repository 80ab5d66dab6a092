"""페이지에서 시작할 학습의 주문: 무엇을 배울지의 값과, 그 값이 안전하고 있는 것인지의 검사."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from utils.chat_settings import CHAT
from utils.data.readers import READERS
from utils.errors import UsageError
from utils.paths import DATA_DEMO, ROOT
from utils.prompter import TEMPLATES
from utils.talk.guard import is_number

DATA_FOLDERS = (".", "data", "ko-datasets")
MAX_EPOCHS = 1000
_NAME = re.compile(r"[0-9A-Za-z가-힣][0-9A-Za-z가-힣._-]{0,59}")
_WINDOWS = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


@dataclass(frozen=True)
class Order:
    """학습 하나의 주문. `checked`로 만든다.

    Attributes:
        name: output_dir의 이름. train/ 아래에 만든다.
    """

    data_path: str
    base_model: str
    name: str
    epochs: float
    template: str

    @classmethod
    def checked(cls, data_path: object, base_model: object, name: object, epochs: object, template: object) -> "Order":
        """브라우저나 파일에서 온 값을 다시 보고 만든다.

        Raises:
            UsageError: 없거나, 이 폴더와 저장소의 밖이거나, 쓸 수 없는 값이다.
        """
        data, base = _inside(data_path, "데이터 파일", "data"), _inside(base_model, "기반 모델", "resources")
        if not data.is_file() or data.suffix.lower() not in READERS:
            raise UsageError(f"데이터 파일이 아니에요: {data_path}. 읽는 형식: {', '.join(READERS)}")
        if not (base / "config.json").is_file():
            raise UsageError(f"기반 모델의 폴더가 아니에요(config.json이 없어요): {base_model}")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith(".") \
                or name.split(".")[0].lower() in _WINDOWS:
            raise UsageError(f"이름은 빈칸 없이 한글, 영문, 숫자와 . _ -로 60자까지 적어 주세요: {str(name)[:80]}")
        if not is_number(epochs) or not 0 < epochs <= MAX_EPOCHS:
            raise UsageError(f"epoch은 0보다 크고 {MAX_EPOCHS} 이하의 수로 적어 주세요: {str(epochs)[:40]}")
        if template not in template_names():
            raise UsageError(f"템플릿은 {', '.join(template_names())} 가운데 하나를 골라 주세요: {str(template)[:40]}")
        return cls(str(data), str(base), name, epochs, template)

    def flags(self, home: Path) -> list[str]:
        """`finetune-lora.py`의 플래그."""
        return ["--base_model", short(self.base_model), "--data_path", short(self.data_path),
                "--output_dir", short(home / self.name), "--num_train_epochs", f"{self.epochs:g}",
                "--prompt_template", self.template]


def data_files() -> list[str]:
    """고를 수 있는 데이터 파일들. 함께 든 것 가운데에서는 함께 든 모델이 배울 수 있는 것이 먼저다."""
    found = [file for root in _roots() for where in DATA_FOLDERS
             for file in sorted((root / where).glob("*"), key=lambda file: (file != DATA_DEMO, file.name))
             if file.suffix.lower() in READERS and file.is_file() and file.name != "requirements.txt"]
    return list(dict.fromkeys(map(short, found)))


def base_models() -> list[str]:
    """고를 수 있는 기반 모델의 폴더들."""
    found = [file.parent for root in _roots() for file in sorted((root / "resources").glob("*/config.json"))]
    return list(dict.fromkeys(map(short, found)))


def template_names() -> list[str]:
    return [*sorted(file.stem for file in TEMPLATES.glob("*.json")), CHAT]


def free_name(home: Path) -> str:
    """아직 쓰지 않은 이름."""
    number = 1
    while (home / f"lora-{number}").exists():
        number += 1
    return f"lora-{number}"


def short(path: str | Path) -> str:
    """지금 폴더 아래면 상대 경로. 링크는 풀지 않는다."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _roots() -> tuple[Path, ...]:
    return tuple(dict.fromkeys((Path.cwd(), ROOT)))


def _inside(path: object, what: str, home: str) -> Path:
    """지금 폴더나 저장소 안의 절대 경로. `..`을 풀어서 보고, 사용자가 만든 링크는 따라간다. `home`은 옮길 폴더다."""
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise UsageError(f"골라 주세요: {what}")
    found = Path(os.path.normpath(Path.cwd() / path))
    if not any(found.is_relative_to(root) for root in _roots()):
        raise UsageError(f"지금 폴더나 저장소 안에 있어야 해요({what}): {path[:200]}. {home} 폴더로 옮겨 주세요")
    return found
