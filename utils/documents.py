"""토큰으로 바꾼 문서들을 담는다. 디스크에 둔 배열이어도 되므로 데이터가 메모리보다 커도 된다."""

from dataclasses import dataclass, field

import numpy as np

MUTED = 2  # 답이지만 배우지 않는 자리(weight 0)의 표시


@dataclass
class Documents:
    """토큰으로 바꾼 문서들. 모두 한 줄로 이어 두고 자리만 기억한다.

    `cutoff_len`보다 긴 문서는 꺼낼 때 토큰 경계에서 잘리고 끝 토큰은 남는다.

    Attributes:
        tokens: 모든 문서의 토큰. [n_tokens] int32. 디스크에 둔 배열일 수 있다.
        answer: 배우는 답(끝 토큰 포함)에 속하면 1, 배우지 않는 답이면 `MUTED`, 아니면 0. [n_tokens] int8.
        offsets: 자르기 전의 문서 i는 tokens[offsets[i]:offsets[i+1]]이다. [n_documents + 1] int64.
        digests: 문서 내용의 해시. [n_documents] uint64.
        questions: 질문의 해시. 질문이 따로 없으면 내용의 해시다. [n_documents] uint64.
        numbers: 파일에서의 행 번호. [n_documents] int64.
        cutoff_len: 문서의 가장 긴 길이(토큰). None이면 자르지 않는다.
        end_id: 끝 토큰의 번호.
        sha256: 데이터 파일의 해시.
        found: 읽으면서 본 것들(`datacheck.Inspector.found`).
    """

    tokens: np.ndarray
    answer: np.ndarray
    offsets: np.ndarray
    digests: np.ndarray
    questions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    cutoff_len: int | None = None
    end_id: int = 0
    sha256: str = ""
    found: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def full_lengths(self) -> np.ndarray:
        """자르기 전의 길이. [n_documents]"""
        return np.diff(self.offsets)

    def lengths(self) -> np.ndarray:
        """자른 뒤의 길이. [n_documents]"""
        full = self.full_lengths()
        return full if self.cutoff_len is None else np.minimum(full, self.cutoff_len)

    @property
    def n_cut(self) -> int:
        """블록보다 길어 잘리는 문서의 수."""
        return int((self.full_lengths() > self.lengths()).sum())

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """문서 하나의 (토큰, 배우는 답인지)."""
        start, end = self.offsets[index], self.offsets[index + 1]
        if self.cutoff_len is None or end - start <= self.cutoff_len:
            return self.tokens[start:end], self.answer[start:end] == 1
        kept = slice(start, start + self.cutoff_len - 1)
        learned_end = self.answer[kept.stop] != MUTED
        return np.append(self.tokens[kept], np.int32(self.end_id)), np.append(self.answer[kept] == 1, learned_end)

    def muted(self, index: int) -> np.ndarray:
        """질문까지 배울 때에도 배우지 않는 토큰인지. [`document(index)`의 길이] bool."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.answer[start : end if self.cutoff_len is None else min(end, start + self.cutoff_len)] == MUTED
