"""데이터 파일에서 토큰까지의 길: 행을 읽고, 조각으로 나누고, 토큰으로 바꾸어 디스크에 둔다."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from utils import prompter
from utils.data import check, readers, rows, talks, texts
from utils.data.documents import CacheWriter, Documents, open_cache
from utils.data.encoder import Encoder, content_digest
from utils.errors import UsageError
from utils.files import file_sha256, text_sha256
from utils.paths import ROOT

CACHE_FOLDER = "tokens"
_BATCH = 2048


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
    key = text_sha256(sha256, json.dumps(prompter.template, sort_keys=True), encoder.fingerprint(), str(skip_bad),
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
    """데이터의 해시. 파일이면 내용의, hub의 데이터면 받은 버전(revision)이 이름에 든 파일들의 해시다."""
    if Path(data_path).is_file():
        return file_sha256(Path(data_path))
    received = rows.load_hub(str(data_path), cache_dir)
    return text_sha256(str(data_path), *(file["filename"] for file in received.cache_files))


def _fill_cache(folder: Path, data_path: str | Path, prompter, encoder: Encoder, cache_dir: str | None,
                on_row: Callable[[int], None] | None, skip_bad: bool) -> None:
    inspector, writer = check.Inspector(prompter, data_path), CacheWriter(folder)
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


def _usable_rows(data_path: str | Path, prompter, inspector: check.Inspector, cache_dir: str | None,
                 skip_bad: bool) -> Iterator[tuple[int, rows.Pieces]]:
    """(행 번호, 조각)을 하나씩 준다. 지나가는 행을 `inspector`가 본다."""
    to_pieces, columns = None, ()
    for number, row in rows.read_rows(data_path, cache_dir, inspector.broken if skip_bad else None):
        if to_pieces is None:
            to_pieces, columns = rows.segmenter(set(row), prompter, data_path), rows.choose_columns(set(row))
        try:
            pieces = to_pieces(number, row)
        except UsageError as error:
            if not skip_bad:
                raise
            inspector.unusable(number, row, columns, error)
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


def _code_sha256() -> str:
    """토큰과 검사를 만드는 코드의 해시. 코드가 바뀌면 옛 캐시를 쓰지 않는다."""
    modules = (readers, rows, talks, texts, prompter, check)
    return text_sha256(*(Path(each.__file__).read_text(encoding="utf-8") for each in modules),
                       Path(__file__).read_text(encoding="utf-8"))


