"""무작위 토큰의 선호 쌍: 파일도 토크나이저도 없이 만든 문서와 블록."""

import numpy as np

from utils.data.blocks import PairedDataset
from utils.data.documents import Documents

BLOCK, BETA = 48, 0.3


def make_pairs(n: int = 8, seed: int = 0) -> Documents:
    """질문을 함께 쓰는 두 문서 n쌍. 문서의 길이는 제각각이다."""
    generator = np.random.default_rng(seed)
    tokens, answer, lengths = [], [], []
    for _ in range(n):
        prompt = generator.integers(3, 300, generator.integers(2, 6))
        for _ in range(2):
            said = generator.integers(3, 300, generator.integers(2, 9))
            tokens += [*prompt, *said, 2]
            answer += [0] * len(prompt) + [1] * (len(said) + 1)
            lengths.append(len(prompt) + len(said) + 1)
    rows = np.repeat(np.arange(n), 2)
    return Documents(np.asarray(tokens, np.int32), np.asarray(answer, np.int8), np.cumsum([0, *lengths]),
                     rows.astype(np.uint64), rows.astype(np.uint64), rows + 1, BLOCK, 2, pairs=True)


def make_blocks(n: int = 8, seed: int = 0) -> PairedDataset:
    documents = make_pairs(n, seed)
    return PairedDataset(documents, np.arange(2 * n), BLOCK, 2, BETA, seed=1)
