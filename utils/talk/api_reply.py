"""OpenAI 형식의 응답을 만든다: 답, 스트림의 조각, 토큰마다의 가능도, 오류."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from utils.decode.textstream import TextStream
from utils.talk.answerer import Answer
from utils.talk.api_request import Asked


@dataclass
class Reply:
    """질문 하나의 답이 나가는 모습.

    Attributes:
        text: 지금까지 내보낸 글.
        cut: 멈춤 글을 만나 그 앞에서 끝났는지.
    """

    index: int
    answer: Answer
    text: str = ""
    cut: bool = False

    @property
    def finish(self) -> str:
        return "length" if self.answer.finish_reason == "length" and not self.cut else "stop"


class Shape:
    """응답 하나의 꼴.

    Args:
        tokenizer: 가능도의 토큰을 글자로 적을 토크나이저.
    """

    def __init__(self, chat: bool, model_name: str, asked: Asked, tokenizer):
        self._chat = chat
        self._asked = asked
        self._tokenizer = tokenizer
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
                      "model": model_name}

    def whole(self, replies: Sequence[Reply]) -> dict:
        return {**self._head, "object": "chat.completion" if self._chat else "text_completion",
                "choices": [self._choice(reply) for reply in replies], "usage": self._usage(replies)}

    def event(self, index: int, delta: str, first: bool = False, finish: str | None = None) -> str:
        """스트림의 한 조각."""
        content: dict = {"text": delta}
        if self._chat:
            content = {"delta": {"role": "assistant", "content": ""} if first else {"content": delta} if delta else {}}
        return self._event([{"index": index, **content, "logprobs": None, "finish_reason": finish}], None)

    def usage_event(self, replies: Sequence[Reply]) -> str:
        """사용량만 담은, 스트림의 마지막 조각."""
        return self._event([], self._usage(replies))

    def _event(self, choices: list[dict], usage: dict | None) -> str:
        body = {**self._head, "object": "chat.completion.chunk" if self._chat else "text_completion",
                "choices": choices}
        if self._asked.usage:
            body["usage"] = usage
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def _usage(self, replies: Sequence[Reply]) -> dict:
        read = sum(len(reply.answer.input_ids) for reply in replies)
        made = sum(map(self._made, replies))
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def _made(self, reply: Reply) -> int:
        """만든 토큰의 수. 멈춤 글에서 끝났으면 그 글이 다 나온 토큰까지다. 멈추기 전에 더 만든 것은 세지 않는다."""
        answer, text = reply.answer, ""
        stream = TextStream(self._tokenizer, after=answer.input_ids if answer.raw else ())
        for count, token in enumerate(answer.ids if reply.cut else (), 1):
            text += stream.push(token)
            if any(stop in (text if answer.raw else text.lstrip()) for stop in self._asked.stops):
                return count
        return len(answer.ids)

    def _choice(self, reply: Reply) -> dict:
        text, logprobs = reply.text, None
        if self._asked.echo or self._asked.top is not None:
            spelled = Spelled.of(reply, self._tokenizer, self._asked.echo)
            if not self._chat:
                text = spelled.text
            if self._asked.top is not None:
                logprobs = spelled.for_chat() if self._chat else spelled.for_text()
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {"index": reply.index, **content, "logprobs": logprobs, "finish_reason": reply.finish}


@dataclass(frozen=True)
class Token:
    """글 속의 토큰 하나. `logprob`은 앞의 글이 없는 첫 토큰에서 None이고, 그때 `top`은 비어 있다."""

    id: int
    offset: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Spelled:
    """돌려줄 글과, 그 글을 이루는 토큰들의 가능도."""

    text: str
    tokens: list[Token]
    stream: TextStream

    @classmethod
    def of(cls, reply: Reply, tokenizer, echo: bool) -> "Spelled":
        """질문(echo면)과 답의 글을 토큰마다 이어 적는다. 멈춤 글에서 끝났으면 그 뒤의 토큰은 뺀다.

        공백을 다듬지 않은 그대로의 글이라야 토큰의 자리(글자 수)와 맞는다.
        """
        answer = reply.answer
        begin = answer.head if echo else len(answer.input_ids)
        stream = TextStream(tokenizer, special=True, after=answer.input_ids[:begin])
        asked = len(answer.input_ids)
        ids = answer.input_ids + answer.ids + answer.end_ids
        text, tokens, end = "", [], None
        for place, token in enumerate(ids):
            if place == asked:
                end = len(text)  # 여기부터 답이다
            if place < begin:
                continue
            tokens.append(Token(token, len(text), *_measured(answer, place)))
            text += "" if place >= asked + len(answer.ids) else stream.push(token)
        text += stream.flush()
        if reply.cut:
            said = end or 0
            kept = text[said:] if answer.raw else text[said:].lstrip()
            spaces = len(text) - said - len(kept)
            text = text[: said + spaces + len(reply.text)]
            tokens = [token for place, token in enumerate(tokens) if token.offset < len(text)]
        return cls(text, tokens, stream)

    def for_text(self) -> dict:
        """`/v1/completions`의 logprobs. 같은 글자로 적히는 토큰이 둘이면 더 그럴듯한 것을 적는다."""
        tops = []
        for token in self.tokens:
            ranked = sorted([*token.top, (token.id, token.logprob)] if token.logprob is not None else [],
                            key=lambda pair: -pair[1])
            named: dict[str, float] = {}
            for number, logprob in ranked:
                named.setdefault(self.stream.name(number), logprob)
            tops.append(named if token.logprob is not None else None)
        return {"tokens": [self.stream.name(token.id) for token in self.tokens],
                "token_logprobs": [token.logprob for token in self.tokens], "top_logprobs": tops,
                "text_offset": [token.offset for token in self.tokens]}

    def for_chat(self) -> dict:
        """`/v1/chat/completions`의 logprobs."""
        return {"content": [{**self._named(token.id, token.logprob),
                             "top_logprobs": [self._named(*pair) for pair in token.top]} for token in self.tokens],
                "refusal": None}

    def _named(self, number: int, logprob: float | None) -> dict:
        return {"token": self.stream.name(number), "logprob": logprob, "bytes": list(self.stream.raw(number))}


class _Measured(NamedTuple):
    """토큰 하나의 로그 가능도와, 그 자리의 그럴듯한 (토큰, 로그 가능도)들."""

    logprob: float | None
    top: list[tuple[int, float]]


def _measured(answer: Answer, place: int) -> _Measured:
    """`place`번째 토큰의 값. 앞이 없는 첫 토큰은 재지 않는다."""
    found = answer.likelihood
    if found is None or place == 0:
        return _Measured(None, [])
    at = place - 1
    top = list(zip(found.top_ids[at].tolist(), found.top_logprobs[at].tolist(), strict=True))
    return _Measured(float(found.logprobs[at]), top[: answer.top])


def error_body(message: str, kind: str, code: str | None = None) -> dict:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
