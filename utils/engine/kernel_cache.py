"""컴파일한 커널을 사용자의 캐시 폴더에 두고 다시 쓴다. 컴파일은 몇 초가 걸리고 결과는 늘 같다."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from utils.files import own_staging_of, put

KEPT = 64    # 남겨 두는 파일의 수. 하나가 수백 KB다
DIGEST = 32  # 파일의 앞에 적는 sha256의 길이(바이트)


def cache_folder() -> Path:
    """커널을 두는 폴더. `~/.cache`나 `XDG_CACHE_HOME`의 아래다."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyglot-ko-lite" / "kernels"


def remembered(folder: Path, facts: tuple, compile_: Callable[[], bytes]) -> bytes:
    """`facts`가 같으면 전에 컴파일한 것을, 아니면 새로 컴파일해서 준다.

    손상된 파일은 없는 것으로 여기고, 폴더에 쓸 수 없으면 남기지 않는다.

    Args:
        facts: 결과를 정하는 모든 것. repr로 구별한다.
    """
    file = folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()}.cubin"
    with contextlib.suppress(OSError):
        kept = file.read_bytes()
        if hashlib.sha256(kept[DIGEST:]).digest() == kept[:DIGEST]:
            return kept[DIGEST:]
    made = compile_()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        staging = own_staging_of(file)
        staging.write_bytes(hashlib.sha256(made).digest() + made)
        put(staging, file)
        for old in sorted(folder.glob("*.cubin"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink()
    return made
