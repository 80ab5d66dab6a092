"""모델 구조 하나를 데이터로 적은 것. 학습과 답 만들기의 커널이 이 값을 읽는다."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

GEMMA = {"gemma", "gemma3_text"}
ACTIVATION_CODES = {"gelu": 0, "gelu_tanh": 1, "silu": 2}  # 커널이 받는 `-D ACTIVATION`의 값


class LinearShape(NamedTuple):
    """선형층 하나의 자리와 모양.

    Attributes:
        slot: 무엇을 읽고 어디에 쓰는 층인지. `LayerModules`의 항목(qkv, out, mlp, down)이다.
        columns, rows: 입력과 출력의 폭.
    """

    slot: str
    columns: int
    rows: int


@dataclass(frozen=True)
class Family:
    """계산에 필요한 구조의 모든 것. 가중치는 들어 있지 않다.

    Attributes:
        kind: config.json의 model_type.
        hidden, ff: 잔차와 MLP 안쪽의 폭.
        layers, vocab, context: 층의 수, 어휘의 크기, 문맥의 길이(토큰).
        heads, kv_heads, head_dim: q의 머리 수, k와 v의 머리 수, 머리의 크기.
        rms: RMSNorm인지. 아니면 LayerNorm이다.
        norm_offset: norm의 weight에 더해 곱하는 수. Gemma는 1이다.
        eps: norm의 분모에 더하는 수.
        pre_norm, post_norm: 선형층의 입력과 출력에 norm을 거는지. Gemma 3는 둘 다, EXAONE 4는 출력에만 건다.
        qk_norm: 회전하기 전의 q와 k에 머리마다 norm을 거는지.
        parallel: attention과 MLP가 같은 잔차를 읽는지. 아니면 차례로 읽는다.
        interleaved: q, k, v가 머리마다 번갈아 놓인 한 행렬인지(GPT-NeoX). 아니면 행렬 셋이다.
        gated: MLP가 `act(gate) * up`인지. 아니면 `act(up)`이다.
        activation: "gelu"(erf), "gelu_tanh", "silu".
        rotary: 머리에서 돌리는 칸의 수. 짝수이고, 앞쪽 반과 뒤쪽 반이 짝을 이룬다.
        rotary_kinds: rotary의 종류. 하나뿐이면 (None,)이고 Gemma 3는 layer_types의 이름들이다.
        turns: 층마다 `rotary_kinds`의 몇 번째로 돌리는지. 음수면 돌리지 않는다.
        windows: 층마다 볼 수 있는 토큰의 수(자기를 포함). 0이면 모두 본다.
        attention_scale: 점수 q k^T에 곱하는 수.
        logit_scale, logit_cap: logits에 곱하는 수와, 그 뒤 `cap * tanh(logits / cap)`의 cap. cap이 0이면 하지 않는다.
        residual_scale: 잔차에 더하기 전에 attention과 MLP의 출력에 곱하는 수.
        embedding_scale: 입력 embedding에 곱하는 수. `scale_of_embedding`으로 읽는다.
        tied: 입력 embedding과 출력 행렬이 한 tensor인지.
        final_norm: 마지막 norm의 이름.
        dropout: LoRA 말고 모델이 스스로 거는 dropout이 있는지. 답을 만들 때는 상관없다.
    """

    kind: str
    hidden: int
    ff: int
    layers: int
    vocab: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    rms: bool
    norm_offset: float
    eps: float
    pre_norm: bool
    post_norm: bool
    qk_norm: bool
    parallel: bool
    interleaved: bool
    gated: bool
    activation: str
    rotary: int
    rotary_kinds: tuple[str | None, ...]
    turns: tuple[int, ...]
    windows: tuple[int, ...]
    attention_scale: float
    logit_scale: float
    logit_cap: float
    residual_scale: float
    embedding_scale: float
    tied: bool
    final_norm: str
    dropout: bool

    @property
    def q_width(self) -> int:
        """q 한 줄의 폭. attention 출력의 폭이기도 하다."""
        return self.heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def qk_width(self) -> int:
        return (self.heads + self.kv_heads) * self.head_dim

    @property
    def mlp_width(self) -> int:
        """MLP의 첫 곱이 내는 폭. 문이 있으면 gate와 up을 이어 붙인 것이다."""
        return self.ff * (2 if self.gated else 1)

    def scale_of_embedding(self, dtype: torch.dtype) -> float:
        """Gemma는 이 수를 모델의 dtype으로 반올림해 곱하고, 나머지는 그대로 곱한다."""
        if self.kind in GEMMA:
            return float(torch.tensor(self.embedding_scale).to(dtype))
        return self.embedding_scale

    def linears(self) -> dict[str, LinearShape]:
        """선형층의 이름 -> 놓인 곳과 모양. 같은 곳을 읽는 층들은 행렬 곱 하나로 함께 계산한다."""
        if self.interleaved:
            return {
                "query_key_value": LinearShape("qkv", self.hidden, self.qkv_width),
                "dense": LinearShape("out", self.q_width, self.hidden),
                "dense_h_to_4h": LinearShape("mlp", self.hidden, self.ff),
                "dense_4h_to_h": LinearShape("down", self.ff, self.hidden),
            }
        kv_width = self.kv_heads * self.head_dim
        return {
            "q_proj": LinearShape("qkv", self.hidden, self.q_width),
            "k_proj": LinearShape("qkv", self.hidden, kv_width),
            "v_proj": LinearShape("qkv", self.hidden, kv_width),
            "o_proj": LinearShape("out", self.q_width, self.hidden),
            "gate_proj": LinearShape("mlp", self.hidden, self.ff),
            "up_proj": LinearShape("mlp", self.hidden, self.ff),
            "down_proj": LinearShape("down", self.ff, self.hidden),
        }
