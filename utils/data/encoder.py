"""글에서 토큰으로: 학습과 추론과 검산이 함께 쓰는 `Encoder`, 모델이 아는 토큰인지의 검사, 내용의 해시."""

import hashlib
import json
from collections.abc import Iterable

import numpy as np

from utils.data import rows
from utils.data.documents import MUTED
from utils.errors import UsageError
from utils.files import text_sha256
from utils.prompter import CHAT


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

    def encode_batch(self, batch: list[list[tuple[str, str]]]) -> list[tuple[list[int], list[bool]]]:
        """행마다 (토큰, 그 토큰이 답인지). 한 행의 두 목록은 길이가 같다. 답에는 그 끝 토큰도 든다.

        배우지 않는 답(`rows.Unlearned`)의 자리에는 True 대신 `MUTED`가 적힌다.

        Args:
            batch: 행마다의 (프롬프트, 답)들. 여러 번 주고받은 행이면 여럿이다.
        """
        prompts = self._encode([p for row in batch for p, _ in row], self._special_in_prompt)
        answers = self._encode([a for row in batch for _, a in row], False)
        encoded, at = [], 0
        for row in batch:
            tokens: list[int] = []
            is_answer: list[bool] = []
            for piece in row:
                learned = MUTED if isinstance(piece, rows.Unlearned) else True
                tokens += prompts[at] + answers[at] + [self._end_id]
                is_answer += [False] * len(prompts[at]) + [learned] * (len(answers[at]) + 1)
                at += 1
            encoded.append((tokens, is_answer))
        return encoded

    def fingerprint(self) -> str:
        """같은 글에서 같은 토큰이 나오는지를 가리는 해시."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        chat = getattr(self._tokenizer, "chat_template", None)
        return text_sha256(content, str(chat), str(self._end_id), str(self._special_in_prompt), str(self._n_rows))

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


def make_encoder(tokenizer, prompter, end_id: int, n_rows: int | None = None) -> Encoder:
    """템플릿에 맞는 Encoder. 대화 템플릿의 프롬프트에 적힌 특수 토큰은 글자가 아니라 토큰이다.

    Raises:
        UsageError: 끝 토큰이 embedding의 밖이다.
    """
    return Encoder(tokenizer, end_id, special_in_prompt=prompter.name == CHAT, n_rows=n_rows)


def require_known_ids(ids, n_rows: int, tokenizer, where: str) -> None:
    """토큰 번호가 모두 embedding의 행 안에 있는지 본다. 밖의 번호는 CPU에서는 IndexError, 커널에서는 남의 메모리다.

    Args:
        ids: 토큰 번호의 배열이나 목록.
        n_rows: 입력 embedding의 행 수.
        tokenizer: 번호를 글자로 보여 줄 토크나이저.
        where: 번호가 나온 곳. 메시지의 앞에 적힌다.

    Raises:
        UsageError: 밖의 번호가 있다. 그 토큰과 번호와 embedding의 크기를 말한다.
    """
    ids = np.asarray(ids, dtype=np.int64).ravel()
    outside = ids[(ids < 0) | (ids >= n_rows)]
    if len(outside):
        worst = int(outside.max())
        token = tokenizer.convert_ids_to_tokens(worst) if worst >= 0 else None
        raise UsageError(f"{where}에 모델이 모르는 토큰이 있다: {token!r}의 번호는 "
                         f"{worst:,}인데 모델의 embedding은 {n_rows:,}행이다. 이 모델과 함께 나온 토크나이저를 쓴다")


def content_digest(pieces: Iterable[tuple[str, str]]) -> int:
    """행의 내용으로 정해지는 64비트 수. 같은 행은 늘 같은 쪽(학습 또는 검증)에 놓인다."""
    joined = "\x1e".join("\x1f".join(piece) for piece in pieces)
    return int.from_bytes(hashlib.sha256(joined.encode()).digest()[:8], "little")
