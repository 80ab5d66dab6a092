"""사용자가 스스로 고칠 수 있는 오류 하나."""

import errno
import json

_WHY = {
    errno.ENOENT: "그런 자리가 없다",
    errno.EEXIST: "같은 이름의 파일이 있다",
    errno.ENOTDIR: "도중에 폴더가 아닌 파일이 있다",
    errno.EISDIR: "파일이 아니라 폴더다",
    errno.EACCES: "권한이 없다",
    errno.EPERM: "권한이 없다",
    errno.EROFS: "읽기만 되는 디스크다",
    errno.ENOSPC: "디스크가 찼다",
    errno.ENAMETOOLONG: "이름이 너무 길다",
    errno.EINVAL: "이름에 쓸 수 없는 글자가 있다",
    errno.ELOOP: "링크가 자기를 가리킨다",
}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BAD_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
_JSON_WORDS = {  # json 모듈의 오류 -> 사람의 말
    "Expecting value": "값이 있어야 할 자리다", "Expecting property name": "큰따옴표로 감싼 이름이 있어야 할 자리다",
    "Expecting ',' delimiter": "쉼표나 닫는 괄호가 있어야 할 자리다", "Extra data": "값이 끝난 뒤에 다른 글이 있다",
    "Expecting ':' delimiter": "콜론이 있어야 할 자리다", "Unterminated string": "큰따옴표가 닫히지 않았다",
    "Invalid control character": "따옴표 안의 줄바꿈이나 탭은 \\n, \\t로 적는다", "Invalid \\": "\\ 뒤의 글자가 틀렸다",
    "Illegal trailing comma": "마지막 값 뒤의 쉼표를 뺀다"}


# torch, 드라이버, cuBLAS와 cuDNN이 VRAM이 모자랄 때 하는 말
_NO_VRAM = ("CUDA out of memory", "CUDA error: out of memory", "CUDA_ERROR_OUT_OF_MEMORY", "_STATUS_ALLOC_FAILED")
_MEMORY = (  # (라이브러리의 오류에 든 말, 사용자에게 할 말)
    (_NO_VRAM,
     "VRAM이 모자라다. 카드를 쓰는 다른 프로그램을 닫거나 더 작은 모델을 쓴다"),
    (("DefaultCPUAllocator", "Unable to allocate", "WinError 1455", "os error 1455"),
     "RAM이 모자라다. 다른 프로그램을 닫거나 페이지 파일(Windows의 가상 메모리, Linux의 스왑)을 늘린다"))


class UsageError(Exception):
    """사용자의 입력이나 환경이 잘못되었을 때 올린다.

    스크립트는 이 예외만 한국어 한 줄로 보여 주고 종료 코드 2로 끝낸다. 문장에는 무엇이 잘못되었는지, 그 값은
    무엇인지, 무엇을 하면 되는지가 들어간다. 다른 예외는 프로그램의 결함이므로 traceback을 그대로 남긴다.
    """


def why(error: OSError) -> str:
    """운영 체제가 거절한 이유를 한국어로. 모르는 것은 운영 체제의 말 그대로다."""
    return _WHY.get(error.errno) or error.strerror or str(error)


def disk_reason(error: Exception) -> str | None:
    """디스크나 경로 탓에 운영 체제가 거절한 오류면 무엇이 문제이고 무엇을 할지 한 줄. 다른 오류면 None."""
    number, name = (getattr(error, key, None) for key in ("errno", "filename"))
    if isinstance(error, OSError) and number in FULL_DISK:
        return f"디스크가 차서 쓰지 못했다{f': {name}' if name else ''}. 자리를 비운 뒤 다시 실행한다"
    if isinstance(error, OSError) and number in _BAD_PLACE and name:
        return f"쓸 수 없는 경로다({why(error)}): {name}. 다른 경로를 적는다"
    return None


def memory_reason(error: Exception) -> str | None:
    """메모리가 모자라 난 오류면 무엇이 모자라고 무엇을 할지 한 줄. 다른 오류면 None."""
    said = str(error) or "Unable to allocate" * isinstance(error, MemoryError)  # Python의 MemoryError는 말이 없다
    return next((advice for marks, advice in _MEMORY if any(mark in said for mark in marks)), None)


def lacks_vram(error: Exception) -> bool:
    """VRAM이 모자라 난 오류인지."""
    return any(mark in str(error) for mark in _NO_VRAM)


def first_line(error: Exception) -> str:
    """라이브러리가 던진 오류의 첫 줄. 콜론으로 끝나면 다음 줄까지다. 글이 없으면 오류의 이름이다."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return (f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first)[:200]


def json_reason(error: Exception) -> str:
    """JSON으로 읽히지 않는 이유와 자리. JSON의 오류가 아니면 오류의 이름이다."""
    if not isinstance(error, json.JSONDecodeError):
        return type(error).__name__
    words = next((words for start, words in _JSON_WORDS.items() if error.msg.startswith(start)), error.msg)
    line = f"{error.lineno}번째 줄 " if error.lineno > 1 else ""
    return f"{words}({line}{error.colno}번째 글자)"
