"""질문 여럿에 함께 답하는 커널의 상수: 블록의 수, 칸을 나누는 법, 공유 메모리."""

from math import ceil

from utils.engine.decode_space import ROWS, SLOT, SPACE_AT, UNIT, WARPS
from utils.engine.family import Family

LINES = 16           # 함께 답하는 질문의 수
LINE_SPLITS = 16     # 머리 하나의 위치를 나누어 맡는 블록의 최대 수. 줄과 머리가 이미 SM을 채우면 덜 나눈다
LINE_REGISTERS = 32  # MLP의 뒤쪽 행렬을 함께 곱할 때 활성값을 쥐는 레지스터의 수
MOST_SLOTS = 8       # 블록 하나가 합을 모아 두는 묶음의 최대 수
MOST_CUTS = 8        # 잔차에 더하는 선형층의 칸을 나누어 맡는 블록의 최대 수


class LinesPlan:
    """`Plan`의 일부.

    Args:
        heads: attention 커널의 블록이 줄 하나에서 나누어 맡는 머리의 묶음의 수.
        begin: 공유 메모리에서 LoRA의 d가 시작하는 자리(바이트).
        multiprocessors, shared_limit: `Plan`의 것.

    Attributes:
        fits: 이 GPU의 공유 메모리에 들어가는지.
        shared: 공유 메모리(바이트).
        qkv, mlp, out, down, head: 커널마다의 블록 수. 병렬 잔차면 qkv와 mlp가 한 커널이고 out과 down이 같다.
        splits: attention에서 머리 하나의 위치를 나누어 맡는 블록의 수.
        out_cuts, down_cuts: 잔차에 더하는 선형층의 칸을 나누어 맡는 블록의 수.
        defines: 커널의 `-D` 상수.
    """

    def __init__(self, family: Family, vocab: int, rank: int, heads: int, begin: int, multiprocessors: int,
                 shared_limit: int):
        most, pair = multiprocessors, 2 if family.gated else 1
        scratch_at = begin + 3 * rank * LINES * 4
        sums_at = scratch_at + WARPS * LINES * 8 + WARPS * 8 * UNIT * 2
        # 묶음 하나의 합의 자리와, 그 행들의 bias와 LoRA의 B. 짝수라서 gate와 up이 함께 든다
        slot = SLOT * LINES + ROWS * (1 + rank) * 4
        slots = min(MOST_SLOTS, (shared_limit - SPACE_AT - sums_at) // slot // 2 * 2)
        self.fits = slots > 0  # 공유 메모리가 64 KB인 GPU에는 들어가지 않는다
        slots = max(2, slots)
        self.shared = SPACE_AT + sums_at + slots * slot
        self.splits = max(1, min(LINE_SPLITS, 2 * most // (LINES * heads)))
        qkv_tiles, mlp_tiles, out_tiles = family.qkv_width // ROWS, family.ff // ROWS, family.hidden // ROWS
        self.qkv, self.mlp, self.head = (min(most, tiles) for tiles in (qkv_tiles, mlp_tiles, ceil(vocab / ROWS)))
        inputs = [[family.q_width], [family.ff]]
        if family.parallel:  # 두 선형층이 블록을 묶음의 수대로 나눈다
            self.qkv = min(max(1, round(most * qkv_tiles / (qkv_tiles + mlp_tiles * pair))), most - 1)
            self.mlp = most - self.qkv
            inputs = [[family.q_width, family.ff]] * 2
        self.out_cuts, self.down_cuts = (_cuts(out_tiles, widths, most) for widths in inputs)
        self.out, self.down = (min(most // cuts, out_tiles) * cuts for cuts in (self.out_cuts, self.down_cuts))
        self.defines = {
            "LINES": LINES, "LINE_SLOTS": slots, "LINE_REGISTERS": LINE_REGISTERS, "LINE_SCRATCH_AT": scratch_at,
            "LINE_SUMS_AT": sums_at, "LINE_ENDS_AT": sums_at + slots * SLOT * LINES,
            "OUT_CUTS": self.out_cuts, "DOWN_CUTS": self.down_cuts}


def _cuts(tiles: int, widths: list[int], blocks: int) -> int:
    """잔차에 더하는 선형층의 칸을 몇 블록이 나누어 맡을지. widths: 함께 곱하는 행렬들의 칸의 수.

    워프가 지나는 단위(64칸 x 행 16개)의 수와, 블록이 읽는 활성값의 양이 함께 적어지게 고른다.
    """
    units = [width // UNIT for width in widths]

    def cost(cuts: int) -> float:
        steps = ceil(tiles / (blocks // cuts)) * sum(ceil(unit / cuts / WARPS) for unit in units)
        return 5 * steps + sum(units) / cuts

    ways = range(1, min(MOST_CUTS, blocks) + 1)
    return min((cuts for cuts in ways if all(unit % cuts == 0 for unit in units)), key=cost)
