"""학습할 데이터: 읽고(read), 나누고(split), 블록에 채우고(pack), 찾은 잘못을 말한다(check)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from utils.data import blocks, dataset
from utils.data import check as data_check
from utils.data.blocks import PackedDataset, PairedDataset, Split
from utils.data.encoder import Encoder
from utils.data.rendered import rendered_lines
from utils.data.repair import check_target, repair
from utils.errors import UsageError
from utils.model import loader
from utils.model.tokenizer import answer_end_id, load_tokenizer
from utils.prompter import make_prompter
from utils.train import conditions, pairs
from utils.train.records import BatchSize, Settings


@dataclass(frozen=True)
class Corpus:
    """읽은 데이터와, 그것을 읽는 데 쓴 것들."""

    tokenizer: object
    end_id: int
    prompter: object
    encoder: Encoder
    documents: dataset.Documents


def read(settings: Settings, skip_bad: bool = False) -> Corpus:
    """데이터를 읽는다. 오래 걸리면 터미널에 막대를 그린다.

    Args:
        skip_bad: True면 잘못된 행에서 멈추지 않고 센다.

    Raises:
        UsageError: 토크나이저나 템플릿이나 데이터가 잘못되었다. 모델의 embedding에 없는 토큰이 나온다.
    """
    tokenizer = load_tokenizer(settings.base_model, settings.cache_dir)
    prompter = make_prompter(settings.prompt_template, tokenizer, conditions.earlier_date(settings))
    end_id = answer_end_id(tokenizer, prompter)
    n_rows = loader.load_config(settings.base_model, settings.cache_dir).get("vocab_size")
    encoder = Encoder(tokenizer, end_id, n_rows)
    with tqdm(desc="데이터", unit="행", leave=False, disable=None) as bar:
        documents = dataset.load_documents(settings.data_path, prompter, encoder, settings.cutoff_len, end_id,
                                           settings.cache_dir, lambda n_rows: bar.update(n_rows - bar.n), skip_bad)
    return Corpus(tokenizer, end_id, prompter, encoder, documents)


def split(settings: Settings, documents: dataset.Documents, say: Callable[[str], None]) -> Split:
    """학습과 검증으로 나누고, 데이터에서 찾은 것을 말하고, 배울 것이 없는 행을 뺀다.

    Raises:
        UsageError: 배울 행이 하나도 남지 않는다.
    """
    parts = blocks.split_by_content(documents, settings.val_set_size, settings.seed)
    lines = fault_lines(documents, parts)
    if lines:
        say("데이터에서 찾은 것(자세히 보려면 --check_data True):")
    for line in lines:
        say(line)
    drop = pairs.drop_long_pairs if documents.pairs else drop_answerless
    return drop(settings, documents, parts, say)


def fault_lines(documents: dataset.Documents, parts: Split) -> list[str]:
    """데이터에서 찾은 이상한 것마다 한 줄."""
    return data_check.short_lines({**documents.found, **data_check.document_faults(documents, *parts)})


def drop_answerless(settings: Settings, documents: dataset.Documents, parts: Split,
                    say: Callable[[str], None]) -> Split:
    """답이 모두 잘린 행을 뺀다. 질문도 배우면 학습에서는 빼지 않는다.

    Raises:
        UsageError: 배울 행이 하나도 남지 않는다.
    """
    train = parts.train if settings.train_on_inputs else blocks.with_answers(documents, parts.train)
    held_out = blocks.with_answers(documents, parts.held_out)
    dropped = len(parts.train) - len(train), len(parts.held_out) - len(held_out)
    if any(dropped):
        say(f"답이 모두 잘린 행을 뺐다(cutoff_len {settings.cutoff_len}): 학습 {dropped[0]:,}행, 검증 {dropped[1]:,}행")
    if not len(train):
        raise UsageError(f"모든 행의 답이 cutoff_len {settings.cutoff_len}에서 잘려 배울 것이 없다. --cutoff_len을 "
                         "늘리거나 --train_on_inputs True로 질문도 배운다")
    return Split(train, held_out)


def pack(settings: Settings, corpus: Corpus, parts: Split, batch: BatchSize,
         beta: float) -> tuple[PackedDataset, PackedDataset | None]:
    """(학습할 블록들, 검증할 블록들). 검증은 무엇을 배우든 답만 잰다. 검증할 행이 없으면 None이다.

    Args:
        beta: 선호 쌍이면 DPO의 beta.
    """
    documents = corpus.documents

    def packed(members: np.ndarray, train_on_inputs: bool) -> PackedDataset:
        if documents.pairs:
            return PairedDataset(documents, members, batch.block_len, corpus.end_id, beta, settings.seed, batch.room)
        return PackedDataset(documents, members, batch.block_len, corpus.end_id, train_on_inputs, settings.seed,
                             batch.room)

    train_set = packed(parts.train, settings.train_on_inputs)
    eval_set = packed(parts.held_out, train_on_inputs=False) if len(parts.held_out) else None
    if documents.pairs:
        blocks.make_even(train_set, eval_set)
    return train_set, eval_set


def count_line(documents: dataset.Documents, parts: Split, lengths: np.ndarray) -> str:
    """행(선호 쌍이면 쌍)과 토큰이 몇 개인지. `lengths`는 행마다의 토큰 수다. [행의 수] int64."""
    unit = "쌍" if documents.pairs else "행"
    train, held_out = (len(members) // documents.per_row for members in parts)
    return f"데이터: {len(lengths):,}{unit}(학습 {train:,}, 검증 {held_out:,}), 토큰 {int(lengths.sum()):,}개"


def check(settings: Settings, say: Callable[[str], None]) -> None:
    """데이터를 끝까지 검사해 찾은 것과 두 행의 loss 자리를 보인다. `repair_data`가 있으면 고친 파일도 쓴다.

    Raises:
        UsageError: 기반 모델이 없거나, 데이터를 읽을 수 없거나, 고친 파일을 쓸 수 없다.
    """
    loader.require_base(settings.base_model)
    if settings.repair_data is not None:
        check_target(settings.data_path, settings.repair_data)
    corpus = read(settings, skip_bad=True)
    documents = corpus.documents
    parts = blocks.split_by_content(documents, settings.val_set_size, settings.seed)
    lengths = documents.full_lengths().reshape(-1, documents.per_row).sum(1)
    say(f"{count_line(documents, parts, lengths)}, "
        f"길이 중앙값 {int(np.median(lengths))}, 최댓값 {int(lengths.max())}")
    if documents.pairs:
        say(pairs.lengths_line(documents))
    lines = fault_lines(documents, parts)
    say("찾은 것:" if lines else "찾은 것: 없다")
    for line in lines:
        say(line)
    say("두 행의 보기(⟦ ⟧ 안을 배운다):")
    for line in rendered_lines(documents, corpus.tokenizer, settings.train_on_inputs):
        say(line)
    if settings.repair_data is not None:
        done = repair(settings.data_path, settings.repair_data, corpus.prompter, settings.cache_dir)
        say(f"고친 파일: {settings.repair_data} ({done.written:,}행을 썼다. 그 가운데 {done.changed:,}행을 고쳤고, "
            f"{done.dropped:,}행은 버렸다)")
