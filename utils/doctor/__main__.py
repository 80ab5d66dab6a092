"""`python -m utils.doctor`: 환경을 모두 검사하고, 고쳐야 할 것이 있으면 종료 코드 1로 끝낸다."""

import sys

from utils.console import hush_libraries, use_utf8
from utils.doctor.checks import main

if __name__ == "__main__":
    use_utf8()
    hush_libraries()
    sys.exit(main())
