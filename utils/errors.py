"""사용자가 스스로 고칠 수 있는 오류 하나."""

import errno

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
}


class UsageError(Exception):
    """사용자의 입력이나 환경이 잘못되었을 때 올린다.

    스크립트는 이 예외만 한국어 한 줄로 보여 주고 종료 코드 2로 끝낸다. 문장에는 무엇이 잘못되었는지, 그 값은
    무엇인지, 무엇을 하면 되는지가 들어간다. 다른 예외는 프로그램의 결함이므로 traceback을 그대로 남긴다.
    """


def why(error: OSError) -> str:
    """운영 체제가 거절한 이유를 한국어로. 모르는 것은 운영 체제의 말 그대로다."""
    return _WHY.get(error.errno) or error.strerror or str(error)


def first_line(error: Exception) -> str:
    """라이브러리가 던진 오류의 첫 줄. 글이 없으면 오류의 이름이다."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
