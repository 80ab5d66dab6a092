"""글 하나를 다듬는 규칙: 끝 토큰의 글자를 떼고, 풀어쓴 한글을 모아쓴다."""

import re
import unicodedata

END_TOKEN = "<|endoftext|>"
SURROGATE = re.compile("[\ud800-\udfff]")
_JAMO = re.compile("[\u1100-\u11ff]")


def strip_end(text: str) -> str:
    """글 끝의 끝 토큰 글자를 뗀다. 끝 토큰은 토큰을 만들 때 한 번만 붙인다."""
    while (stripped := text.rstrip()).endswith(END_TOKEN):
        text = stripped.removesuffix(END_TOKEN)
    return text


def compose(text: str) -> str:
    """풀어쓴 한글(NFD)만 모아쓴다. 토크나이저는 모아쓴 한글로 배웠다."""
    if unicodedata.is_normalized("NFC", text) or not _JAMO.search(text):
        return text
    return unicodedata.normalize("NFC", text)
