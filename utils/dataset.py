"""(질문, 답) 조각을 토큰으로 바꾸고, 내용으로 나누고, 서로를 보지 않게 블록에 채운다."""

import bisect
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.rows import read_rows, segmenter

IGNORE = -100
_BATCH = 512


@dataclass
class Documents:
    """토큰으로 바꾼 문서들. 모두 한 줄로 이어 두고 자리만 기억한다.

    Attributes:
        tokens: 모든 문서의 토큰. [n_tokens] int32.
        answer: 답(끝 토큰 포함)에 속하면 True. [n_tokens] bool.
        offsets: 문서 i는 tokens[offsets[i]:offsets[i+1]]이다. [n_documents + 1] int64.
        digests: 문서 내용의 해시. [n_documents] uint64.
        n_cut: 블록보다 길어 잘린 문서의 수.
    """

    tokens: np.ndarray
    answer: np.ndarray
    offsets: np.ndarray
    digests: np.ndarray
    n_cut: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """문서 하나의 (토큰, 답 여부)."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.answer[span]


class Encoder:
    """(프롬프트, 답) 조각을 토큰으로 바꾼다. 학습과 추론이 같은 토큰을 쓰게 하는 유일한 자리다.

    프롬프트와 답을 따로 토큰화하고 답 뒤에 끝 토큰을 한 번 붙인다. 글 속의 특수 토큰 글자는 보통 글자로 다룬다.
    """

    def __init__(self, tokenizer, end_id: int, special_in_prompt: bool = False):
        self._tokenizer = tokenizer
        self._end_id = end_id
        self._special_in_prompt = special_in_prompt

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

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(texts, add_special_tokens=False, split_special_tokens=not special,
                               return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]


def load_documents(data_path: str | Path, prompter, encoder: Encoder, cutoff_len: int, end_id: int,
                   cache_dir: str | None = None, on_row: Callable[[int], None] | None = None) -> Documents:
    """데이터 파일을 읽어 토큰으로 바꾼다. 블록보다 긴 문서는 토큰 경계에서 자르고 끝 토큰을 남긴다.

    Raises:
        UsageError: 파일이나 행이 잘못되었다.
    """
    to_pieces, batch = None, []
    tokens, answer, lengths, digests, n_cut = [], [], [], [], 0

    def flush() -> None:
        nonlocal n_cut
        for pieces, (ids, is_answer) in zip(batch, encoder.encode_batch(batch), strict=True):
            if len(ids) > cutoff_len:
                ids, is_answer = [*ids[: cutoff_len - 1], end_id], [*is_answer[: cutoff_len - 1], True]
                n_cut += 1
            tokens.append(np.asarray(ids, np.int32))
            answer.append(np.asarray(is_answer, bool))
            lengths.append(len(ids))
            digests.append(content_digest(pieces))
        batch.clear()

    for number, row in read_rows(data_path, cache_dir):
        if to_pieces is None:
            to_pieces = segmenter(set(row), prompter, data_path)
        batch.append(to_pieces(number, row))
        if len(batch) == _BATCH:
            flush()
        if on_row is not None:
            on_row(number)
    flush()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Documents(np.concatenate(tokens), np.concatenate(answer), offsets, np.asarray(digests, np.uint64), n_cut)


def content_digest(pieces: Iterable[tuple[str, str]]) -> int:
    """행의 내용으로 정해지는 64비트 수. 같은 행은 늘 같은 쪽(학습 또는 검증)에 놓인다."""
    joined = "\x1e".join("\x1f".join(piece) for piece in pieces)
    return int.from_bytes(hashlib.sha256(joined.encode()).digest()[:8], "little")


def split_by_content(documents: Documents, percent: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(학습 문서 번호, 검증 문서 번호). 내용의 해시로 나누므로 행을 더해도 이미 있던 행은 자리를 바꾸지 않는다."""
    if percent <= 0 or len(documents) < 2:
        return np.arange(len(documents)), np.arange(0)
    scrambled = documents.digests ^ np.uint64(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little"))
    scrambled = scrambled * np.uint64(0x9E3779B97F4A7C15)
    held_out = scrambled < np.uint64(int(percent / 100 * (2**64 - 1)))
    if not held_out.any() or held_out.all():  # 행이 몇 안 될 때도 양쪽에 하나는 있게 한다
        held_out = scrambled == scrambled.min()
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


class PackedDataset(torch.utils.data.Dataset):
    """길이가 `cutoff_len`인 블록들. 블록 안의 문서는 서로를 보지 않는다.

    `position_ids`가 문서마다 0부터 다시 시작하는 것이 경계의 표시다. attention_mask는 넘기지 않는다.
    """

    def __init__(self, documents: Documents, chosen: np.ndarray, cutoff_len: int, end_id: int,
                 train_on_inputs: bool, seed: int):
        self._documents = documents
        self._cutoff_len = cutoff_len
        self._end_id = end_id
        self._train_on_inputs = train_on_inputs
        lengths = documents.lengths()[chosen]
        self.blocks = [chosen[members] for members in pack(lengths, cutoff_len, seed)]
        self.n_tokens = int(lengths.sum())
        self.max_documents = max((len(block) for block in self.blocks), default=0) + 1

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels`, `position_ids`: 모두 [cutoff_len] int64."""
        input_ids = np.full(self._cutoff_len, self._end_id, np.int64)
        labels = np.full(self._cutoff_len, IGNORE, np.int64)
        position_ids = np.zeros(self._cutoff_len, np.int64)
        at = 0
        for member in self.blocks[index]:
            tokens, answer = self._documents.document(member)
            end = at + len(tokens)
            input_ids[at:end] = tokens
            labels[at:end] = tokens if self._train_on_inputs else np.where(answer, tokens, IGNORE)
            labels[at] = IGNORE  # 첫 토큰은 앞 문서의 마지막 토큰이 예측하는 자리다
            position_ids[at:end] = np.arange(len(tokens))
            at = end
        position_ids[at:] = np.arange(self._cutoff_len - at)
        return {name: torch.from_numpy(value) for name, value in
                (("input_ids", input_ids), ("labels", labels), ("position_ids", position_ids))}


def pack(lengths: np.ndarray, cutoff_len: int, seed: int) -> list[np.ndarray]:
    """문서를 블록에 나누어 담는다(best-fit decreasing). 블록마다 담긴 문서의 번호를 돌려준다."""
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    blocks: list[list[int]] = []
    open_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for member in order:
        need = int(lengths[member])
        at = bisect.bisect_left(rooms, need)
        if at < len(rooms):
            room = rooms[at]
            block = open_by_room[room].pop()
            if not open_by_room[room]:
                del open_by_room[room], rooms[at]
        else:
            room, block = cutoff_len, len(blocks)
            blocks.append([])
        blocks[block].append(int(member))
        left = room - need
        if left:
            if left not in open_by_room:
                bisect.insort(rooms, left)
                open_by_room[left] = []
            open_by_room[left].append(block)
    return [np.asarray(block) for block in blocks]
