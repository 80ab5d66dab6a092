"""글을 토큰으로 바꾼다."""

import hashlib
import json
from collections.abc import Iterable

from utils.model.tokenizer import require_known_ids


class Encoder:
    """(프롬프트, 답) 조각을 토큰으로 바꾼다. 학습과 추론이 같은 토큰을 쓰게 하는 유일한 자리다.

    프롬프트와 답을 따로 토큰화하고 답 뒤에 끝 토큰을 한 번 붙인다. 글 속의 특수 토큰 글자는 보통 글자로 다룬다.

    Args:
        n_rows: 모델의 embedding의 행 수. 주면 그 밖의 토큰이 나오는 글을 거절한다.

    Raises:
        UsageError: 끝 토큰이나 글의 토큰이 embedding의 밖이다.
    """

    def __init__(self, tokenizer, end_id: int, special_in_prompt: bool = False, n_rows: int | None = None):
        self._tokenizer = tokenizer
        self._n_rows = n_rows
        self._end_id = end_id
        self._special_in_prompt = special_in_prompt
        self._require_known([[end_id]], "답의 끝")

    def encode_prompt(self, prompt: str) -> list[int]:
        """답이 시작되기 직전까지의 토큰. `Prompter.pieces`의 첫 조각을 받는다."""
        return self._encode([prompt], self._special_in_prompt)[0]

    def encode_batch(self, rows: list[list[tuple[str, str]]]) -> list[tuple[list[int], list[bool]]]:
        """행마다 (토큰, 답 여부)."""
        prompts = self._encode([p for row in rows for p, _ in row], self._special_in_prompt)
        answers = self._encode([a for row in rows for _, a in row], False)
        encoded, at = [], 0
        for row in rows:
            tokens: list[int] = []
            is_answer: list[bool] = []
            for _ in row:
                tokens += prompts[at] + answers[at] + [self._end_id]
                is_answer += [False] * len(prompts[at]) + [True] * (len(answers[at]) + 1)
                at += 1
            encoded.append((tokens, is_answer))
        return encoded

    def fingerprint(self) -> str:
        """같은 글에서 같은 토큰이 나오는지를 가리는 해시."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        chat = getattr(self._tokenizer, "chat_template", None)
        return _sha256(content, str(chat), str(self._end_id), str(self._special_in_prompt), str(self._n_rows))

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=not special,
                                  return_attention_mask=False, return_token_type_ids=False,
                                  verbose=False)["input_ids"]
        self._require_known(encoded, "프롬프트나 데이터")
        return encoded

    def _require_known(self, encoded: list[list[int]], where: str) -> None:
        if self._n_rows is not None:
            highest = max((max(ids) for ids in encoded if ids), default=0)
            require_known_ids([highest], self._n_rows, self._tokenizer, where)


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def content_digest(pieces: Iterable[tuple[str, str]]) -> int:
    """행의 내용으로 정해지는 64비트 수. 같은 행은 늘 같은 쪽(학습 또는 검증)에 놓인다."""
    joined = "\x1e".join("\x1f".join(piece) for piece in pieces)
    return int.from_bytes(hashlib.sha256(joined.encode()).digest()[:8], "little")
