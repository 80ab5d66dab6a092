"""Hugging Face hub의 이름을 이 컴퓨터의 폴더로 바꾸고, 그러지 못한 이유를 한국어 한 줄로 말한다."""

import errno
from pathlib import Path

from utils.errors import FULL_DISK, UsageError

SETTINGS_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
MODEL_FILES = (*SETTINGS_FILES, "*.safetensors")
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_RETRY = "인터넷에 이어진 곳에서 받는다: {command}"
_FILE = "받아서 쓸 파일을 적는다: {command}"
_LOGIN = "hub에 로그인한 뒤(hf auth login) 받는다: {command}"
# (오류의 이름이나 글에 든 말, 이유, 할 일). 위에서부터 처음 맞는 것을 말한다.
_REASONS = (
    (("GatedRepoError", "is a gated dataset", "access a gated repo"), "허락이 필요하다",
     "https://huggingface.co/{page}에서 동의하고, " + _LOGIN),
    (("DisabledRepoError",), "hub가 막아 두었다", "다른 것을 쓴다"),
    (("RevisionNotFoundError",), "그런 버전(revision)이 없다", "이름을 다시 본다"),
    (("RepositoryNotFoundError", "DatasetNotFoundError"), "없는 이름이거나 비공개다",
     "이름을 다시 보고, 비공개면 " + _LOGIN),
    (("LocalTokenNotFoundError", "401 ", "403 "), "로그인이 필요하다", _LOGIN),
    (("HFValidationError", "HfUriError"), "hub의 이름이 아니다", "소유자/이름이나 있는 폴더를 적는다"),
    (("Unknown split",), "학습에 쓸 train 부분이 없다", _FILE),
    (("Config name is missing",), "한 이름에 데이터가 여럿이다", _FILE),
    (("Dataset scripts are no longer supported",), "원격 코드를 실행해야 읽힌다. 안전하지 않아 읽지 않는다", _FILE),
    (("EmptyDatasetError", "DataFilesNotFoundError"), "읽을 수 있는 데이터 파일이 없다", "다른 것을 쓴다"),
    (("RemoteEntryNotFoundError", "does not appear to have"), "필요한 파일이 없다",
     "safetensors 가중치와 config.json과 토크나이저가 있는지 hub의 페이지에서 본다"),
    (("OfflineMode", "offline mode", "outgoing traffic has been disabled"),
     "오프라인으로 정해 두었고(HF_HUB_OFFLINE) 받아 둔 것이 없다", _RETRY),
    (("EntryNotFoundError", "TransportError", "ConnectionError", "TimeoutError", "HfHubHTTPError", "ProxyError",
      "couldn't connect", "Couldn't reach"), "인터넷에 닿지 않고 받아 둔 것도 없다", _RETRY),
)


def folder(name: str | Path, cache_dir: str | None = None, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """모델의 폴더. 이미 폴더면 그대로, hub id면 `files`를 받아 둔 폴더다. 끊긴 곳에서는 받아 둔 것을 쓴다.

    Raises:
        UsageError: 받지 못했다. 이유와 받는 명령을 말한다.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), cache_dir=cache_dir, allow_patterns=list(files)))
    except Exception as error:  # hub의 오류는 종류가 많고 모두 사용자가 고칠 일이다
        raise refusal("모델을", name, error, cache_dir) from None


def refusal(what: str, name: str | Path, error: BaseException, cache_dir: str | None = None,
            data: bool = False) -> UsageError:
    """hub의 오류 하나를 한 줄로 옮긴다: 어느 이름인지, 왜인지, 무엇을 하면 되는지.

    Args:
        what: 받으려던 것과 조사("모델을").
        data: 모델이 아니라 데이터를 받으려 했다.
    """
    chain = _chain(error)
    short = Path(str(name)).name
    command = (f"hf download {name} --repo-type dataset --local-dir data/{short}(그 안의 파일 하나를 대신 적는다)"
               if data else f'hf download {name} --local-dir resources/{short} --exclude "*.bin"'
                            "(그 폴더를 --base_model로 적는다)")
    page = f"datasets/{name}" if data else name
    reason, advice = _reason(chain)
    broken = next((part for part in chain if getattr(part, "errno", None) in (*FULL_DISK, *_CLOSED)), None)
    if broken is not None:
        where = broken.filename or cache_dir or "받은 것을 두는 폴더"
        reason = f"{'디스크가 찼다' if broken.errno in FULL_DISK else '쓸 수 없는 폴더다'}: {where}"
        advice = "자리를 비우거나 --cache_dir로 다른 폴더를 적는다"
    return UsageError(f"hub에서 {what} 받지 못했다: {name}. {reason}. {advice.format(command=command, page=page)}")


def _reason(chain: list[BaseException]) -> tuple[str, str]:
    names = " ".join(kind.__name__ for part in chain for kind in type(part).__mro__)
    said = names + " ".join(map(str, chain))
    for marks, reason, advice in _REASONS:
        if any(mark in said for mark in marks):
            return reason, advice
    first = (str(chain[0]).strip().splitlines() or [""])[0][:200]
    return f"{type(chain[0]).__name__}: {first}", _RETRY


def _chain(error: BaseException) -> list[BaseException]:
    """오류와 그 오류를 일으킨 오류들. 라이브러리는 hub의 오류를 제 오류로 감싼다."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
