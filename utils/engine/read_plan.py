"""질문을 읽는 행렬 곱의 상수: 블록의 수와 공유 메모리."""

from math import ceil

from utils.engine.decode_space import CODES, ROWS, UNIT

READERS = 256        # 스레드 수
READ_TOKENS = 64     # 블록 하나가 맡는 토큰의 수
MANY_ROWS = MANY_TOKENS = 128  # 토큰이 많을 때 블록 하나가 맡는 행과 토큰의 수


class ReadPlan:
    """`Plan`의 일부.

    Args:
        value_bits: 가중치의 값 하나의 비트 수.
        codes_at: 8비트 코드표가 놓이는 공유 메모리의 자리(바이트). NF4의 표의 다음이다.
        multiprocessors, shared_limit: `Plan`의 것.
        roomy: 공유 메모리가 넉넉해 앞서 읽는 조각을 늘리는지.

    Attributes:
        fits_many, many_shared: 토큰이 많을 때의 `read_many`가 이 GPU의 공유 메모리에 들어가는지, 그 크기(바이트).
        defines: 커널의 `-D` 상수.
    """

    def __init__(self, value_bits: int, codes_at: int, multiprocessors: int, shared_limit: int, roomy: bool):
        self._multiprocessors, self._limit = multiprocessors, shared_limit
        self._inputs_at = codes_at + CODES
        self._stages = 4 if roomy else 2
        # 조각 하나: 활성값 16비트 [MANY_TOKENS, UNIT], 가중치 [MANY_ROWS, UNIT]과 그 배율 fp32 [MANY_ROWS]
        piece = MANY_TOKENS * UNIT * 2 + MANY_ROWS * (UNIT * value_bits // 8 + 4)
        self.many_shared = self._inputs_at + self._stages * piece
        self.fits_many = self.many_shared <= shared_limit
        self.defines = {
            "READERS": READERS, "READ_TOKENS": READ_TOKENS, "READ_UNIT": UNIT, "READ_STAGES": self._stages,
            "READ_INPUTS_AT": self._inputs_at, "READ_CODES_AT": codes_at, "MANY_ROWS": MANY_ROWS,
            "MANY_TOKENS": MANY_TOKENS}

    def grid(self, rows: int) -> tuple[int, int, int]:
        """(행을 나누어 맡는 블록의 수, 행을 나누어 맡는 워프의 수, 공유 메모리).

        남는 워프는 칸을 나누어 맡는다. 토큰의 수와 상관없이 정해지므로 함께 읽어도 더하는 차례가 같다.
        """
        tiles = ceil(rows / ROWS)
        row_warps = 4 if 2 * tiles >= 5 * self._multiprocessors else 2
        while (shared := self._shared(row_warps)) > self._limit:
            row_warps *= 2
        return ceil(tiles / row_warps), row_warps, shared

    @property
    def most_shared(self) -> int:
        """`grid`가 주는 공유 메모리의 최댓값(바이트)."""
        return min(self._shared(2), self._limit)

    def _shared(self, row_warps: int) -> int:
        shares = READERS // 32 // row_warps
        return self._inputs_at + self._stages * shares * READ_TOKENS * UNIT * 2
