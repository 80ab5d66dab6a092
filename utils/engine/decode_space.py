"""토큰을 만드는 커널이 행렬을 나누는 단위와, 공유 메모리에 무엇이 어느 자리에 놓이는지."""

from dataclasses import dataclass
from math import ceil

ROWS = 16  # 텐서 코어 하나의 높이. 행렬의 행을 이만큼씩 묶는다
WARPS = 16  # H100에서 잰 것: 8이면 블록 둘이 SM 하나에 함께 오르지만 더 느리다(1.3b에서 974 대 1,216 토큰/초)
UNIT = 64  # 워프가 한 번에 지나는 칸의 수. NF4의 절댓값 블록 하나다
WIDE, NF4, INT8 = range(3)  # 가중치의 종류
TABLE_ROW = 128  # NF4의 표 한 줄(바이트)
CODES = 1024  # 8비트 코드표(바이트)
SPACE_AT = 2048  # 커널이 쓰기 시작하는 공유 메모리의 주소. 앞은 드라이버(1,024바이트)와 컴파일러의 것이다
SLOT = ROWS * WARPS * 4  # 묶음 하나의 합의 자리(바이트)


@dataclass(frozen=True)
class Space:
    """토큰을 만드는 커널의 공유 메모리(바이트): NF4의 표, 8비트 코드표, LoRA의 d 셋, 묶음의 합들의 차례로 놓는다.

    커널은 이 자리를 `-D`로 받는다.

    Attributes:
        table_step, table: NF4의 표 한 줄의 간격과 표의 크기. 다른 가중치면 크기가 0이다.
        lora_down: d 하나의 수. rank를 4의 배수로 올린 것이다.
        down_at, sums_at: d와 합들이 시작하는 자리.
        lora_sums: 나란한 행렬 하나의 LoRA가 쓰는 합의 자리의 크기.
    """

    table_step: int
    table: int
    lora_down: int
    down_at: int
    sums_at: int
    lora_sums: int

    @classmethod
    def of(cls, weight: int, rank: int, roomy: bool) -> "Space":
        table_step = TABLE_ROW * (2 if roomy else 1)
        table = 256 * table_step if weight == NF4 else 0
        down_at, lora_down = table + CODES, ceil(rank / 4) * 4
        return cls(table_step, table, lora_down, down_at, down_at + 3 * lora_down * 4,
                   lora_rows(rank) // lora_tile(rank) * SLOT)

    def before_slots(self, lora_parts: int, rest: int) -> int:
        """묶음의 자리를 뺀 크기. rest: 커널마다 더 쓰는 것."""
        return SPACE_AT + self.sums_at + lora_parts * self.lora_sums + rest


def lora_tile(rank: int) -> int:
    """LoRA의 A에서 함께 곱하는 행의 수."""
    return 8 if rank <= 8 else ROWS


def lora_rows(rank: int) -> int:
    """LoRA의 A에서 나란한 행렬 하나가 차지하는 행(0으로 채운 것까지)."""
    return ceil(rank / lora_tile(rank)) * lora_tile(rank)
