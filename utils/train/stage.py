"""미세조정의 앞쪽 단계: 준비(prepare), 계획(plan), 모델(build_model), 데이터의 검사. `finetune-lora.py`가 부른다."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from utils import hub
from utils.data import blocks, dataset
from utils.data import check as data_check
from utils.data.encoder import Encoder
from utils.data.exams import Exam, load_exams
from utils.data.rendered import rendered_lines
from utils.data.repair import check_target, repair
from utils.data.rows import require_data
from utils.errors import UsageError
from utils.model import adapter, diskmap, loader
from utils.model.folder import open_model_folder
from utils.model.loader import require_base
from utils.model.shape import empty_model
from utils.model.targets import (
    TRANSPOSED,
    attention_names,
    choose_targets,
    linear_names,
    peft_targets,
    require_targets,
    unfit_names,
)
from utils.model.tokenizer import answer_end_id, end_token_ids, load_tokenizer
from utils.paths import find_input
from utils.process import n_processes
from utils.prompter import make_prompter
from utils.train import defaults, pairs, planner, tracking
from utils.train.batch_size import BatchSize, batch_lines, choose_batch, share_of_batch
from utils.train.records import Plan, Schedule, Settings


@dataclass
class Inputs:
    """모델을 올리기 전에 갖추어지는 것들."""

    device: loader.Device
    config: dict
    tokenizer: object
    end_id: int
    end_ids: tuple[int, ...]
    prompter: object
    encoder: Encoder
    documents: dataset.Documents
    held_out: np.ndarray
    train_set: blocks.PackedDataset
    eval_set: blocks.PackedDataset | None
    batch: BatchSize
    data_sha256: str
    targets: tuple[str, ...]
    trackers: tracking.TrackerChoice
    exams: list[Exam]


@dataclass(frozen=True)
class Read:
    """읽은 데이터와, 그것을 읽는 데 쓴 것들."""

    tokenizer: object
    end_id: int
    prompter: object
    encoder: Encoder
    documents: dataset.Documents


def prepare(settings: Settings, say: Callable[[str], None]) -> Inputs:
    """장치, 토크나이저, 데이터를 갖춘다. 모델은 아직 올리지 않는다.

    Raises:
        UsageError: 기반 모델이나 데이터가 잘못되었다.
    """
    require_data(settings.data_path)
    trackers = tracking.choose_trackers(settings)
    if require_base(settings.base_model) is None:
        hub.folder(settings.base_model, settings.cache_dir)  # 데이터를 다 읽고 나서 받다가 그치지 않게 한다
    config = loader.load_config(settings.base_model, settings.cache_dir)
    loader.require_trainable(settings.base_model, config)
    targets = find_targets(settings, config)
    check_block_fits(settings.cutoff_len, config)
    device = loader.choose_device()
    say(f"장치: {device.device} / {str(device.dtype).removeprefix('torch.')}. {device.reason}")
    read = read_data(settings, say)
    documents = read.documents
    exams = [] if settings.eval_task is None else load_exams(find_input(settings.eval_task), read.prompter,
                                                             settings.cache_dir)
    chosen, held_out = blocks.split_by_content(documents, settings.val_set_size, settings.seed)
    report_data(documents, chosen, held_out, say)
    drop = pairs.drop_long_pairs if documents.pairs else drop_answerless
    chosen, held_out = drop(settings, documents, chosen, held_out, say)

    lengths = blocks.unit_lengths(documents, chosen)
    longest = int(blocks.unit_lengths(documents, np.concatenate([chosen, held_out])).max())
    batch = choose_batch(settings, lengths, longest, n_processes())
    for line in batch_lines(settings, batch, lengths, longest, n_processes()):
        say(line)

    def packed(members: np.ndarray, train_on_inputs: bool) -> blocks.PackedDataset:
        if documents.pairs:
            return blocks.PairedDataset(documents, members, batch.block_len, read.end_id,
                                        defaults.fill(settings, config, pairs=True).dpo_beta, settings.seed, batch.room)
        return blocks.PackedDataset(documents, members, batch.block_len, read.end_id, train_on_inputs, settings.seed,
                                     batch.room)

    end_ids = end_token_ids(read.tokenizer, hub.folder(settings.base_model, settings.cache_dir))
    train_set = packed(chosen, settings.train_on_inputs)
    eval_set = packed(held_out, train_on_inputs=False) if len(held_out) else None  # 무엇을 배우든 답을 잰다
    if documents.pairs:
        blocks.make_even(train_set, eval_set)
    return Inputs(device, config, read.tokenizer, read.end_id, end_ids, read.prompter, read.encoder, documents,
                  held_out, train_set, eval_set, batch, documents.sha256, targets, trackers, exams)


def find_targets(settings: Settings, config: dict) -> tuple[str, ...]:
    """LoRA를 붙일 층을, 가중치가 없는 모델에서 미리 찾는다. 데이터를 읽기 전에 쓸 수 없는 이름을 가린다.

    Raises:
        UsageError: 모델에 없는 층이거나, LoRA를 붙이지 못하거나 배워도 합칠 수 없는 층이다.
    """
    from transformers import AutoConfig

    empty = empty_model(AutoConfig.from_pretrained(settings.base_model, cache_dir=settings.cache_dir,
                                                   trust_remote_code=False))
    disk = diskmap.read(open_model_folder(hub.folder(settings.base_model, settings.cache_dir)))
    unfit = unfit_names(empty, disk)
    names = linear_names(empty) - unfit.keys()
    targets = choose_targets(settings.lora_target_modules, config, names, attention_names(empty) - unfit.keys())
    refused = [target for target in targets if target in unfit]
    if refused:
        raise UsageError(f"{unfit[refused[0]]}이라 배워도 합칠 수 없다: {', '.join(refused)}. --lora_target_modules에 "
                         f"쓸 수 있는 이름: {', '.join(sorted(names))}")
    require_targets(empty, targets)
    return targets


def drop_answerless(settings: Settings, documents: dataset.Documents, chosen: np.ndarray, held_out: np.ndarray,
                    say: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray]:
    """답이 모두 잘린 행을 뺀 (학습 문서 번호, 검증 문서 번호). 질문도 배우면 학습에서는 빼지 않는다.

    Raises:
        UsageError: 배울 행이 하나도 남지 않는다.
    """
    kept = chosen if settings.train_on_inputs else blocks.with_answers(documents, chosen)
    measured = blocks.with_answers(documents, held_out)
    dropped = len(chosen) - len(kept), len(held_out) - len(measured)
    if any(dropped):
        say(f"답이 모두 잘린 행을 뺐다(cutoff_len {settings.cutoff_len}): 학습 {dropped[0]:,}행, 검증 {dropped[1]:,}행")
    if not len(kept):
        raise UsageError(f"모든 행의 답이 cutoff_len {settings.cutoff_len}에서 잘려 배울 것이 없다. --cutoff_len을 "
                         "늘리거나 --train_on_inputs True로 질문도 배운다")
    return kept, measured


def read_data(settings: Settings, say: Callable[[str], None], skip_bad: bool = False) -> Read:
    """데이터를 읽는다. 오래 걸리면 터미널에 막대를 그린다.

    Args:
        skip_bad: True면 잘못된 행에서 멈추지 않고 센다.

    Raises:
        UsageError: 토크나이저나 템플릿이나 데이터가 잘못되었다. 모델의 embedding에 없는 토큰이 나온다.
    """
    tokenizer = load_tokenizer(settings.base_model, settings.cache_dir)
    prompter = make_prompter(settings.prompt_template, tokenizer)
    end_id = answer_end_id(tokenizer, prompter)
    n_rows = loader.load_config(settings.base_model, settings.cache_dir).get("vocab_size")
    encoder = Encoder(tokenizer, end_id, n_rows)
    with tqdm(desc="데이터", unit="행", leave=False, disable=None) as bar:
        documents = dataset.load_documents(settings.data_path, prompter, encoder, settings.cutoff_len, end_id,
                                           settings.cache_dir, lambda n_rows: bar.update(n_rows - bar.n), skip_bad)
    return Read(tokenizer, end_id, prompter, encoder, documents)


def report_data(documents: dataset.Documents, chosen: np.ndarray, held_out: np.ndarray,
                say: Callable[[str], None]) -> None:
    """데이터에서 이상한 것을 찾았으면 몇 줄로 말한다. `chosen`과 `held_out`은 문서 번호 [n] int64다."""
    lines = data_check.short_lines({**documents.found, **data_check.document_faults(documents, chosen, held_out)})
    if lines:
        say("데이터에서 찾은 것(자세히 보려면 --check_data True):")
    for line in lines:
        say(line)


def check_block_fits(cutoff_len: int, config: dict) -> None:
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if limit and cutoff_len > limit:
        raise UsageError(f"cutoff_len {cutoff_len}이 모델의 문맥 {limit}보다 길다. --cutoff_len {limit} 이하로 적는다")


def plan(settings: Settings, inputs: Inputs, say: Callable[[str], None]) -> Plan:
    """무엇을 얼마나 할지 정하고 알린다. 모델을 올리기 전이다."""
    batch = inputs.batch
    share = share_of_batch(settings, batch.size)
    schedule = Schedule.from_blocks(len(inputs.train_set), batch.size, settings.num_train_epochs)
    longest = int(np.minimum(inputs.documents.lengths(), batch.block_len).max())
    memory = planner.make_plan(
        inputs.config, device=inputs.device, cutoff_len=batch.block_len, batch_size=share,
        micro_batch_size=settings.micro_batch_size, lora_r=settings.lora_r, targets=inputs.targets,
        vram_gb=settings.vram_gb, max_documents=inputs.train_set.max_documents,
        exact=settings.deterministic or longest <= planner.EXACT_TOKENS)
    documents = inputs.documents
    n_train, lengths = sum(map(len, inputs.train_set.blocks)), blocks.unit_lengths(documents, np.arange(len(documents)))
    filled = inputs.train_set.n_tokens / (len(inputs.train_set) * batch.block_len)
    say(f"{count_line(documents, n_train, len(inputs.held_out), lengths)}, 가운데 길이 {int(np.median(lengths))}")
    parts = f"{memory.micro_batch_size} x {share // memory.micro_batch_size}"
    parts += f" x 프로세스 {n_processes()}" if n_processes() > 1 else ""
    say(f"블록: {len(inputs.train_set):,}개 x {batch.block_len} 토큰(채움 {filled:.1%}). "
        "한 블록의 문서들은 서로 보지 않는다")
    say(f"계획: {schedule.steps} step(워밍업 {schedule.warmup}), {schedule.interval} step마다 평가하고 저장한다. "
        f"batch {batch.size} = micro {parts}, 학습률 {settings.learning_rate:g}")
    for line in [*pairs.plan_lines(settings, documents), *memory.lines()]:
        say(line)
    return Plan(schedule, memory, share // memory.micro_batch_size, n_processes())


def count_line(documents: dataset.Documents, n_train: int, n_held_out: int, lengths: np.ndarray) -> str:
    """행(선호 쌍이면 쌍)과 토큰이 몇 개인지. 문서의 수 `n_train`과 `n_held_out`을 받는다."""
    each, unit = documents.per_row, "쌍" if documents.pairs else "행"
    return (f"데이터: {len(lengths):,}{unit}(학습 {n_train // each:,}, 검증 {n_held_out // each:,}), "
            f"토큰 {int(lengths.sum()):,}개")


def build_model(settings: Settings, inputs: Inputs, say: Callable[[str], None]):
    """기반 모델을 4비트로 올리고 LoRA를 붙인다.

    Raises:
        UsageError: 모델을 읽지 못한다. 저장한 어댑터를 다시 얹지 못하는 구조다.
    """
    from peft import LoraConfig, get_peft_model

    quantize = None if inputs.device.device.type == "mps" else "4bit"
    base = loader.load_base(settings.base_model, inputs.device, quantize, settings.cache_dir)
    if widths := loader.inexact_widths(base):
        say(f"주의: bitsandbytes의 CPU 커널은 64의 배수가 아닌 폭({', '.join(map(str, widths))})의 4비트를 바르게 풀지 "
            "못한다. 여기에서 배운 어댑터는 GPU에서 다른 답을 낸다")
    torch.manual_seed(settings.seed)
    model = get_peft_model(base, LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        target_modules=peft_targets(base, inputs.targets), task_type="CAUSAL_LM",
        fan_in_fan_out=inputs.config["model_type"] in TRANSPOSED, base_model_name_or_path=str(settings.base_model)))
    adapter.require_reloadable(model)
    trainable, total = model.get_nb_trainable_parameters()
    say(f"모델: {total:,} 매개변수, 그 가운데 {trainable:,}개({trainable / total:.2%})를 배운다")
    return model


def check_data(settings: Settings, say: Callable[[str], None]) -> None:
    """데이터를 끝까지 검사해 찾은 것과 두 행의 loss 자리를 보인다. `repair_data`가 있으면 고친 파일도 쓴다.

    Raises:
        UsageError: 데이터를 읽을 수 없거나 고친 파일을 쓸 수 없다.
    """
    if settings.repair_data is not None:
        check_target(settings.data_path, settings.repair_data)
    read = read_data(settings, say, skip_bad=True)
    documents = read.documents
    train, held_out = blocks.split_by_content(documents, settings.val_set_size, settings.seed)
    found = {**documents.found, **data_check.document_faults(documents, train, held_out)}
    lengths = documents.full_lengths().reshape(-1, documents.per_row).sum(1)
    say(f"{count_line(documents, len(train), len(held_out), lengths)}, "
        f"길이는 가운데 {int(sorted(lengths)[len(lengths) // 2])}, 가장 긴 것 {int(lengths.max())}")
    if documents.pairs:
        say(pairs.lengths_line(documents))
    say("찾은 것:" if found else "찾은 것: 없다")
    for line in data_check.short_lines(found):
        say(line)
    say("두 행의 보기(⟦ ⟧ 안을 배운다):")
    for line in rendered_lines(documents, read.tokenizer, settings.train_on_inputs):
        say(line)
    if settings.repair_data is not None:
        done = repair(settings.data_path, settings.repair_data, read.prompter, settings.cache_dir)
        say(f"고친 파일: {settings.repair_data} ({done.written:,}행을 썼다. 그 가운데 {done.changed:,}행을 고쳤고, "
            f"{done.dropped:,}행은 버렸다)")
