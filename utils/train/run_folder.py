"""실행 하나의 폴더(`output_dir`): 잠그기, 이어 갈 체크포인트 고르기, 여유 공간 재기."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from utils import files, seals
from utils.cli import flag_name
from utils.console import shown_command
from utils.errors import UsageError
from utils.files import locked
from utils.model import checkpoint
from utils.model.adapter import PromptInfo
from utils.model.folder import ADAPTER_FILES, ADAPTER_WEIGHTS
from utils.process import is_first_process, n_processes
from utils.record import RUN_FILE
from utils.train.conditions import EPOCHS, describe, differences
from utils.train.inputs import Inputs
from utils.train.records import Settings

KEEP = 2
OTHER_BYTES = 20 << 20  # run.json, 그림, 예시 답, 로그
# 학습이 덮어쓰거나, 어댑터와 섞여 다른 모델처럼 보이게 하는 것
CLASHING = ("README.md", "config.json")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


@dataclass(frozen=True)
class Run:
    """열린 실행 하나.

    Attributes:
        folder: `output_dir`.
        checkpoint: 이어 갈 체크포인트. 새로 시작하면 None이다.
        facts: 실행의 조건. 이름 -> {"id": 비교할 값, "shown": 보여 줄 글}. 체크포인트에 함께 담긴다.
        prompt_info: 어댑터와 함께 담을 템플릿과 끝 토큰.
        resume_command: 이 실행을 이어 가는 명령.
    """

    folder: Path
    checkpoint: Path | None
    facts: dict
    prompt_info: PromptInfo
    resume_command: str

    @contextlib.contextmanager
    def saving(self, needed: int = OTHER_BYTES) -> Iterator[None]:
        """디스크가 차서 쓰지 못하면 임시 폴더를 지우고, 무엇이 모자라며 어떻게 이어 가는지 한 줄로 말한다."""
        try:
            yield
        except Exception as error:
            if not files.is_full_disk(error):
                raise
            checkpoint.sweep(self.folder)
            last = checkpoint.newest_valid(self.folder)
            kept = f"온전한 것: {last.name}" if last else "온전한 체크포인트는 아직 없다"
            again = f"이어 가는 명령: {self.resume_command}" if last else "처음부터 다시 실행한다"
            free = shutil.disk_usage(self.folder).free
            raise UsageError(f"디스크가 차서 쓰지 못했다: {self.folder}({needed / 1e6:,.0f} MB쯤 필요하고 "
                             f"{free / 1e6:,.0f} MB 남았다). {kept}. 디스크를 비운 뒤 {again}") from None

    def require_space(self, n_trainable: int) -> None:
        """체크포인트와 어댑터를 모두 담을 자리가 있는지 학습을 시작하기 전에 본다.

        Args:
            n_trainable: 학습하는 매개변수의 수.
        """
        if not is_first_process():
            return
        needed = checkpoint_bytes(n_trainable) * (KEEP + 2) + OTHER_BYTES  # 남길 것, 가장 좋은 것, 쓰는 중인 것
        present = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        free = shutil.disk_usage(self.folder).free
        if free + present < needed:
            raise UsageError(f"디스크의 여유 공간이 모자란다: {self.folder}에 {needed / 1e6:,.0f} MB가 필요한데 "
                             f"{free / 1e6:,.0f} MB 남았다. 디스크를 비우거나 다른 디스크의 --output_dir를 적는다")


def checkpoint_bytes(n_trainable: int) -> int:
    """체크포인트 하나의 크기: fp32 가중치와 Adam의 두 모멘트, 그리고 토크나이저와 기록."""
    return 12 * n_trainable + (5 << 20)


@contextlib.contextmanager
def open_run(settings: Settings, inputs: Inputs, say: Callable[[str], None]) -> Iterator[Run]:
    """`output_dir`를 잠그고 새로 시작할지 이어 갈지 정한다. `with`를 나가거나 프로세스가 죽으면 잠금이 풀린다.

    Raises:
        UsageError: 다른 실행이 쓰는 중이거나, 이어 갈 것이 없거나, 조건이 바뀌었거나, 이미 무언가 들어 있다.
    """
    folder = Path(settings.output_dir)
    facts = describe(settings, inputs)
    info = PromptInfo(inputs.prompter.template, inputs.tokenizer.convert_ids_to_tokens(inputs.end_id), inputs.end_id,
                      settings.cutoff_len, inputs.end_ids, tuple(inputs.encoder.head))
    if not folder.exists():
        choose_checkpoint(settings, facts, say)
    with locked(folder):
        chosen = choose_checkpoint(settings, facts, say)
        if is_first_process():
            checkpoint.sweep(folder)
        yield Run(folder, chosen, facts, info, command({"resume_from_checkpoint": "True"}))


def require_startable(settings: Settings) -> None:
    """새로 시작하는 실행이면, 큰 데이터를 다 읽은 뒤에야 알지 않게 `output_dir`를 먼저 본다.

    Raises:
        UsageError: 이미 무언가 들어 있다.
    """
    if not settings.resume_from_checkpoint:
        require_fresh(Path(settings.output_dir))


def choose_checkpoint(settings: Settings, facts: dict, say: Callable[[str], None]) -> Path | None:
    """이어 갈 체크포인트를 고른다. 적지 않으면 이어 가지 않고, 이미 있는 실행 위에 쓰지도 않는다."""
    folder, asked = Path(settings.output_dir), settings.resume_from_checkpoint
    if asked is None or asked is False:
        require_fresh(folder)
        return None
    chosen = _newest(folder, say) if asked is True else _named(folder, Path(asked))
    changed = differences(seals.read_manifest(chosen)["run"], facts)
    if changed:
        raise UsageError(f"조건이 바뀌어 {chosen}에서 이어 갈 수 없다. {' / '.join(changed)}. "
                         "같은 조건으로 다시 실행하거나 다른 --output_dir에서 새로 시작한다")
    if is_finished(folder, facts):
        raise UsageError(f"이미 끝난 실행이다. 어댑터: {folder}. "
                         f"더 배우려면 --{EPOCHS}를 {facts[EPOCHS]['id']:g}보다 크게 적는다")
    say(f"이어 가기: {chosen}")
    return chosen


def require_fresh(folder: Path) -> None:
    """새로 시작할 폴더에 앞선 실행도, 다른 모델도 없는지 본다."""
    elsewhere = command_elsewhere(str(folder), {})
    saved = checkpoint.checkpoints(folder)
    if (folder / ADAPTER_WEIGHTS).exists() and ((folder / RUN_FILE).exists() or not saved):
        raise UsageError(f"output_dir에 이미 어댑터가 있다: {folder}. 덮어쓰지 않는다. "
                         f"다른 폴더에서 시작하는 명령: {elsewhere}")
    if saved:
        raise UsageError(f"끝나지 않은 실행이 있다: {folder}({saved[-1].name}까지). "
                         f"이어 가는 명령: {command({'resume_from_checkpoint': 'True'})} / "
                         f"다른 폴더에서 새로 시작하는 명령: {elsewhere}")
    if others := strangers(folder):
        more = f" 밖의 {len(others) - 3}개" if len(others) > 3 else ""
        raise UsageError(f"output_dir에 다른 파일이 있다: {folder}({', '.join(others[:3])}{more}). 섞이거나 덮이지 "
                         f"않게 빈 폴더나 새 폴더를 적는다: {elsewhere}")


def strangers(folder: Path) -> list[str]:
    """폴더에 든 것 가운데 학습이 덮어쓰거나 어댑터와 섞일 것의 이름. 로그나 데이터 파일은 함께 있어도 된다."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted(file.name for file in inside if file.name in CLASHING or file.suffix in WEIGHT_SUFFIXES)


def is_finished(folder: Path, facts: dict) -> bool:
    """같은 epoch까지 배운 온전한 어댑터와 기록이 있는지."""
    manifest = seals.read_manifest(folder)
    if manifest is None or seals.damage(folder, ADAPTER_FILES) or not (folder / RUN_FILE).is_file():
        return False
    return manifest["run"].get(EPOCHS, {}).get("id", 0) >= facts[EPOCHS]["id"]


def command(changes: dict[str, str | None]) -> str:
    """지금의 명령줄에서 플래그만 바꾼 명령. None이면 그 플래그를 뺀다."""
    kept, skip = [], False
    for token in sys.argv:
        name = flag_name(token)
        if name is not None:
            skip = name in changes
        if not skip:
            kept.append(token)
    kept += [word for name, value in changes.items() if value is not None for word in (f"--{name}", value)]
    world = n_processes()
    launcher = ["python"] if world == 1 else ["torchrun", "--standalone", f"--nproc_per_node={world}"]
    return shown_command([*launcher, *kept])


def command_elsewhere(output_dir: str, changes: dict[str, str | None]) -> str:
    """지금의 명령줄에서 플래그를 바꾸고, 아직 없는 폴더에서 학습을 새로 시작하는 명령. 지금의 결과를 덮지 않는다."""
    started = dict.fromkeys(("resume_from_checkpoint", "check_data", "repair_data"))
    return command({**started, **changes, "output_dir": _unused(Path(output_dir))})


def _newest(folder: Path, say: Callable[[str], None]) -> Path:
    found = checkpoint.checkpoints(folder)
    reasons = []
    for candidate in reversed(found):
        reason = checkpoint.damage(candidate)
        if reason is None:
            for line in reasons:
                say(f"경고: 손상된 체크포인트를 건너뛴다. {line}")
            return candidate
        reasons.append(f"{candidate}: {reason}")
    detail = f"손상된 것: {' / '.join(reasons)}. " if reasons else ""
    raise UsageError(f"이어 갈 온전한 체크포인트가 없다: {folder}. {detail}--output_dir를 보거나, 처음부터 배우려면 "
                     "--resume_from_checkpoint를 뺀다")


def _named(folder: Path, asked: Path) -> Path:
    if not asked.is_dir():
        raise UsageError(f"체크포인트 폴더가 없다: {asked}")
    if asked.resolve().parent != folder.resolve() or asked not in checkpoint.checkpoints(asked.parent):
        raise UsageError(f"output_dir({folder}) 안의 checkpoint-N이 아니다: {asked}. 이어 가려면 --output_dir를 "
                         "그 체크포인트가 든 폴더로 적는다")
    reason = checkpoint.damage(asked)
    if reason:
        raise UsageError(f"체크포인트가 손상되었다. {asked}: {reason}. 가장 새로운 온전한 것에서 이어 가려면 "
                         "--resume_from_checkpoint True를 적는다")
    return asked


def _unused(folder: Path) -> str:
    folder = folder if folder.name else folder.absolute() / "train"  # `.`이나 `/`에는 이름이 없다
    number = 2
    while folder.with_name(f"{folder.name}-{number}").exists():
        number += 1
    return folder.with_name(f"{folder.name}-{number}").as_posix()
