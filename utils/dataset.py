"""(질문, 답) 조각을 토큰으로 바꾸고, 내용으로 나누고, 서로를 보지 않게 블록에 채운다."""

import bisect
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from utils import datacheck, datafile, rows
from utils import prompter as prompter_module
from utils.documents import Documents
from utils.errors import UsageError
from utils.loader import require_known_ids
from utils.paths import ROOT
from utils.tokencache import CacheWriter, open_cache

IGNORE = -100
CACHE_FOLDER = "tokens"
_BATCH = 2048


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


def load_documents(data_path: str | Path, prompter, encoder: Encoder, cutoff_len: int, end_id: int,
                   cache_dir: str | None = None, on_row: Callable[[int], None] | None = None,
                   skip_bad: bool = False) -> Documents:
    """데이터 파일을 읽어 토큰으로 바꾼다. 같은 파일과 설정이면 디스크에 둔 것을 다시 쓴다.

    Args:
        cache_dir: 토큰을 둘 폴더(그 아래 `tokens/`). 없으면 저장소의 `data`다.
        on_row: 지금까지 읽은 행의 수를 때때로 받는다.
        skip_bad: True면 잘못된 행을 세기만 하고 건너뛴다.

    Raises:
        UsageError: 파일이나 행이 잘못되었다. 쓸 수 있는 행이 하나도 없다.
    """
    sha256 = source_sha256(data_path, cache_dir)
    key = _sha256(sha256, json.dumps(prompter.template, sort_keys=True), encoder.fingerprint(), str(skip_bad),
                  Path(data_path).suffix.lower(), _code_sha256())
    folder = Path(cache_dir or ROOT / "data") / CACHE_FOLDER / key[:32]
    cached = open_cache(folder)
    if cached is None:
        _fill_cache(folder, data_path, prompter, encoder, cache_dir, on_row, skip_bad)
        cached = open_cache(folder)
    arrays, meta = cached
    offsets = np.concatenate([[0], np.cumsum(arrays["lengths"])]).astype(np.int64)
    return Documents(arrays["tokens"], arrays["answer"], offsets, arrays["digests"], arrays["questions"],
                     arrays["numbers"], cutoff_len, end_id, sha256, meta["found"])


def source_sha256(data_path: str | Path, cache_dir: str | None = None) -> str:
    """데이터의 해시. 파일이면 내용의, hub의 데이터면 받은 판(revision)이 이름에 든 파일들의 해시다."""
    if Path(data_path).is_file():
        return datafile.file_sha256(data_path)
    received = rows.load_hub(str(data_path), cache_dir)
    return _sha256(str(data_path), *(file["filename"] for file in received.cache_files))


def _fill_cache(folder: Path, data_path: str | Path, prompter, encoder: Encoder, cache_dir: str | None,
                on_row: Callable[[int], None] | None, skip_bad: bool) -> None:
    inspector, writer = datacheck.Inspector(prompter, data_path), CacheWriter(folder)
    numbered = _usable_rows(data_path, prompter, inspector, cache_dir, skip_bad)
    try:
        for batch, encoded in _encode_ahead(numbered, encoder):
            writer.append({
                "tokens": [token for ids, _ in encoded for token in ids],
                "answer": [flag for _, is_answer in encoded for flag in is_answer],
                "lengths": [len(ids) for ids, _ in encoded],
                "digests": [content_digest(pieces) for _, pieces in batch],
                "questions": [content_digest([(p, "" if p else a) for p, a in pieces]) for _, pieces in batch],
                "numbers": [number for number, _ in batch],
            })
            if on_row is not None:
                on_row(inspector.n_rows)
        if not inspector.n_rows:
            raise UsageError(f"{data_path}에 쓸 수 있는 행이 하나도 없다")
        writer.commit({"found": inspector.finish()})
    finally:
        writer.discard()


def _usable_rows(data_path: str | Path, prompter, inspector: datacheck.Inspector, cache_dir: str | None,
                 skip_bad: bool) -> Iterator[tuple[int, rows.Pieces]]:
    """(행 번호, 조각)을 하나씩 준다. 지나가는 행을 `inspector`가 본다."""
    to_pieces, columns = None, ()
    for number, row in rows.read_rows(data_path, cache_dir, inspector.broken if skip_bad else None):
        if to_pieces is None:
            to_pieces, columns = rows.segmenter(set(row), prompter, data_path), rows.choose_columns(set(row))
        try:
            pieces = to_pieces(number, row)
        except UsageError:
            if not skip_bad:
                raise
            inspector.unusable(number, row, columns)
            continue
        inspector.look(number, row, columns, pieces)
        yield number, pieces


def _encode_ahead(numbered: Iterator[tuple[int, rows.Pieces]], encoder: Encoder) -> Iterator[tuple[list, list]]:
    """(행들, 토큰들)을 한 묶음씩 준다. 묶음을 토큰으로 바꾸는 동안 다음 묶음을 읽는다."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        while batch := list(islice(numbered, _BATCH)):
            submitted = batch, pool.submit(encoder.encode_batch, [pieces for _, pieces in batch])
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = submitted
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _code_sha256() -> str:
    """토큰과 검사를 만드는 코드의 해시. 코드가 바뀌면 옛 캐시를 쓰지 않는다."""
    modules = (datafile, rows, prompter_module, datacheck)
    return _sha256(*(Path(each.__file__).read_text(encoding="utf-8") for each in modules),
                   Path(__file__).read_text(encoding="utf-8"))


def content_digest(pieces: Iterable[tuple[str, str]]) -> int:
    """행의 내용으로 정해지는 64비트 수. 같은 행은 늘 같은 쪽(학습 또는 검증)에 놓인다."""
    joined = "\x1e".join("\x1f".join(piece) for piece in pieces)
    return int.from_bytes(hashlib.sha256(joined.encode()).digest()[:8], "little")


def split_by_content(documents: Documents, percent: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(학습 문서 번호, 검증 문서 번호). 내용의 해시로 나누므로 행을 더해도 이미 있던 행은 자리를 바꾸지 않는다."""
    if percent <= 0 or len(np.unique(documents.digests)) < 2:  # 모두 같은 행이면 나눌 수 없다
        return np.arange(len(documents)), np.arange(0)
    scrambled = documents.digests ^ np.uint64(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little"))
    scrambled = scrambled * np.uint64(0x9E3779B97F4A7C15)
    held_out = scrambled < np.uint64(int(percent / 100 * (2**64 - 1)))
    if not held_out.any() or held_out.all():  # 행이 몇 안 될 때도 양쪽에 하나는 있게 한다
        held_out = scrambled == scrambled.min()
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def with_answers(documents: Documents, members: np.ndarray) -> np.ndarray:
    """`members` 가운데 자른 뒤에도 답이 남은 문서. 답이 모두 잘리면 배울 것이 질문 뒤의 끝 토큰뿐이다."""
    cut = documents.full_lengths()[members] > documents.lengths()[members]
    lost = [member for member in members[cut] if not documents.document(member)[1][:-1].any()]
    return np.setdiff1d(members, lost)


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
