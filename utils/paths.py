"""저장소의 자리와, 사용자가 적은 입력 경로를 찾는 규칙."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE_DEMO = ROOT / "resources" / "polyglot-ko-demo"
DATA_DEMO = ROOT / "ko-datasets" / "polyglot-ko-lite_textonly.json"


def find_input(path: str) -> str:
    """입력 경로를 지금 폴더에서, 없으면 저장소에서 찾는다. 둘 다 없으면 적힌 그대로 돌려준다(hub id일 수 있다)."""
    if not Path(path).exists() and (ROOT / path).exists():
        return str(ROOT / path)
    return path


def shown(path: str | Path) -> str:
    """사용자에게 보여 줄 경로. 지금 폴더 아래면 상대 경로다."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def looks_like_hub_id(name: str | Path) -> bool:
    """`소유자/이름`이고, 앞부분이 로컬 폴더가 아니면 hub id로 본다."""
    parts = str(name).replace("\\", "/").split("/")
    return len(parts) == 2 and all(parts) and not parts[0].startswith((".", "~")) and not Path(parts[0]).is_dir()
