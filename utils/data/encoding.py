"""데이터 파일의 글자: 인코딩을 알아내고, 읽을 수 없는 자리를 말한다."""

import codecs
import re
from collections.abc import Callable
from pathlib import Path

from utils.errors import UsageError

MAX_ROW_CHARS = 1 << 26
BadRow = Callable[[int, str], None]  # (행의 번호, 읽을 수 없는 이유)
_CHUNK = 1 << 20
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_HANGUL = re.compile("[가-힣]")
_LFS_POINTER = b"version https://git-lfs"
_OTHER_FILES = {b"\x1f\x8b\x08\x00": "압축 파일(.gz)", b"\x1f\x8b\x08\x08": "압축 파일(.gz)",
                b"PK\3\4": "압축 파일(.xlsx, .zip)", b"\xd0\xcf\x11\xe0": "옛 엑셀 파일(.xls)", b"PAR1": "parquet"}


def detect_encoding(path: Path) -> str:
    """BOM이 있으면 그것을, 없으면 UTF-8, UTF-16, CP949 가운데 끝까지 읽히는 것을 고른다.

    Raises:
        UsageError: 어느 것으로도 읽히지 않는다. UTF-8 파일의 일부가 깨졌으면 그 줄의 번호를 말한다.
    """
    require_whole(path)
    with path.open("rb") as stream:
        head = stream.read(4)
    if head in _OTHER_FILES:
        raise UsageError(f"글이 아니라 {_OTHER_FILES[head]}이다: {path}. 확장자를 바로잡거나 CSV로 다시 저장한다")
    named = next((encoding for bom, encoding in _BOMS if head.startswith(bom)), None)
    if named is None and b"\0" in head[:2]:
        named = "utf-16-be" if head.startswith(b"\0") else "utf-16-le"
    broken_line, has_hangul = _first_broken_line(path, named or "utf-8")
    if broken_line is None:
        return named or "utf-8"
    if named is None and not has_hangul and _first_broken_line(path, "cp949")[0] is None:
        return "cp949"
    raise UsageError(f"{path}의 {broken_line}번째 줄의 글자를 {named or 'UTF-8'}로 읽을 수 없다. UTF-8로 다시 저장한다")


def require_whole(path: Path) -> None:
    """git이 데이터 대신 둔 자리표(LFS pointer)가 아닌지 본다.

    Raises:
        UsageError: 자리표다.
    """
    with path.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UsageError(f"데이터가 아니라 git LFS의 자리표다: {path}. git lfs pull로 받거나 hub에서 다시 받는다")


def refuse_row(path: Path) -> BadRow:
    """읽을 수 없는 행을 만나면 파일과 자리를 말하고 그만두는 `BadRow`."""
    def refuse(number: int, reason: str) -> None:
        raise UsageError(f"{path}의 {reason}")
    return refuse


def _first_broken_line(path: Path, encoding: str) -> tuple[int | None, bool]:
    """(읽히지 않는 첫 줄의 번호, 그 앞에 한글이 있었는가). 끝까지 읽히면 번호가 None이다."""
    decoder, line, has_hangul = codecs.getincrementaldecoder(encoding)(), 1, False
    with path.open("rb") as stream:
        while True:
            chunk = stream.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeError as error:
                good = getattr(error, "object", b"")[: getattr(error, "start", 0)]
                return line + good.count(b"\n"), has_hangul or bool(_HANGUL.search(good.decode(encoding, "ignore")))
            has_hangul = has_hangul or bool(_HANGUL.search(text))
            line += text.count("\n")
            if not chunk:
                return None, has_hangul
