"""저장소의 자리와, 사용자가 적은 입력 경로를 찾는 규칙."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE_DEMO = ROOT / "resources" / "polyglot-ko-demo"
OWN_FOLDERS = ("resources", "train", "data")  # 사용자의 것이 생기는 폴더. 아직 없을 수도 있다
_PATH_ENDINGS = ("dir", "dirs", "path", "root", "model", "data")  # 경로를 적는 플래그의 이름의 끝
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
DATA_DEMO = ROOT / "ko-datasets" / "polyglot-ko-skills.json"


def at_home(flag: str, value: object) -> object:
    """경로의 플래그면 `~/`를 홈 폴더로 바꾼 값. 셸은 `--이름=~/폴더`의 물결표를 바꾸지 않는다."""
    if isinstance(value, tuple):
        return tuple(at_home(flag, each) for each in value)
    is_path = isinstance(value, str) and flag.rpartition("_")[2] in _PATH_ENDINGS
    return str(Path(value).expanduser()) if is_path and value.startswith(("~/", "~\\")) else value


def find_input(path: str) -> str:
    """입력 경로를 지금 폴더에서, 없으면 저장소에서 찾는다. 둘 다 없으면 적힌 그대로 돌려준다(hub id일 수 있다)."""
    if not Path(path).exists() and (ROOT / path).exists():
        return str(ROOT / path)
    return path


def find_recorded(path: str) -> str:
    """기록에 적힌 경로를 찾는다. 적힌 곳에 없으면, 이름이 바뀌거나 옮겨진 저장소에서 같은 자리나 같은 이름을 찾는다.

    `/옛 자리/resources/polyglot-ko-demo`는 지금 저장소의 `resources/polyglot-ko-demo`다. hub id와 찾지 못한 것은 적힌
    그대로다.
    """
    found = find_input(path)
    if Path(found).exists() or looks_like_hub_id(path):
        return found
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    places = [ROOT.joinpath(*parts[at:]) for at in range(1, len(parts) - 1)]  # 저장소 안의 같은 자리
    if parts:
        places += [ROOT / folder / parts[-1] for folder in ("resources", "ko-datasets")]  # 같은 이름
    return str(next((place for place in places if place.exists()), found))


def shown(path: str | Path) -> str:
    """사용자에게 보여 줄 경로. 지금 폴더 아래면 상대 경로다."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def portable(path: str | Path) -> str:
    """다른 컴퓨터에서도 뜻이 있는 경로: 저장소 안이면 저장소부터의 경로, 밖이면 이름, hub id면 그대로다."""
    found = Path(located(str(path)))
    if not found.exists():
        return str(path).replace("\\", "/").rstrip("/")
    return found.relative_to(ROOT).as_posix() if found.is_relative_to(ROOT) else found.name


def located(path: str) -> str:
    """기록에 남길 경로. 있는 파일이나 폴더면 어느 폴더에서 열어도 찾을 수 있게 절대 경로로, hub id면 그대로다."""
    return os.path.normpath(Path(path).absolute()) if Path(path).exists() else path  # 링크는 풀지 않는다


def script(name: str) -> str:
    """지금 폴더에서 실행할 수 있는 스크립트의 경로. 빈칸이 있으면 따옴표로 감싼다."""
    path = shown(ROOT / name)
    return f'"{path}"' if " " in path else path


def looks_like_hub_id(name: str | Path) -> bool:
    """hub가 허락하는 글자로 된 `소유자/이름`이고, 앞부분이 이 저장소나 지금 폴더의 폴더가 아니면 hub id로 본다."""
    parts = str(name).replace("\\", "/").split("/")
    if len(parts) != 2 or not all(map(_HUB_NAME.fullmatch, parts)):
        return False
    owner = Path(parts[0])
    return parts[0] not in OWN_FOLDERS and not owner.is_dir() and not (ROOT / owner).is_dir()
