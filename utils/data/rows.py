"""데이터의 행: 파일이든 hub의 데이터든 (번호, 열 -> 값)을 하나씩 준다."""

import difflib
from collections.abc import Iterator
from pathlib import Path

from utils import hub
from utils.data.encoding import BadRow
from utils.data.readers import READERS
from utils.errors import UsageError, why
from utils.paths import ROOT, looks_like_hub_id, shown

SUFFIXES = tuple(READERS)
DOWNLOAD_KOALPACA = "python ko-datasets/download-koalpaca.py"


def read_rows(data_path: str | Path, cache_dir: str | None = None,
              on_bad: BadRow | None = None) -> Iterator[tuple[int, dict]]:
    """(행 번호, 열 -> 값)을 하나씩 준다. 번호는 1부터이고, 줄마다 객체가 하나인 파일에서는 줄 번호다.

    Args:
        on_bad: 주면 읽을 수 없는 행을 (번호, 이유)으로 알리고 건너뛴다.

    Raises:
        UsageError: 파일이 없거나 비었다. `on_bad`가 없으면 형식이 깨진 첫 행의 번호도 말한다.
    """
    path, empty, first_reason = Path(data_path), True, None

    def skip(number: int, reason: str) -> None:
        nonlocal first_reason
        first_reason = first_reason or reason
        on_bad(number, reason)

    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            old = " 엑셀에서 .xlsx로 다시 저장한다." if path.suffix.lower() in (".xls", ".xlsb", ".xlsm") else ""
            raise UsageError(f"읽을 수 없는 데이터 형식이다: {path}.{old} 쓸 수 있는 형식: {', '.join(SUFFIXES)}")
        try:
            for number, row in READERS[path.suffix.lower()](path, on_bad and skip):
                if isinstance(row, dict):
                    empty = False
                    yield number, row
                elif on_bad is None:
                    raise UsageError(f"{path}의 {number}번째 행이 객체({{...}})가 아니다")
                else:
                    skip(number, f"{number}번째 행이 객체({{...}})가 아니다")
        except OSError as error:
            raise UsageError(f"데이터 파일을 읽지 못했다: {path} ({why(error)})") from None
    else:
        for number, row in enumerate(load_hub(str(data_path), cache_dir), 1):
            empty = False
            yield number, row
    if empty and first_reason:
        raise UsageError(f"{data_path}에 읽을 수 있는 행이 하나도 없다. {first_reason}")
    if empty:
        raise UsageError(f"데이터가 비었다: {data_path}")


def require_data(data_path: str | Path) -> None:
    """데이터 파일이 있는지 본다. 없으면 비슷한 이름이나 받는 명령을 말한다."""
    path = Path(data_path)
    if path.is_dir():
        raise UsageError(f"데이터로 폴더를 적었다: {path}. 그 안의 파일({', '.join(SUFFIXES)}) 하나를 적는다")
    if not path.is_file() and (path.suffix.lower() in SUFFIXES or not looks_like_hub_id(data_path)):
        raise UsageError(f"데이터 파일이 없다: {data_path}. {_advice(path)}")


def _advice(path: Path) -> str:
    """없는 데이터 파일 대신 할 것."""
    if "koalpaca" in path.name.lower():
        return f"KoAlpaca를 받는 명령: {DOWNLOAD_KOALPACA}"
    there = {file.stem: file for folder in (ROOT / "ko-datasets", path.parent) if folder.is_dir()
             for file in folder.iterdir() if file.suffix.lower() in SUFFIXES}
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name  # 윈도우의 탐색기는 확장자를 감춘다
    if near := difflib.get_close_matches(stem, there, n=1):
        return f"혹시 {shown(there[near[0]])}?"
    return f"지금 폴더는 {Path.cwd()}이다. 이름과 확장자({', '.join(SUFFIXES)})를 본다"


def load_hub(name: str, cache_dir: str | None = None):
    """hub의 데이터를 받아 `datasets.Dataset`(디스크에 둔 행)으로 돌려준다. train 부분만 쓴다.

    Raises:
        UsageError: 없거나, 로그인이 필요하거나, 인터넷이 끊겼거나, 받다가 그쳤다.
    """
    require_data(name)
    return fetch(name, "train", cache_dir)


def fetch(name: str, split: str, cache_dir: str | None = None, subset: str | None = None):
    """hub의 데이터에서 한 부분. 이름이 파일인지는 보지 않는다. 오류는 `load_hub`와 같다.

    Args:
        split: train이나 test.
        subset: 한 이름에 여러 데이터가 있으면 그 가운데 하나.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, subset, split=split, cache_dir=cache_dir)
    except Exception as error:  # hub의 오류는 종류가 많고 모두 사용자가 고칠 일이다
        raise hub.refusal("데이터를", name, error, cache_dir, data=True) from None
