"""길이가 정해진 블록들: 문서를 학습과 검증으로 나누고, 블록에 채우고, 정답의 자리와 문서의 경계를 정한다."""

import bisect
import hashlib
from typing import NamedTuple

import numpy as np
import torch

from utils.data.documents import Documents

IGNORE = -100
FEW = 5  # 검증할 행이 적어도 이만큼은 되게 한다. 청한 비율로 이만큼이 나오지 않는 데이터면 그 비율만큼이다


class PackedDataset(torch.utils.data.Dataset):
    """길이가 `cutoff_len`인 블록들. 블록 안의 문서는 서로를 보지 않는다. 선호 쌍의 두 문서는 한 블록에 잇달아 놓인다.

    `position_ids`가 문서마다 0부터 다시 시작하는 것이 경계의 표시다. attention_mask는 넘기지 않는다.

    Args:
        room: 블록 하나에 문서를 이만큼(토큰)까지만 담는다. 이보다 긴 문서는 블록 하나를 혼자 쓴다. 없으면 꽉 채운다.
    """

    def __init__(self, documents: Documents, chosen: np.ndarray, cutoff_len: int, end_id: int,
                 train_on_inputs: bool, seed: int, room: int | None = None):
        self._documents = documents
        self._cutoff_len = cutoff_len
        self._end_id = end_id
        self._train_on_inputs = train_on_inputs
        units = chosen.reshape(-1, documents.per_row)
        lengths = unit_lengths(documents, chosen)
        room = room or cutoff_len
        packed = pack(np.minimum(lengths, room), room, seed)
        self.blocks = [units[members].ravel() for members in packed]  # 블록마다 담긴 문서의 번호
        self.n_tokens = int(lengths.sum())
        self.max_documents = max((len(block) for block in self.blocks), default=0) + 1  # 끝을 채운 것도 문서 하나다

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
            learned = ~self._documents.muted(member) if self._train_on_inputs else answer  # [문서의 길이] bool
            labels[at:end] = np.where(learned, tokens, IGNORE)
            labels[at] = IGNORE  # 첫 토큰은 앞 문서의 마지막 토큰이 예측하는 자리다
            position_ids[at:end] = np.arange(len(tokens))
            at = end
        position_ids[at:] = np.arange(self._cutoff_len - at)  # 채운 끝은 정답이 없는 제 문서다
        return {name: torch.from_numpy(value) for name, value in
                (("input_ids", input_ids), ("labels", labels), ("position_ids", position_ids))}


class PairedDataset(PackedDataset):
    """선호 쌍의 블록들. 답만 배우고, 블록마다 쌍의 `reference`와 `beta`(`model/objective.py`)가 있다.

    Attributes:
        references: 블록마다, 문서마다의 ref [블록, 2 pairs] fp32. 문서가 없는 자리는 NaN이고, 재기 전에는 0이다.
    """

    def __init__(self, documents: Documents, chosen: np.ndarray, cutoff_len: int, end_id: int, beta: float, seed: int,
                 room: int | None = None):
        super().__init__(documents, chosen, cutoff_len, end_id, train_on_inputs=False, seed=seed, room=room)
        self._beta = torch.tensor(beta, dtype=torch.float32)
        self.references = torch.full((len(self), max(map(len, self.blocks), default=0)), torch.nan)
        for row, block in enumerate(self.blocks):
            self.references[row, :len(block)] = 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`PackedDataset`의 것에 `reference` [2 pairs]와 `beta`(스칼라)를 더한 것."""
        return {**super().__getitem__(index), "reference": self.references[index], "beta": self._beta}


def make_even(*datasets: PairedDataset | None) -> None:
    """블록마다의 문서의 자리를 같은 수로 늘린다. 학습과 검증의 모양이 같아야 CUDA graph가 입력을 함께 쓴다."""
    present = [dataset for dataset in datasets if dataset is not None]
    width = max(dataset.references.shape[1] for dataset in present)
    for dataset in present:
        missing = width - dataset.references.shape[1]
        dataset.references = torch.nn.functional.pad(dataset.references, (0, missing), value=torch.nan)


class Split(NamedTuple):
    """학습 문서 번호 [n] int64와 검증 문서 번호 [m] int64."""

    train: np.ndarray
    held_out: np.ndarray


def split_by_content(documents: Documents, percent: float, seed: int) -> Split:
    """내용의 해시로 나눈다. 행을 더해도 이미 있던 행은 자리를 바꾸지 않는다.

    행이 적으면 해시의 우연으로 검증할 행이 하나도 없을 수 있다. 그때는 청한 비율의 수(많아야 `FEW`)를 해시의 차례로
    채운다. 그만큼은 행을 더할 때 자리를 바꿀 수 있다.

    Args:
        percent: 검증에 쓸 행의 비율(퍼센트).
    """
    n_rows = len(np.unique(documents.digests))
    if percent <= 0 or n_rows < 2:  # 모두 같은 행이면 나눌 수 없다
        return Split(np.arange(len(documents)), np.arange(0))
    # seed마다 다른 수를 섞고 큰 홀수를 곱해(넘친 비트는 버린다) [0, 2^64)에 고르게 흩고, 아래쪽 percent%를 검증에 쓴다
    salt = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little")
    scrambled = (documents.digests ^ np.uint64(salt)) * np.uint64(0x9E3779B97F4A7C15)
    limit = np.uint64(int(percent / 100 * (2**64 - 1)))
    in_order = np.unique(scrambled)  # 작은 것부터
    least = max(1, min(FEW, round(percent / 100 * n_rows)))
    held_out = scrambled <= max(limit, in_order[least - 1])
    if held_out.all():  # 학습할 행도 하나는 있어야 한다
        held_out = scrambled < in_order[-1]
    return Split(np.flatnonzero(~held_out), np.flatnonzero(held_out))


def fingerprint(documents: Documents, *members: np.ndarray) -> str:
    """문서들의 내용의 해시. 다르게 나뉘었거나 템플릿이 다른 글을 적었으면 다르다.

    Args:
        members: 문서 번호들. 저마다 [n] int64.
    """
    return hashlib.sha256(b"".join(hashlib.sha256(documents.digests[each].tobytes()).digest()
                                   for each in members)).hexdigest()


def unit_lengths(documents: Documents, members: np.ndarray) -> np.ndarray:
    """함께 다니는 문서들의 길이의 합(토큰). 선호 쌍이면 [members의 절반], 아니면 문서마다의 길이다."""
    return documents.lengths()[members].reshape(-1, documents.per_row).sum(1)


def fitting_pairs(documents: Documents, members: np.ndarray) -> np.ndarray:
    """`members`의 선호 쌍 가운데 두 문서가 함께 블록(cutoff_len)에 들어가는 것. 쌍은 자르지 않는다."""
    pairs = members.reshape(-1, 2)
    return pairs[documents.full_lengths()[pairs].sum(1) <= documents.cutoff_len].ravel()


def with_answers(documents: Documents, members: np.ndarray) -> np.ndarray:
    """`members` 가운데 자른 뒤에도 답이 남은 문서. 답이 모두 잘리면 배울 것이 질문 뒤의 끝 토큰뿐이다."""
    cut = documents.full_lengths()[members] > documents.lengths()[members]
    lost = [member for member in members[cut] if not documents.document(member).learned[:-1].any()]
    return np.setdiff1d(members, lost)


def pack(lengths: np.ndarray, cutoff_len: int, seed: int) -> list[np.ndarray]:
    """문서를 블록에 나누어 담는다(best-fit decreasing). 블록마다 담긴 문서의 번호를 돌려준다.

    긴 문서부터, 담을 수 있는 블록 가운데 남은 자리가 가장 적은 것에 담는다. 남은 자리의 크기를 정렬해 두고 이분
    탐색으로 찾으므로, 문서가 n개, 블록의 길이가 L이면 n log L번쯤 비교한다.

    Args:
        lengths: [문서의 수] 토큰 수.
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]  # 길이가 같은 문서끼리는 섞인 차례 그대로다
    blocks: list[list[int]] = []
    open_by_room: dict[int, list[int]] = {}  # 남은 자리(토큰) -> 그만큼 남은 블록들
    rooms: list[int] = []  # open_by_room의 이름을 작은 것부터
    for member in order:
        need = int(lengths[member])
        at = bisect.bisect_left(rooms, need)  # need보다 작지 않은 첫 자리
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


def shifted_targets(labels: torch.Tensor) -> torch.Tensor:
    """`labels`를 한 칸 당긴 다음 토큰의 정답. 블록의 마지막 자리는 정답이 없다. 모양 [rows, block]."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def document_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """자리 번호가 0으로 돌아가는 곳마다 하나씩 커지는 문서 번호. 모양 [rows, block]. 0 1 2 0 1 -> 1 1 1 2 2."""
    return (position_ids == 0).long().cumsum(-1)


def document_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """같은 문서의 앞쪽 토큰만 보이는 bool mask. 모양 [rows, 1, block, block]."""
    ids = document_ids(position_ids)
    same = ids[:, :, None] == ids[:, None, :]  # [rows, 묻는 토큰, 보이는 토큰]
    return same.tril()[:, None]  # 아래 삼각형만 남기면 뒤의 토큰이 가려진다. 1은 attention head의 자리다
