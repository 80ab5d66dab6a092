"""config.json만으로 하는 VRAM의 예측: 가중치, 어댑터, 활성값, 작업 공간의 바이트."""

from dataclasses import dataclass

from utils.engine.families import describe
from utils.engine.family import Family
from utils.engine.train_memory import (
    TILE_ROWS,
    Tails,
    attention_bytes,
    kept_widths,
    saved_widths,
    scratch_elements,
    work_widths,
)
from utils.model.nf4 import SCALE_BYTES

CONTEXT = 0.55e9  # CUDA context가 할당기 밖에서 차지하는 양. SM이 132개인 H200에서 쟀다
WORKSPACE = 32 << 20  # cuBLAS의 작업 공간. 계산하는 stream 하나에만 있다
FRAGMENTS = 0.02  # 할당기가 쪼개져 쓰지 못하고 남기는 비율
SPARE = 2 * (20 << 20)  # 할당기는 10 MiB보다 작은 것들을 20 MiB의 덩어리에 담는다. 평소의 풀과 graph의 풀에 하나씩 빈다
LOSS_CHUNK = 512  # 손실을 한 번에 계산하는 토큰 수
LARGE, SEGMENT = 10 << 20, 2 << 20  # 할당기는 10 MiB부터 2 MiB의 배수로 잡는다


@dataclass(frozen=True)
class Workload:
    """배울 것 가운데 VRAM을 정하는 것.

    Attributes:
        config: 기반 모델의 config.json.
        targets: LoRA를 붙일 층의 이름.
        rank: LoRA의 r.
        block: 블록의 길이(토큰).
        max_documents: 블록 하나에 든 문서의 최대 수.
        outside: 할당기 밖에서 차지하는 바이트(CUDA context와 라이브러리).
        processors: 비트까지 같은 attention을 쓰면 GPU의 SM 수. 아니면 0이다.
    """

    config: dict
    targets: tuple[str, ...]
    rank: int
    block: int
    max_documents: int
    outside: float = CONTEXT
    processors: int = 0


def find_family(config: dict, targets: tuple[str, ...]) -> Family | None:
    """손으로 쓴 학습 길로 갈 구조. 자동미분으로 갈 것이면 None이다. 학습기와 같은 규칙(`describe`)에 묻는다."""
    family = describe(config, training=True)
    return family if isinstance(family, Family) and set(targets) <= set(family.linears()) else None


def predict(work: Workload, micro: int, recompute: int) -> dict[str, float]:
    """부분마다의 바이트. 가중치는 NF4 이중 양자화, 나머지는 16비트다.

    Args:
        micro: 한 번에 계산하는 블록의 수.
        recompute: backward에서 다시 계산하는 층의 수.
    """
    family = find_family(work.config, work.targets)
    if family is None:
        parts = _predict_autograd(work, micro, recompute)
    else:
        parts = _predict_engine(family, work, micro, recompute)
    parts["작업 공간"] += FRAGMENTS * sum(parts.values()) + WORKSPACE + SPARE
    parts["CUDA context"] = work.outside
    return parts


def _predict_engine(family: Family, work: Workload, micro: int, recompute: int) -> dict[str, float]:
    """손으로 쓴 길. 버퍼의 크기는 엔진이 실제로 잡을 때 쓰는 `train_memory`에서 온다."""
    layers, rank, tokens = family.layers, work.rank, work.block * micro
    tails = Tails.of(family, work.targets, rank)
    recompute = min(recompute, layers - 1)
    linears = family.linears()
    trained_linears = {name: shape for name, shape in linears.items() if name in work.targets}
    quantized = sum(_nf4_bytes(shape.rows * shape.columns) for shape in linears.values())
    # 층의 작은 것: norm의 weight와 bias(16비트와 엔진이 읽는 fp32 사본, 여섯 개까지)와 선형층의 bias(16비트)
    small = 6 * 6 * family.hidden + 2 * (family.qkv_width + family.mlp_width + 2 * family.hidden)
    # 출력 행렬 하나만 GPU에 있다. 입력 embedding은 그것과 한 tensor이거나 CPU 메모리로 옮긴다
    table = _segments(2 * family.vocab * family.hidden)
    # 층마다의 A [r, columns]와 B [rows, r]
    trained = layers * sum(rank * (shape.columns + shape.rows) for shape in trained_linears.values())
    # 아래의 2는 모두 16비트 값 하나의 바이트다
    kept = 2 * tokens * (layers * sum(kept_widths(family, tails).values()) + family.hidden)  # 마지막 층의 출력까지
    saved = 2 * tokens * sum(saved_widths(family, tails).values())
    # 재계산하는 층과 마지막 층은 한 벌을 함께 쓴다. attention의 출력은 마지막 층까지 저마다 살아 있다
    alone = max(layers - recompute - 1, 0)
    stored = kept + alone * saved + (layers - recompute) * tokens * attention_bytes(family)
    buffers = saved + 2 * tokens * sum(work_widths(family, tails).values())
    scratch = 2 * scratch_elements(family, tails, tokens, recompute)
    # dA [r, columns]는 토큰 TILE_ROWS개마다 따로 더한 fp32 부분합 [조각의 수, r, columns]을 거친다. 선형층 하나씩이다
    widest = max((shape.columns for shape in trained_linears.values()), default=0)
    tiles = -(-tokens // TILE_ROWS)  # 올림
    partial = 4 * tiles * rank * widest
    work_room = buffers + scratch + partial + _attention_backward(family, work, micro)
    # 다 배우면 활성값과 작업 공간을 놓고, CPU에 둔 입력 embedding을 GPU로 되돌린다
    restored = 0 if family.tied else table
    return {
        "가중치": layers * (quantized + small) + table,
        # fp32 네 벌: 값, gradient, Adam의 평균 둘
        "어댑터와 optimizer": 4 * 4 * trained,
        "저장하는 활성값": stored,
        "작업 공간": max(work_room, restored - stored),
    }


def _attention_backward(family: Family, work: Workload, micro: int) -> float:
    """attention의 backward가 잠시 쓰는 바이트. flash의 것이고, 문서가 하나일 때의 cuDNN은 이보다 적게 쓴다.

    fp32 dq의 합(문서마다 128행까지, 머리를 32의 배수까지 채운다. 비트까지 같게 하면 SM을 채울 만큼 여러 벌이다), 이어
    놓은 dout, 16비트 dq, q의 머리 수만큼 늘린 dk와 dv, 그것을 더한 kv_heads의 dk와 dv.
    """
    tokens, documents = work.block * micro, max(2, work.max_documents) * micro
    head_dim = -(-family.head_dim // 32) * 32
    copies = max(1, -(-work.processors // (documents * family.heads)))
    # fp32, 문서마다 끝을 128행까지 채운다
    accumulated = copies * 4 * (tokens + 128 * documents) * family.heads * head_dim
    wide = 4 * family.q_width  # dout, dq, 늘린 dk, 늘린 dv
    grouped = family.heads != family.kv_heads
    narrow = 2 * family.kv_heads * family.head_dim if grouped else 0  # 더한 dk와 dv
    return accumulated + 2 * tokens * (wide + narrow)


def _predict_autograd(work: Workload, micro: int, recompute: int) -> dict[str, float]:
    """자동미분의 길. 구조를 모르므로 흔한 transformer 한 층이 남기는 것으로 어림한다."""
    config, targets = work.config, len(work.targets)
    layers, hidden, vocab = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
    inner, tokens = config.get("intermediate_size") or 4 * hidden, work.block * micro
    gated = config["model_type"] != "gpt_neox"
    # 층의 행렬들의 원소 수: qkv를 이은 것, attention의 출력, MLP의 gate와 up과 down(문이 없으면 둘)
    matrices = [3 * hidden * hidden, hidden * hidden, *[inner * hidden] * (3 if gated else 2)]
    tables = 1 if config.get("tie_word_embeddings", False) else 2  # 입력 embedding과 출력 행렬
    # 한 층이 남기는 토큰당 16비트 값: 잔차와 norm 6, q, k, v, attention의 출력 4 x hidden, MLP 안쪽의 네 단계 x inner.
    # LoRA의 입력마다 dropout한 fp32 사본이 하나씩 더 남는다
    per_layer = 2 * tokens * (10 * hidden + 4 * inner + 2 * targets * hidden)
    stored = 2 * layers * tokens * hidden if recompute else layers * per_layer  # 재계산하면 층의 입력만 남는다
    # 16비트로 남는 벡터는 얼마 되지 않아 GPT-NeoX의 것으로 어림한다: norm 둘의 weight와 bias 4 x hidden,
    # 선형층의 bias 9 x hidden(qkv 3, 출력 1, MLP 4와 1)
    layer_weights = sum(_nf4_bytes(count) for count in matrices) + 2 * (4 + 9) * hidden
    return {
        "가중치": layers * layer_weights + 2 * vocab * hidden * tables,
        # 층마다 targets개의 A [r, hidden]와 B [hidden, r], 그 값의 fp32 다섯 벌(위와 같다)
        "어댑터와 optimizer": 5 * 4 * layers * targets * work.rank * 2 * hidden,
        "저장하는 활성값": stored,
        # 재계산하거나 되돌아가는 층 하나, 푼 가중치 하나, 블록마다의 mask
        "작업 공간": per_layer + 2 * max(matrices) + 2 * micro * work.block * work.block,
        # 은닉값과 그 gradient, logits 조각의 fp32 둘
        "손실": 4 * tokens * hidden + 8 * min(LOSS_CHUNK, tokens) * vocab,
    }


def _nf4_bytes(count: int) -> float:
    """값 count개의 NF4: 4비트 값과 배율."""
    return _segments(count / 2) + count * SCALE_BYTES


def _segments(size: float) -> float:
    """할당기가 큰 덩어리를 2 MiB의 배수로 잡는 것까지 계산한 크기."""
    return -(-size // SEGMENT) * SEGMENT if size >= LARGE else size
