"""토큰을 나오는 대로 글자로 바꾼다. 완성된 글자는 바로 내보내고 반쪽 글자는 기다린다."""

import codecs
import json
import re
from collections.abc import Sequence
from functools import cache

from tokenizers.decoders import DecodeStream

_EMPTY_THOUGHTS = re.compile(r"<think>\s*</think>\s*")


@cache
def byte_alphabet() -> dict[str, int]:
    """바이트 수준 BPE가 바이트를 적는 글자 256개. GPT-2의 `bytes_to_unicode`를 뒤집은 표다."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # 보이는 글자는 그 글자로 적는다
    hidden = [byte for byte in range(256) if byte not in plain]  # 공백과 제어 문자는 U+0100부터 차례로 적는다
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


class TextStream:
    """답 하나의 토큰을 글자로 바꾼다.

    바이트 수준 BPE에서는 토큰의 바이트를 UTF-8로 조금씩 푼다. 한 음절이 두 토큰에 나뉘어 있으면 뒤의 토큰이 왔을 때
    나오고, 끝내 완성되지 못한 바이트는 버려지므로 U+FFFD가 보이지 않는다. 다른 토크나이저는 `DecodeStream`에 맡긴다.
    특수 토큰과 어휘에 없는 번호는 글자가 없다.

    Args:
        special: 특수 토큰도 글자로 적는다.
        after: 앞에 놓인 토큰들. 글에 넣지는 않는다. 첫 토큰의 앞 공백을 버리는 토크나이저에서, 이어 쓰는 글의 공백을
            지킨다.
    """

    def __init__(self, tokenizer, special: bool = False, after: Sequence[int] = ()):
        self._backend = tokenizer.backend_tokenizer
        self._added = {number: "" if token.special and not special else token.content
                       for number, token in tokenizer.added_tokens_decoder.items()}
        decoder = json.loads(self._backend.to_str())["decoder"] or {}
        self._bytes = byte_alphabet() if decoder.get("type") == "ByteLevel" else None
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._stream = DecodeStream(list(after), skip_special_tokens=not special)

    def push(self, token_id: int) -> str:
        """토큰 하나를 넣고 그 사이 완성된 글자를 돌려준다."""
        if self._bytes is None:
            return self._stream.step(self._backend, token_id) or ""
        if token_id in self._added:
            return self._utf8.decode(self._added[token_id].encode("utf-8"))
        token = self._backend.id_to_token(token_id)
        return "" if token is None else self._utf8.decode(bytes(self._bytes[letter] for letter in token))

    def raw(self, token_id: int) -> bytes:
        """토큰 하나의 바이트. 음절의 한 조각일 수 있다."""
        token = self._backend.id_to_token(token_id) or ""
        if self._bytes is None or token_id in self._added:
            return token.replace("\u2581", " ").encode("utf-8")
        return bytes(self._bytes[letter] for letter in token)

    def name(self, token_id: int) -> str:
        """토큰 하나를 사람이 읽을 글. 음절의 한 조각이면 OpenAI처럼 `bytes:\\xec\\x95`로 적는다."""
        raw = self.raw(token_id)
        try:
            return raw.decode("utf-8") or f"<{token_id}>"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def flush(self) -> str:
        """답이 끝났을 때 남은 글자를 돌려준다. 완성되지 못한 바이트는 버린다."""
        return self._utf8.decode(b"", final=True)


class Opening:
    """답의 첫머리에서 공백과 빈 생각(`<think></think>`)을 뺀다. 생각하지 않고 답하게 배운 모델이 먼저 말하는 것이다.

    Args:
        raw: 아무것도 빼지 않는다.
    """

    def __init__(self, raw: bool = False):
        self._held: str | None = None if raw else ""  # 아직 답인지 모르는 글. 답이 시작되었으면 None이다

    def push(self, piece: str) -> str:
        """글 조각을 넣고, 내보내도 되는 글을 돌려준다."""
        if self._held is None:
            return piece
        text = _EMPTY_THOUGHTS.sub("", (self._held + piece).lstrip(), count=1)
        if "<think></think>".startswith("".join(text.split())):
            self._held += piece
            return ""
        self._held = None
        return text

    def flush(self) -> str:
        """답이 끝났을 때 남은 글."""
        return _EMPTY_THOUGHTS.sub("", (self._held or "").lstrip(), count=1)
