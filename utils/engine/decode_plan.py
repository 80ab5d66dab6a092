"""토큰을 만드는 커널의 모든 상수를 정하는 한곳: 모델의 크기, 블록의 수, 공유 메모리, KV cache 한 쪽의 자리.

커널은 여기서 만든 값을 `-D` 상수로 받을 뿐 아무것도 새로 정하지 않는다.
"""

from dataclasses import dataclass, replace
from math import ceil

import torch

from utils.engine.cuda import CompileError
from utils.engine.decode_space import INT8, NF4, ROWS, SLOT, SPACE_AT, WARPS, WIDE, Space, lora_rows, lora_tile
from utils.engine.family import ACTIVATION_CODES, Family
from utils.engine.kv_cache import PAGE, PageLayout
from utils.engine.lines_plan import LinesPlan
from utils.engine.read_plan import ReadPlan

SOURCES = ("device.cuh", "decode_common.cu", "decode_product.cu", "decode_attention.cu", "decode.cu",
           "decode_sample.cu", "decode_read.cu", "decode_prefill.cu", "decode_rows.cu")
THREADS = WARPS * 32
PIECES_AHEAD = 4, 2  # 워프가 앞서 읽는 가중치 조각의 수: 병렬 잔차, 차례로 읽는 구조. H100에서 잰 것이다
CHOOSERS = 1024      # 뽑는 커널의 스레드 수
SPLIT_THREADS = 128  # 읽은 q, k, v를 머리별로 나누는 커널의 스레드 수
ATTENDERS = 256      # attention 커널의 스레드 수
CHUNK = 128          # 위치를 블록끼리 나누는 단위
ALONE = 256          # 볼 위치가 이만큼까지면 나누지 않는다. 나누어 합치는 것보다 두 번 도는 쪽이 빠르다
ATTEND_SOON = 512    # 볼 위치가 이만큼까지면 q, k, v를 곱한 블록이 이어서 attention을 센다. PAGE 이하다
ATTEND_TILES = 3, 6  # attention을 이어서, 따로 세는 데 드는 시간. 행렬의 묶음(tile) 몇 개를 곱하는 시간인지
SPLITS = 32          # 머리 하나의 위치를 나누어 맡는 블록의 최대 수
MOST_QUERIES = 4     # attention 블록 하나가 맡는 q 머리의 최대 수
VALUE_BITS = 16, 4, 8  # WIDE, NF4, INT8의 값 하나의 비트 수
ROOMY = 160_000      # 블록의 공유 메모리(바이트)가 이만큼이면 NF4의 표의 간격과 앞서 읽는 조각을 늘린다
SCRATCH = 2 * WARPS * 8  # norm이 쓰는 공유 메모리(바이트)


@dataclass(frozen=True)
class Grid:
    """커널 하나의 블록 수, 블록 하나의 최대 묶음 수, 공유 메모리(바이트)."""

    blocks: int
    slots: int
    shared: int


class Plan:
    """모델 하나와 GPU 하나를 위한 상수.

    Args:
        family: 구조.
        vocab: 고를 수 있는 토큰의 수.
        rank: LoRA의 r. 없으면 0.
        weight: WIDE(16비트), NF4, INT8.
        double_quant: NF4의 절댓값도 양자화했는지.
        bf16: 활성값과 16비트 가중치가 bf16인지. 아니면 fp16이다.
        multiprocessors, shared_limit: GPU의 SM 수, 블록 하나의 최대 공유 메모리(바이트).

    Attributes:
        defines: 커널의 `-D` 상수.
        pages: KV cache 한 쪽의 자리.
        project_qkv, project_mlp, contract_out, contract_down, head: 커널의 `Grid`. 병렬 잔차면 project와 contract가
            하나씩이라 둘이 같다.
        attend_soon: 볼 위치가 이만큼까지면 project가 attention까지 센다. 0이면 늘 따로 센다.
        qkv_blocks, mlp_blocks: project에서 qkv와 MLP를 맡는 블록의 수.
        lines: 여러 질문에 함께 답하는 커널의 `LinesPlan`.
        reads: 질문을 읽는 커널의 `ReadPlan`.
        lora_rows: LoRA의 A에서 나란한 행렬 하나가 차지하는 행(0으로 채운 것까지).

    Raises:
        CompileError: 이 GPU의 공유 메모리에 들어가지 않는다.
    """

    def __init__(self, family: Family, vocab: int, rank: int, weight: int, double_quant: bool, bf16: bool,
                 multiprocessors: int, shared_limit: int):
        roomy = shared_limit >= ROOMY
        self.multiprocessors, self._limit = multiprocessors, shared_limit
        self._space = Space.of(weight, rank, roomy)
        self.queries = max(q for q in range(1, MOST_QUERIES + 1) if family.heads // family.kv_heads % q == 0)
        self.pages = PageLayout.of(family)
        self.lora_rows = lora_rows(rank)
        attending = self._attend_space(family.head_dim)
        head_tiles = family.head_dim // ROWS * (3 if family.interleaved else 1)
        self._head_tiles = head_tiles if attending <= shared_limit else 0
        self._norm = SCRATCH + max(family.hidden, THREADS) * 4  # 다 쓴 입력의 자리에 블록이 만든 act를 둔다
        copies = 2 if weight == WIDE else 1
        (self._lay_parallel if family.parallel else self._lay_in_turn)(family, copies)
        # 이어서 세는 블록은 다른 블록을 기다리므로 모든 블록이 함께 돌아야 한다
        resident = self.project_qkv.blocks <= multiprocessors
        follows = resident and self._whole_heads(family.qkv_width // ROWS, self.qkv_blocks)
        self.attend_soon = ATTEND_SOON if follows else 0
        if self.attend_soon:
            self.project_qkv = replace(self.project_qkv, shared=max(self.project_qkv.shared, attending))
        self.head = self._grid(ceil(vocab / ROWS), self._norm, 1)
        self.lines = LinesPlan(family, vocab, rank, family.heads // self.queries, self._space.down_at,
                               multiprocessors, shared_limit)
        self.reads = ReadPlan(VALUE_BITS[weight], SPACE_AT + self._space.table, multiprocessors, shared_limit, roomy)
        self.in_scale = 1 / 64 if family.gated else 1.0  # gate * up이 fp16의 범위를 넘지 않게 한다
        self.choose_shared = 2 * ceil(vocab / 32) * 4
        self.defines = {
            **_family_defines(family), **self._kernel_defines(family, vocab, rank, weight),
            "DOUBLE_QUANT": int(double_quant), "BF16": int(bf16),
            "ACT_BF16": int(bf16 and weight == WIDE),  # NF4와 int8은 활성값도 fp16으로 센다. bf16보다 정밀하다
            "EMBEDDING_SCALE": _real(family.scale_of_embedding(torch.bfloat16 if bf16 else torch.float16)),
            **self.lines.defines, **self.reads.defines}

    def _lay_parallel(self, family: Family, copies: int) -> None:
        """병렬 잔차: qkv와 MLP의 앞쪽을 한 커널이, 둘의 뒤쪽을 한 커널이 곱한다.

        Args:
            copies: 활성값 하나의 16비트 사본의 수.
        """
        extra = self._space.before_slots(max(_qkv_parts(family), _pair(family)), self._norm)
        self.qkv_blocks, grid = self._shared_grid(family.qkv_width // ROWS, family.ff // ROWS, _pair(family), extra)
        self.project_qkv = self.project_mlp = grid
        self.mlp_blocks = grid.blocks - self.qkv_blocks
        extra = self._space.before_slots(1, (family.ff + family.q_width) * 2 * copies)
        self.contract_out = self.contract_down = self._grid(family.hidden // ROWS, extra, 2)

    def _lay_in_turn(self, family: Family, copies: int) -> None:
        """차례로 읽는 구조: 커널 넷이 하나씩 곱한다."""
        qkv_tiles, before = family.qkv_width // ROWS, self._space.before_slots
        extra = before(_qkv_parts(family), self._norm)
        grid = self._grid(qkv_tiles, extra, 1)
        whole = max((n for n in range(1, grid.blocks + 1) if self._whole_heads(qkv_tiles, n)), default=grid.blocks)
        if qkv_tiles // whole + ATTEND_TILES[0] < grid.slots + ATTEND_TILES[1]:
            grid = Grid(whole, ceil(qkv_tiles / whole), extra + ceil(qkv_tiles / whole) * SLOT)
        self.project_qkv = grid
        self.project_mlp = self._grid(family.ff // ROWS, before(_pair(family), self._norm), _pair(family))
        self.qkv_blocks, self.mlp_blocks = self.project_qkv.blocks, self.project_mlp.blocks
        self.contract_out = self._grid(family.hidden // ROWS, before(1, family.q_width * 2 * copies), 1)
        self.contract_down = self._grid(family.hidden // ROWS, before(0, family.ff * 2 * copies), 1)

    def _kernel_defines(self, family: Family, vocab: int, rank: int, weight: int) -> dict:
        """커널의 모양과 공유 메모리의 자리."""
        space, ahead = self._space, PIECES_AHEAD[0 if family.parallel else 1]
        return {
            "VOCAB": vocab, "RANK": rank, "LORA_DOWN": space.lora_down, "SLOT_BYTES": SLOT,
            "DOWN_AT": space.down_at, "SUMS_AT": space.sums_at,
            "LORA_TILE": lora_tile(rank), "LORA_ROWS": self.lora_rows, "MLP_BLOCKS": self.mlp_blocks,
            "MLP_ROWS": ceil(family.ff // ROWS / self.mlp_blocks) * ROWS,  # 블록 하나가 만드는 act의 최대 행
            # 블록 하나의 묶음의 최대 수
            "QKV_TILES": ceil(family.qkv_width // ROWS / self.qkv_blocks),
            "MLP_TILES": ceil(family.ff // ROWS / self.mlp_blocks) * _pair(family),
            "OUT_TILES": ceil(family.hidden // ROWS / self.contract_out.blocks),
            "DOWN_TILES": ceil(family.hidden // ROWS / self.contract_down.blocks), "HEAD_TILES": self.head.slots,
            # 병렬 잔차면 두 선형층이 레지스터를 나누어 쓴다. 묶음이 하나면 다음 것을 미리 읽을 일이 없다
            "PIECES_AHEAD": ahead,
            "OUT_AHEAD": ahead if not family.parallel else 2 if family.hidden // ROWS > self.contract_out.blocks else 1,
            "WIDE_WEIGHT": WIDE, "NF4_WEIGHT": NF4, "INT8_WEIGHT": INT8, "WEIGHT": weight, "TABLE_BYTES": space.table,
            "TABLE_STEP": space.table_step, "SPACE_AT": SPACE_AT,
            "ROWS": ROWS, "WARPS": WARPS, "THREADS": THREADS, "CHOOSERS": CHOOSERS, "SPLIT_THREADS": SPLIT_THREADS,
            "ATTENDERS": ATTENDERS, "CHUNK": CHUNK, "ALONE": ALONE, "SPLITS": SPLITS, "HEADS_PER_BLOCK": self.queries,
            "PAGE": PAGE, "PAGES": ceil(family.context / PAGE), "GROUP": self.pages.group,
            "PAGE_SCALES": self.pages.scales, "PAGE_TURNS": self.pages.turns, "IN_SCALE": _real(self.in_scale)}

    def shared(self, name: str) -> int:
        """커널이 쓰는 동적 공유 메모리의 최댓값(바이트)."""
        if name == "read_linear":
            return self.reads.most_shared
        if name == "read_many":
            return self.reads.many_shared if self.reads.fits_many else 0
        grids = {"project": (self.project_qkv, self.project_mlp), "contract": (self.contract_out,),
                 "contract_attention": (self.contract_out,), "contract_mlp": (self.contract_down,),
                 "head": (self.head,)}
        if name.endswith("_lines"):
            return self.lines.shared if self.lines.fits else 0
        return max((grid.shared for grid in grids.get(name, ())), default=self.choose_shared if name == "choose" else 0)

    def _grid(self, units: int, extra: int, slots_per_unit: int) -> Grid:
        """units개의 단위를 나누어 맡는 블록들. 단위 하나는 출력 ROWS행이고 합의 자리 slots_per_unit개를 쓴다."""
        most = min(THREADS // ROWS, (self._limit - extra) // (SLOT * slots_per_unit))
        if most < 1:
            raise CompileError(f"공유 메모리가 모자란다: {self._limit}바이트")
        blocks = min(units, self.multiprocessors * ceil(units / (self.multiprocessors * most)))
        slots = ceil(units / blocks) * slots_per_unit
        return Grid(blocks, slots, extra + slots * SLOT)

    def _shared_grid(self, qkv: int, mlp: int, pair: int, extra: int) -> tuple[int, Grid]:
        """qkv와 MLP의 앞쪽을 함께 맡는 블록들: (qkv를 맡는 블록의 수, 전체). 두 쪽이 함께 끝나게 나눈다."""
        blocks = max(2, self._grid(qkv + mlp, extra, pair).blocks)
        most = min(THREADS // ROWS, (self._limit - extra) // (SLOT * pair))
        while True:
            ways = []
            for qkv_blocks in range(1, blocks):
                tiles, pairs = ceil(qkv / qkv_blocks), ceil(mlp / (blocks - qkv_blocks))
                if max(tiles, pairs * pair) <= most * pair and max(tiles, pairs) <= THREADS // ROWS:
                    after = ATTEND_TILES[0 if self._whole_heads(qkv, qkv_blocks) else 1]
                    ways.append((max(tiles + after, pairs * pair), qkv_blocks, max(tiles, pairs * pair)))
            if ways:
                _, qkv_blocks, slots = min(ways)
                return qkv_blocks, Grid(blocks, slots, extra + slots * SLOT)
            blocks += 1

    def _whole_heads(self, tiles: int, blocks: int) -> bool:
        """blocks개의 블록이 나눈 묶음들이 머리를 넘지 않아, 그 블록이 attention을 이어서 셀 수 있는지."""
        return self._head_tiles > 0 and tiles % blocks == 0 and self._head_tiles % (tiles // blocks) == 0

    def _attend_space(self, head_dim: int) -> int:
        """project의 블록이 attention을 셀 때의 공유 메모리(바이트). decode_attention.cu의 `AttendSpace`다."""
        return (WARPS + 4) * head_dim * 4 + WARPS * 8 + 2 * head_dim + 4 * head_dim // self.pages.group + 16


def _family_defines(family: Family) -> dict:
    """구조의 크기와 스위치."""
    return {
        "HIDDEN": family.hidden, "FF": family.ff, "HEADS": family.heads, "KV_HEADS": family.kv_heads,
        "HEAD_DIM": family.head_dim, "QDIM": family.q_width, "KVDIM": family.kv_heads * family.head_dim,
        "ROTARY": family.rotary, "LAYERS": family.layers, "CONTEXT": family.context,
        "RMS": int(family.rms), "PRE_NORM": int(family.pre_norm), "POST_NORM": int(family.post_norm),
        "PARALLEL": int(family.parallel), "INTERLEAVED": int(family.interleaved), "QKV_PARTS": _qkv_parts(family),
        "GATED": int(family.gated), "ACTIVATION": ACTIVATION_CODES[family.activation],
        "GELU_TANH": ACTIVATION_CODES["gelu_tanh"], "SILU": ACTIVATION_CODES["silu"],
        "EPS": _real(family.eps), "ATTENTION_SCALE": _real(family.attention_scale),
        "LOGIT_CAP": _real(family.logit_cap), "LOGIT_SCALE": _real(family.logit_scale),
        "RESIDUAL_SCALE": _real(family.residual_scale)}


def _real(value: float) -> str:
    """C++의 float 상수."""
    return f"{value:.9e}f"


def _qkv_parts(family: Family) -> int:
    """q, k, v를 만드는 행렬의 수."""
    return 1 if family.interleaved else 3


def _pair(family: Family) -> int:
    """MLP의 앞쪽에서 나란히 곱하는 행렬의 수(gate와 up)."""
    return 2 if family.gated else 1


def odd_size(family: Family) -> str | None:
    """커널이 다루지 못하는 크기. 다룰 수 있으면 None.

    NF4를 한 번에 128칸씩 읽으므로 선형층의 입력은 128의 배수여야 하고, 출력은 ROWS의 배수여야 한다.
    """
    inputs = family.hidden, family.ff, family.q_width
    if any(width % 128 for width in inputs) or family.qkv_width % ROWS or family.head_dim % 16:
        return "128의 배수가 아닌 크기"
    return None
