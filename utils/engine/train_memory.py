"""학습 엔진이 잡는 메모리의 크기를 정하는 단 한 곳. 엔진은 이대로 잡고, planner는 이것으로 예측한다.

모두 토큰 하나마다의 원소 수다(16비트면 곱하기 2가 바이트). `tails`는 LoRA가 선형층의 입력 끝에 덧붙이는 칸의 수다.
"""

from dataclasses import dataclass

from utils.engine.family import Family
from utils.model.loss import pad_vocab

LOGIT_ROWS, FEWER_LOGIT_ROWS = 256, 128  # logits를 한 번에 만드는 토큰 수. 메모리가 모자라 재계산하면 뒤의 것
ROW_UNIT = 64  # 행렬 곱의 행이 시작하는 단위. 16비트 64개가 128바이트다
RANK_UNIT = 8  # 커널은 16바이트(16비트 8개)씩 읽는다
STATS = 8  # 두 norm의 평균과 1/표준편차. fp32 넷을 16비트로 센 것
TILE_ROWS = 64  # A의 gradient를 이만큼의 행마다 따로 더한 fp32 부분합이 잠시 있다


def pad_rank(rank: int) -> int:
    """16바이트 단위로 읽도록 8의 배수로 올린 rank."""
    return -(-rank // RANK_UNIT) * RANK_UNIT


def pad_row(width: int) -> int:
    """행이 128바이트의 배수에서 시작하게 올린 폭. 텐서 코어에 넣는 복사(TMA)가 그 단위다."""
    return -(-width // ROW_UNIT) * ROW_UNIT


@dataclass(frozen=True)
class Tails:
    """같은 입력을 읽는 선형층들의 입력 끝에 붙는 LoRA의 칸 수. q, k, v가 모두 배우면 qkv는 3 x 올린 rank다."""

    qkv: int = 0
    out: int = 0
    mlp: int = 0
    down: int = 0

    @classmethod
    def of(cls, family: Family, targets: tuple[str, ...], rank: int) -> "Tails":
        """`targets`는 선형층의 이름들이다."""
        widths = dict.fromkeys(("qkv", "out", "mlp", "down"), 0)
        for name, shape in family.linears().items():
            widths[shape.slot] += pad_rank(rank) if name in targets else 0
        return cls(**widths)

    def total(self) -> int:
        return self.qkv + self.out + self.mlp + self.down


def saved_widths(family: Family, tails: Tails) -> dict[str, int]:
    """층마다 backward까지 남기는 것. 재계산하는 층은 함께 쓰는 한 벌에 잠시 적는다.

    입력 x와 LoRA의 z는 재계산하는 층도 남기므로 여기에 들지 않는다. attention의 출력과 점수의 로그 합은
    `attention_bytes`에 있다.
    """
    widths = {
        "qkv": family.qkv_width,  # 회전한 q, k와 v. 머리마다 norm이 있으면 norm을 걸기 전의 것
        "h": family.mlp_width,    # 활성 함수의 앞. 뒤의 것은 싸므로 다시 구한다
    }
    if not family.parallel:
        widths["mid"] = family.hidden  # attention까지 더한 잔차
    if family.post_norm:
        widths["post1"] = widths["post2"] = family.hidden  # attention과 MLP의 출력, norm을 걸기 전
    return widths


def kept_widths(family: Family, tails: Tails) -> dict[str, int]:
    """재계산하든 않든 모든 층이 남기는 것."""
    return {"x": family.hidden, "z": tails.total(), "stats": STATS}


def attention_bytes(family: Family) -> int:
    """attention이 층마다 남기는 토큰당 바이트: 16비트 출력과, 머리마다 fp32 하나인 점수의 로그 합."""
    return 2 * family.q_width + 4 * family.heads


def work_widths(family: Family, tails: Tails) -> dict[str, int]:
    """한 층을 계산하는 동안만 쓰고 모든 층이 함께 쓰는 버퍼."""
    # 행렬 곱의 입력과 출력
    wide = {
        "n1": family.hidden + (tails.qkv if family.parallel else max(tails.qkv, tails.mlp)),
        "n2": family.hidden + tails.mlp if family.parallel else 0,  # 차례로 읽는 구조는 n1을 다시 쓴다
        # attention의 출력, 활성 함수의 뒤, 그 gradient, 마지막 은닉값의 gradient. 함께 쓰이지 않는다
        "g": max(family.hidden, family.q_width + tails.out, family.ff + tails.down),
        # 다시 구한 선형층의 입력, norm을 걸고 돌린 q와 k. 함께 쓰이지 않는다
        "t": max(family.ff if tails.down else 0, family.qk_width if family.qk_norm else 0),
    }
    return {name: pad_row(width) for name, width in wide.items()}


def lent_width(family: Family, tails: Tails) -> int:
    """손실을 구하는 동안 비는 토큰마다의 칸: 마지막 은닉값의 gradient 뒤의 g와, 바로 뒤에 놓인 t."""
    widths = work_widths(family, tails)
    return widths["g"] - pad_row(family.hidden) + widths["t"]


def scratch_elements(family: Family, tails: Tails, tokens: int, recompute: int) -> int:
    """푼 가중치와 logits 한 조각이 번갈아 쓰는 자리의 원소 수. logits는 바로 앞의 빈 칸(`lent_width`)까지 쓴다.

    어휘가 15만이면 logits 한 조각은 78 MB다. 더 크게 만들어도 빨라지지 않는다.
    """
    rows = LOGIT_ROWS if recompute == 0 else FEWER_LOGIT_ROWS
    logits = min(tokens, rows) * pad_vocab(family.vocab)
    return max(weight_elements(family, tails), logits - tokens * lent_width(family, tails))


def weight_elements(family: Family, tails: Tails) -> int:
    """NF4 가중치를 푸는 자리의 원소 수: 함께 곱하는 행렬들을 세로로 쌓고 LoRA의 칸을 덧붙인 것 가운데 가장 큰 것."""
    return max(family.qkv_width * pad_row(family.hidden + tails.qkv),
               family.hidden * pad_row(family.q_width + tails.out),
               family.mlp_width * pad_row(family.hidden + tails.mlp), family.hidden * pad_row(family.ff + tails.down))
