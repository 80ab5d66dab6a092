"""`python -m utils.doctor`: 환경을 모두 검사하고, 고쳐야 할 것이 있으면 종료 코드 1로 끝낸다."""

import sys

from utils.console import hush_libraries, use_utf8
from utils.helptext import asks_help, help_text


def check() -> int:
    """이 컴퓨터에서 학습하고 대화할 수 있는지 한 줄씩 검사한다. 플래그는 없다.

    Python과 패키지, 드라이버, 4비트 계산, VRAM과 RAM과 디스크, 콘솔, 포트, 모델의 파일을 60초 안에 본다. 고쳐야 할
    것마다 고치는 명령을 말하고, 하나라도 있으면 종료 코드 1로 끝낸다.

    Examples:
        python -m utils.doctor
        python -m utils.doctor > doctor.txt
    """
    from utils.doctor.checks import main

    return main()


if __name__ == "__main__":
    use_utf8()
    hush_libraries()
    words = sys.argv[1:]
    if asks_help(words):
        print(help_text(check))
    elif words:
        print(f"오류: 쓰지 않는 것을 적었다: {' '.join(words)}. python -m utils.doctor 만 적는다", file=sys.stderr)
        sys.exit(2)
    else:
        sys.exit(check())
