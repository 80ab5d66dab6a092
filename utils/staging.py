"""폴더 하나를 옆에서 다 쓴 다음에 제 이름을 준다. 도중에 끊긴 것이 다 된 것으로 보이지 않게 한다."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.checkpoint import STAGING
from utils.rundir import LOCK_FILE, locked


@contextmanager
def staged(output_dir: str) -> Iterator[Path]:
    """옆의 임시 폴더를 잠가 그 안에 쓸 자리를 주고, 탈 없이 끝나면 제자리로 옮긴다. 탈이 나면 지운다.

    어디서 끊겨도 `output_dir`에는 아무것도 없거나 다 된 모델이 있다. 잠금은 프로세스가 죽으면 풀린다.

    Raises:
        UsageError: 같은 `output_dir`에 쓰는 다른 실행이 있다.
    """
    output = Path(output_dir).resolve()
    staging = output.with_name(STAGING + output.name)
    work = staging / output.name
    try:
        with locked(staging, output_dir):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                yield work
                if output.is_dir():
                    output.rmdir()  # Windows는 빈 폴더 위로도 이름을 바꾸지 못한다
                work.rename(output)
            finally:
                shutil.rmtree(work, ignore_errors=True)
                with suppress(OSError):  # Windows는 잠근 파일을 지우지 못하고, 잠금을 풀 때 지운다
                    (staging / LOCK_FILE).unlink()
    finally:
        with suppress(OSError):  # 그 사이에 다른 실행이 잠갔으면 그것의 폴더다
            staging.rmdir()
