"""답 하나: 질문의 토큰에서 완성된 글자까지. 학습이 끝난 뒤의 예시 답, 대화, 배움의 점수가 이 길로 답을 얻는다."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from utils.decode.decoder import Decoder, Stats
from utils.decode.textstream import TextStream
from utils.sampling import Sampling


@dataclass(eq=False)
class Reply:
    """만들고 있거나 다 만든 답 하나.

    Attributes:
        input_ids: 질문의 토큰.
        tuned: False면 어댑터를 끄고 기반 모델이 답한다.
        stop: 켜면 한 토큰 안에 멈춘다.
        text: 지금까지 나온 글. 완성된 음절만 들어 있고, 답 앞의 공백은 없다.
        ids: 지금까지 나온 토큰.
        finish_reason: 끝난 이유. 끝나기 전에는 None이다. "stop", "length", "cancelled", "error".
    """

    input_ids: list[int]
    settings: Sampling
    tuned: bool = True
    stop: threading.Event = field(default_factory=threading.Event)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    finish_reason: str | None = None


def pieces(decoder: Decoder, tokenizer, reply: Reply) -> Iterator[str]:
    """답을 만들어 `reply`에 적으며 완성된 음절을 내놓는다. 한 번에 하나만 불러야 한다."""
    decoder.use_adapter(reply.tuned)
    stream = TextStream(tokenizer)
    for token in decoder.stream(reply.input_ids, reply.settings, reply.stop):
        reply.ids.append(token)
        reply.stats = decoder.stats
        piece = stream.push(token)
        piece = piece if reply.text else piece.lstrip()
        if piece:
            reply.text += piece
            yield piece
    rest = stream.flush()
    if rest:
        reply.text += rest
        yield rest
    reply.stats = decoder.stats
    reply.finish_reason = decoder.finish_reason


def finish(decoder: Decoder, tokenizer, reply: Reply) -> Reply:
    """답을 끝까지 만든다."""
    for _ in pieces(decoder, tokenizer, reply):
        pass
    return reply
