"""데이터 파일에서 토큰까지의 길: 행을 읽고, 대화로, 문서의 조각으로, 토큰으로 바꾸어 디스크에 둔다."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import chat, chat_settings, prompter, turns
from utils.data import (
    check,
    columns,
    encoder,
    encoding,
    forms,
    kobest,
    pair_check,
    preferences,
    readers,
    row_check,
    rows,
    tables,
    talks,
    texts,
    window,
)
from utils.data.documents import CacheWriter, Documents, open_cache
from utils.data.encoder import Encoded, Encoder, content_digest
from utils.data.preferences import Pair
from utils.data.talks import BadTurns
from utils.data.window import Window
from utils.errors import UsageError
from utils.files import file_sha256, text_sha256
from utils.paths import ROOT

CACHE_FOLDER = "tokens"
_BATCH = 2048


@dataclass(frozen=True)
class _Document:
    """토큰으로 바꿀 문서 하나. 선호 쌍이면 고른 답의 문서와 버린 답의 문서가 잇달아 놓인다.

    Attributes:
        digest: 그 문서가 든 행의 내용의 해시. 한 행의 문서들은 같아서, 나눌 때 언제나 같은 쪽에 놓인다.
        question: 그 행의 질문의 해시.
    """

    number: int
    pieces: turns.Pieces
    digest: int
    question: int


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
    key = text_sha256(sha256, json.dumps(prompter.template, sort_keys=True), encoder.fingerprint(),
                      Path(data_path).suffix.lower(), _code_sha256(),
                      _shape(data_path, cache_dir, cutoff_len))
    folder = Path(cache_dir or ROOT / "data") / CACHE_FOLDER / key[:32]
    cached = open_cache(folder)
    if cached is None or (cached.meta["skipped"] and not skip_bad):  # 건너뛴 행이 있으면 다시 읽어 그 행을 말한다
        _fill_cache(folder, data_path, prompter, encoder, cutoff_len, cache_dir, on_row, skip_bad)
        cached = open_cache(folder)
    arrays, meta = cached
    # 길이 [3, 2, 4] -> 자리 [0, 3, 5, 9]: 문서 i는 자리 i부터 자리 i + 1의 앞까지다
    offsets = np.concatenate([[0], np.cumsum(arrays["lengths"])]).astype(np.int64)
    return Documents(arrays["tokens"], arrays["answer"], offsets, arrays["digests"], arrays["questions"],
                     arrays["numbers"], cutoff_len, end_id, sha256, meta["found"], meta["pairs"])


def source_sha256(data_path: str | Path, cache_dir: str | None = None) -> str:
    """데이터의 해시. 파일이면 내용의, hub의 데이터면 받은 버전(revision)이 이름에 든 파일들의 해시다."""
    if Path(data_path).is_file():
        return file_sha256(Path(data_path))
    received = rows.load_hub(str(data_path), cache_dir)
    return text_sha256(str(data_path), *(file["filename"] for file in received.cache_files))


def _shape(data_path: str | Path, cache_dir: str | None, cutoff_len: int) -> str:
    """내용이 같아도 토큰을 다르게 하는 것을 첫 행으로 본다: KoBEST의 시험이거나, 대화를 자르는 길이(cutoff_len)."""
    if Path(data_path).suffix.lower() == ".txt":
        return str(None)
    _, row = next(rows.read_rows(data_path, cache_dir, lambda number, reason: None), (0, {}))
    if (task := kobest.task_of(row, data_path)) is not None:
        return task.name
    form = columns.choose_form(row)
    names = form.columns if form else {}
    is_talk = "talk" in names or "history" in names or isinstance(row.get(names.get("question")), list)
    return str(cutoff_len if is_talk else None)


def _fill_cache(folder: Path, data_path: str | Path, prompter, encoder: Encoder, cutoff_len: int,
                cache_dir: str | None, on_row: Callable[[int], None] | None, skip_bad: bool) -> None:
    inspector, writer = check.Inspector(prompter, data_path), CacheWriter(folder)
    window = Window(prompter, encoder, cutoff_len)
    documents = _usable_documents(data_path, prompter, window, inspector, cache_dir, skip_bad)
    try:
        for batch, encoded in _encode_ahead(documents, encoder):
            writer.append({
                "tokens": [token for each in encoded for token in each.tokens],
                "answer": [mark for each in encoded for mark in each.marks],
                "lengths": [len(each.tokens) for each in encoded],
                "digests": [document.digest for document in batch],
                "questions": [document.question for document in batch],
                "numbers": [document.number for document in batch],
            })
            if on_row is not None:
                on_row(inspector.n_rows)
        if inspector.n_rows and inspector.n_rows == inspector.pairs.n_same:
            raise UsageError(f"{data_path}의 모든 쌍은 고른 답과 버린 답이 같아 배울 것이 없다. 다른 답을 적는다")
        if not inspector.n_rows:
            raise UsageError(_nothing_usable(data_path, inspector.first_error))
        writer.commit({"found": inspector.finish(), "skipped": inspector.n_skipped,
                       "pairs": inspector.pairs.count > 0})
    finally:
        writer.discard()


def _usable_documents(data_path: str | Path, prompter, window: Window, inspector: check.Inspector,
                      cache_dir: str | None, skip_bad: bool) -> Iterator[_Document]:
    """문서를 하나씩 준다. 지나가는 행을 `inspector`가 본다."""
    form = None
    for number, row in rows.read_rows(data_path, cache_dir, inspector.broken if skip_bad else None):
        form = form or columns.form_of(row, data_path)
        forms.require_alike(row, form, number, data_path)
        try:
            if form.is_preference:
                pair = say_pair(prompter, row, form, number, data_path)
            else:
                said = forms.read_row(row, form, number, data_path)
                said, documents = say_row(prompter, said, number, data_path, window.documents)
        except BadTurns as error:
            if not skip_bad:
                raise
            inspector.unusable(number, error)
            continue
        if form.is_preference:
            inspector.look_at_pair(number, row, form, pair)
            if not pair.is_same:
                yield from _pair_documents(number, pair)
            continue
        inspector.look(number, row, form, said, documents)
        if window.dropped:
            inspector.cut(number, window.dropped)
        digest = content_digest(documents[-1])
        question = content_digest([(prompt, "" if prompt else answer) for prompt, answer in documents[-1]])
        for pieces in documents:
            yield _Document(number, pieces, digest, question)


def _pair_documents(number: int, pair: Pair) -> Iterator[_Document]:
    """선호 쌍의 두 문서. 같은 행이므로 digest가 같고, 나눌 때 늘 함께 간다."""
    digest = content_digest([*pair.chosen, *pair.rejected])
    question = content_digest([(prompt, "") for prompt, _ in pair.chosen])
    for pieces in (pair.chosen, pair.rejected):
        yield _Document(number, pieces, digest, question)


def say_pair(prompter, row: dict, form: columns.Form, number: int, source: str | Path) -> Pair:
    """선호 쌍의 행 하나를 템플릿으로 말한 두 문서.

    Raises:
        BadTurns: 행이나 템플릿이 받지 않는다. 행의 번호를 말한다.
    """
    sides = [say_row(prompter, said, number, source) for said in forms.read_pair(row, form, number, source)]
    return Pair(*(side.turns for side in sides), *(side.documents[-1] for side in sides))


class Said(NamedTuple):
    """행 하나: 템플릿에 맞추어 읽은 글들과, 그것을 말한 문서들."""

    turns: list[turns.Turn]
    documents: list[turns.Pieces]


def say_row(prompter, said: list[turns.Turn], number: int, source: str | Path,
            say: Callable | None = None) -> Said:
    """행의 글들을 템플릿으로 말한 것.

    Args:
        say: 글들을 문서들로 바꾸는 것. 없으면 `prompter.talk`다.

    Raises:
        BadTurns: 템플릿이 받지 않거나 글을 바꾼다. 질문과 답이 한 글인 행의 답이 비었다. 행의 번호를 말한다.
    """
    said = prompter.read(said)
    try:
        documents = (say or prompter.talk)(said)
    except chat.CannotSay as error:
        raise BadTurns(f"{source}의 {number}번째 행: {error}", error.kind) from None
    answer = documents[-1][0][1] if said[0].role == "text" else said[-1].text
    if not answer.strip():
        raise BadTurns(f"{source}의 {number}번째 행에 text의 답이 없거나 비었다. {forms.ADVICE}", "empty")
    return Said(said, documents)


def _encode_ahead(documents: Iterator[_Document],
                  encoder: Encoder) -> Iterator[tuple[list[_Document], list[Encoded]]]:
    """(문서들, 토큰들)을 한 묶음씩 준다. 묶음을 토큰으로 바꾸는 동안 다음 묶음을 읽는다."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        while batch := list(islice(documents, _BATCH)):
            submitted = batch, pool.submit(encoder.encode_batch, [document.pieces for document in batch])
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = submitted
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _code_sha256() -> str:
    """토큰과 검사를 만드는 코드의 해시. 코드가 바뀌면 옛 캐시를 쓰지 않는다."""
    modules = (encoding, tables, readers, rows, kobest, columns, forms, preferences, talks, texts, window, encoder,
               turns, chat, chat_settings, prompter, check, row_check, pair_check)
    return text_sha256(*(Path(each.__file__).read_text(encoding="utf-8") for each in modules),
                       Path(__file__).read_text(encoding="utf-8"))


def _nothing_usable(data_path: str, error: Exception | None) -> str:
    """모든 행을 보고도 쓸 것이 없을 때의 말. 첫 이유에서, 모두 찾아보라는 말은 뺀다."""
    if error is None:
        return f"{data_path}에 쓸 수 있는 행이 하나도 없다"
    return f"쓸 수 있는 행이 하나도 없다. {str(error).removesuffix(f'. {forms.ADVICE}')}"
