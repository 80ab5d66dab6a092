"""글에서 토큰으로: 학습과 추론과 검산이 함께 쓰는 `Encoder`, 모델이 아는 토큰인지의 검사, 내용의 해시."""

import bisect
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from utils.chat import GUARD
from utils.data.documents import MUTED
from utils.errors import UsageError
from utils.files import text_sha256
from utils.turns import Joined, Pieces, Unlearned


class Encoded(NamedTuple):
    """토큰으로 바꾼 문서 하나. 두 목록은 길이가 같다.

    Attributes:
        tokens: 토큰의 번호.
        marks: 그 토큰이 답이면 1, 배우지 않는 답(`turns.Unlearned`)이면 `MUTED`, 아니면 0. 답에는 그 끝 토큰도 든다.
    """

    tokens: list[int]
    marks: list[int]


class Encoder:
    """(프롬프트, 답) 조각을 토큰으로 바꾼다. 학습과 추론이 같은 토큰을 쓰게 하는 유일한 자리다.

    보통의 템플릿에서는 글머리에 토크나이저가 스스로 붙이는 토큰(`head`)을 두고, 프롬프트와 답을 따로 토큰화하고, 답
    뒤에 끝 토큰을 한 번 붙인다. 대화 템플릿의 글(`Joined`)은 이어서 한 번에 토큰화하고, 글머리의 토큰은 템플릿이
    적는다. 어느 쪽이든 글 속의 특수 토큰 글자는 보통 글자로 다룬다.

    Attributes:
        head: 글머리의 토큰들(Gemma와 Llama의 BOS). polyglot과 Qwen처럼 붙이지 않는 모델에서는 비어 있다.

    Args:
        end_id: 답의 끝에 붙이는 토큰.
        n_rows: 모델의 embedding의 행 수. 주면 그 밖의 토큰이 나오는 글을 거절한다.

    Raises:
        UsageError: 끝 토큰이나 글의 토큰이 embedding의 밖이다.
    """

    def __init__(self, tokenizer, end_id: int, n_rows: int | None = None):
        self._tokenizer = tokenizer
        self._n_rows = n_rows
        self._end_id = end_id
        special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(special.values(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._special_ids = frozenset(special)
        self._busy = threading.Lock()  # 토크나이저는 두 스레드가 함께 쓰지 못한다
        self.head = head_ids(tokenizer)
        self._require_known([[end_id, *self.head]], "글의 처음이나 답의 끝")

    def encode_prompt(self, prompt: str, special: bool = False) -> list[int]:
        """이어 쓸 글의 토큰. 글머리의 토큰이 앞에 있다.

        Args:
            special: True면 글에 적힌 특수 토큰의 글자를 토큰으로 읽는다. 글머리의 것을 적은 글에는 더 붙이지 않는다.
        """
        tokens = self._encode([prompt], special)[0]
        return tokens if self.head and tokens[: len(self.head)] == self.head else [*self.head, *tokens]

    def encode_asked(self, pieces: Pieces) -> list[int]:
        """답이 시작되기 직전까지의 토큰. user로 끝나는 대화의 `Prompter.talk`가 주는 문서를 받는다."""
        if isinstance(pieces, Joined):
            return self._encode_joined([pieces])[0].tokens
        *past, (prompt, _) = pieces
        return self.encode_batch([past])[0].tokens + self._encode([prompt])[0]

    def encode_batch(self, batch: Sequence[Pieces]) -> list[Encoded]:
        """문서마다의 토큰.

        Args:
            batch: 문서마다의 (프롬프트, 답)들. 여러 번 주고받은 행이면 여럿이다.
        """
        joined = iter(self._encode_joined([pieces for pieces in batch if isinstance(pieces, Joined)]))
        apart = iter(self._encode_apart([pieces for pieces in batch if not isinstance(pieces, Joined)]))
        return [next(joined if isinstance(pieces, Joined) else apart) for pieces in batch]

    def length(self, pieces: Pieces) -> int:
        """문서의 토큰의 수. 경계에서 나누어 토큰화하는 문서에서는 몇 토큰 다를 수 있다."""
        if isinstance(pieces, Joined):
            return len(self._encode_guarded(["".join(part for piece in pieces for part in piece)])[0])
        return len(self.encode_batch([pieces])[0].tokens)

    def fingerprint(self) -> str:
        """같은 글에서 같은 토큰이 나오는지를 가리는 해시."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        chat = getattr(self._tokenizer, "chat_template", None)
        return text_sha256(content, str(chat), str(self.head), str(self._end_id), str(self._n_rows))

    def _encode_apart(self, batch: list[Pieces]) -> list[Encoded]:
        """글머리의 토큰 뒤에, 따로 토큰화한 조각들을 답마다 끝 토큰을 붙여 잇는다."""
        prompts = self._encode([prompt for pieces in batch for prompt, _ in pieces])
        answers = self._encode([answer for pieces in batch for _, answer in pieces])
        encoded, at = [], 0  # at: 모든 문서의 조각을 한 줄로 이었을 때의 번호
        for pieces in batch:
            tokens, marks = list(self.head), [0] * len(self.head)
            for piece in pieces:
                tokens += prompts[at] + answers[at] + [self._end_id]
                marks += [0] * len(prompts[at]) + [_mark(piece)] * (len(answers[at]) + 1)
                at += 1
            encoded.append(Encoded(tokens, marks))
        return encoded

    def _encode_joined(self, batch: list[Joined]) -> list[Encoded]:
        """한 글로 토큰화하고, 조각의 경계를 토큰의 자리로 옮긴다.

        경계 앞의 글만 토큰화한 것이 전체의 앞부분이어야, 그 자리에서 모델에게 묻는 토큰이 배운 토큰과 같다. 답이
        줄바꿈으로 시작하면 BPE가 경계를 넘어 합치기도 한다. 그런 경계에서는 글을 나누어 토큰화한다. 물을 때도 같은
        경계에서 나누므로 토큰은 언제나 같다.
        """
        texts = ["".join(prompt + answer for prompt, answer in pieces) for pieces in batch]
        wholes = self._encode_guarded(texts)
        # 문서마다의 경계(글자의 자리): 프롬프트의 끝, 답의 끝, 다음 프롬프트의 끝, ...
        every_edge = [np.cumsum([len(part) for piece in pieces for part in piece]).tolist() for pieces in batch]
        heads = [self._heads(*each) for each in zip(texts, wholes, every_edge, strict=True)]
        known = self._encode_known({text for head in heads for text, _ in head.values()})
        encoded = []
        for pieces, text, tokens, edges, head in zip(batch, texts, wholes, every_edge, heads, strict=True):
            ends = {edge: base + len(known[start]) for edge, (start, base) in head.items()}  # 경계 -> 토큰의 자리
            # 프롬프트 없이 읽기만 하는 조각의 끝은 묻는 자리가 아니라 나누지 않는다
            soft = {edge for piece, edge in zip(pieces, edges[1::2], strict=True)
                    if not piece[0] and isinstance(piece, Unlearned)}
            loose = {edge for edge, (start, base) in head.items()
                     if edge not in soft and tokens[base : ends[edge]] != known[start]}
            if loose:
                tokens, ends = self._encode_in_parts(text, edges, sorted(loose))
            ends |= {0: 0, len(text): len(tokens)}
            marks: list[int] = []  # 조각을 차례로 지나며 그 끝까지 채운다
            for piece, prompt_end, answer_end in zip(pieces, edges[::2], edges[1::2], strict=True):
                marks += [0] * (ends[prompt_end] - len(marks))
                marks += [_mark(piece)] * (ends[answer_end] - len(marks))
            if pieces.open_end:
                tokens, marks = [*tokens, self._end_id], [*marks, 1]
            encoded.append(Encoded(tokens, marks))
        return encoded

    def _heads(self, text: str, tokens: list[int], edges: list[int]) -> dict[int, tuple[str, int]]:
        """경계 -> (그 앞의 특수 토큰부터 경계까지의 글, 그 특수 토큰이 `tokens`에 놓인 자리).

        토크나이저는 특수 토큰에서 글을 먼저 나누므로 그 앞의 글은 다시 토큰화하지 않아도 같다. 글에서 센 특수 토큰의
        수가 토큰에서 센 것과 다르면 처음부터 본다.
        """
        starts = [found.start() for found in self._special.finditer(text)]
        places = [place for place, token in enumerate(tokens) if token in self._special_ids]
        if len(starts) != len(places):
            starts, places = [], []
        heads = {}
        for edge in edges:
            before = bisect.bisect_left(starts, edge) - 1
            start, base = (starts[before], places[before]) if before >= 0 else (0, 0)
            if 0 < edge < len(text):
                heads[edge] = text[start:edge], base
        return heads

    def _encode_in_parts(self, text: str, edges: list[int], cuts: list[int]) -> tuple[list[int], dict[int, int]]:
        """`cuts`에서 나누어 토큰화한 (토큰, 경계 -> 토큰의 자리)."""
        tokens: list[int] = []
        where = {0: 0}
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            inside = [edge for edge in edges if start < edge < end]
            whole, *heads = self._encode_guarded([text[start:end], *(text[start:edge] for edge in inside)])
            where |= {edge: len(tokens) + len(head) for edge, head in zip(inside, heads, strict=True)}
            tokens += whole
            where[end] = len(tokens)
        return tokens, where

    def _encode_known(self, texts: set[str]) -> dict[str, list[int]]:
        """글 -> 토큰."""
        ordered = sorted(texts)
        return dict(zip(ordered, self._encode_guarded(ordered), strict=True))

    def _encode_guarded(self, texts: list[str]) -> list[list[int]]:
        """대화 템플릿이 적은 특수 토큰은 토큰으로, 글에 글자로 적힌 것(`GUARD`로 갈라 둔 것)은 글자로 바꾼다."""
        parts = [text.split(GUARD) for text in texts]
        encoded = iter(self._encode([part for each in parts for part in each], special=True))
        return [[token for _ in each for token in next(encoded)] for each in parts]

    def _encode(self, texts: list[str], special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        with self._busy:
            encoded = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=not special,
                                      return_attention_mask=False, return_token_type_ids=False,
                                      verbose=False)["input_ids"]
        self._require_known(encoded, "프롬프트나 데이터")
        return encoded

    def _require_known(self, encoded: list[list[int]], where: str) -> None:
        if self._n_rows is not None:
            highest = max((max(ids) for ids in encoded if ids), default=0)
            require_known_ids([highest], self._n_rows, self._tokenizer, where)


def head_ids(tokenizer) -> list[int]:
    """토크나이저가 글머리에 스스로 붙이는 토큰들. 모델은 이것으로 시작하는 글만 보고 배웠다."""
    plain = tokenizer("가", add_special_tokens=False)["input_ids"]
    whole = tokenizer("가")["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    return next((whole[:start] for start in starts if plain and whole[start : start + len(plain)] == plain), [])


def _mark(piece: tuple[str, str]) -> int:
    return MUTED if isinstance(piece, Unlearned) else 1


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
