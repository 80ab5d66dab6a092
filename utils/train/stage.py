"""미세조정의 앞쪽 단계: 준비(prepare), 계획(plan), 모델(build_model). `finetune-lora.py`가 부른다."""

from collections.abc import Callable

import numpy as np
import torch

from utils import hub
from utils.chat_settings import DATE
from utils.data import blocks, dataset
from utils.data.blocks import Split
from utils.data.exams import Exam, load_exams
from utils.data.rows import require_data
from utils.errors import UsageError
from utils.model import adapter, loader, merged, targets, vram
from utils.model.loader import require_base
from utils.model.tokenizer import end_token_ids
from utils.paths import find_input, located
from utils.process import n_processes
from utils.train import corpus, defaults, pairs, planner, tracking
from utils.train.batch_size import batch_lines, choose_batch, share_of_batch
from utils.train.inputs import Inputs
from utils.train.prediction import CONTEXT, Workload
from utils.train.records import Plan, Schedule, Settings


def prepare(settings: Settings, say: Callable[[str], None]) -> Inputs:
    """장치, 토크나이저, 데이터를 갖춘다. 모델은 아직 올리지 않는다.

    Raises:
        UsageError: 기반 모델이나 데이터가 잘못되었다.
    """
    require_data(settings.data_path)
    trackers = tracking.choose_trackers(settings)
    config = open_base(settings)
    lora_targets = targets.find_targets(settings.base_model, settings.lora_target_modules, config, settings.cache_dir)
    device = loader.choose_device()
    say(device.line())

    read = corpus.read(settings)
    warn_of_template(settings, read.prompter, say)
    exams = open_exams(settings, read.prompter)
    parts = corpus.split(settings, read.documents, say)
    lengths, longest = lengths_to_fit(read.documents, parts)
    batch = choose_batch(settings, lengths, longest, n_processes())
    beta = defaults.fill(settings, config, read.documents.pairs).dpo_beta
    train_set, eval_set = corpus.pack(settings, read, parts, batch, beta)
    end_ids = end_token_ids(read.tokenizer, hub.folder(settings.base_model, settings.cache_dir))
    return Inputs(device, config, read.tokenizer, read.end_id, end_ids, read.prompter, read.encoder, read.documents,
                  parts, train_set, eval_set, batch, read.documents.sha256, lora_targets, trackers, exams)


def open_base(settings: Settings) -> dict:
    """기반 모델의 config.json. 이 모델을 이 cutoff_len으로 배울 수 있는지 데이터를 읽기 전에 본다.

    Raises:
        UsageError: 모델이 없거나, 배울 수 없는 모델이거나, 블록이 문맥보다 길다.
    """
    if require_base(settings.base_model) is None:
        hub.folder(settings.base_model, settings.cache_dir)  # 데이터를 다 읽고 나서 받다가 그치지 않게 한다
    config = loader.load_config(settings.base_model, settings.cache_dir)
    loader.require_trainable(settings.base_model, config)
    require_whole_merge(settings)
    check_block_fits(settings.cutoff_len, config)
    return config


def require_whole_merge(settings: Settings) -> None:
    """합친 모델이면, 배우려고 4비트로 줄여도 앞서 배운 것이 남는지 본다.

    NF4를 다녀온 가중치에 작은 갱신을 더한 것은, NF4로 다시 줄이면 갱신하기 전의 값으로 되돌아간다.

    Raises:
        UsageError: 앞서 배운 것이 지워진다.
    """
    if merged.merged_onto(hub.folder(settings.base_model, settings.cache_dir)) == "quantized":
        raise UsageError(f"--merge_onto quantized로 합친 모델이라 4비트로 다시 줄이면 앞서 배운 것이 거의 지워진다: "
                         f"{settings.base_model}. 새 폴더에 --merge_onto original로 다시 합쳐 그것을 --base_model로 "
                         "적는다")


def warn_of_template(settings: Settings, prompter, say: Callable[[str], None]) -> None:
    """합친 모델을 다른 템플릿으로 더 배우면 알린다. 날짜만 다른 것은 같은 템플릿이다."""
    info = adapter.read_prompt_info(hub.folder(settings.base_model, settings.cache_dir))
    if info and {**info.template, DATE: None} != {**prompter.template, DATE: None}:
        learned = info.template.get("name")
        say(f"주의: 기반 모델이 배운 템플릿({learned})이 아니라 다른 템플릿({prompter.name})으로 배운다. 앞서 배운 "
            f"답이 나빠진다. 이어 배우려면 적는다: --prompt_template {learned}")


def check_block_fits(cutoff_len: int, config: dict) -> None:
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if limit and cutoff_len > limit:
        raise UsageError(f"블록(cutoff_len {cutoff_len})이 모델의 문맥 {limit}토큰보다 길다. "
                         f"--cutoff_len {limit} 이하로 적는다")


def open_exams(settings: Settings, prompter) -> list[Exam]:
    """학습한 다음 볼 시험들. 적지 않았으면 비었다."""
    if settings.eval_task is None:
        return []
    return load_exams(find_input(settings.eval_task), prompter, settings.cache_dir)


def lengths_to_fit(documents: dataset.Documents, parts: Split) -> tuple[np.ndarray, int]:
    """(학습할 문서들의 토큰 수, 검증까지 보아 가장 긴 것). batch와 블록을 여기에 맞춘다. [문서의 수] int64."""
    return (blocks.unit_lengths(documents, parts.train),
            int(blocks.unit_lengths(documents, np.concatenate(parts)).max()))


def plan(settings: Settings, inputs: Inputs, say: Callable[[str], None]) -> Plan:
    """무엇을 얼마나 할지 정하고, batch를 줄였거나 너무 적게 배우면 그것도 알린다. 모델을 올리기 전이다."""
    batch = inputs.batch
    share = share_of_batch(settings, batch.size)
    schedule = Schedule.from_blocks(len(inputs.train_set), batch.size, settings.num_train_epochs)
    longest = int(np.minimum(inputs.documents.lengths(), batch.block_len).max())
    device = inputs.device.device
    outside = CONTEXT + (vram.load_libraries(device, inputs.device.dtype) if device.type == "cuda" else 0)
    work = Workload(inputs.config, inputs.targets, settings.lora_r, batch.block_len,
                    inputs.train_set.max_documents, outside)
    exact = settings.deterministic or longest <= planner.EXACT_TOKENS
    memory = planner.make_plan(work, device, share, settings.micro_batch_size, settings.vram_gb, exact)
    documents = inputs.documents
    lengths = blocks.unit_lengths(documents, np.arange(len(documents)))
    filled = inputs.train_set.n_tokens / (len(inputs.train_set) * batch.block_len)
    say(f"{corpus.count_line(documents, inputs.parts, lengths)}, 길이 중앙값 {int(np.median(lengths))}")
    for line in batch_lines(settings, batch, *lengths_to_fit(documents, inputs.parts), n_processes()):
        say(line)
    parts = f"{memory.micro_batch_size} x {share // memory.micro_batch_size}"
    parts += f" x 프로세스 {n_processes()}" if n_processes() > 1 else ""
    say(f"블록: {len(inputs.train_set):,}개 x {batch.block_len} 토큰(채움 {filled:.1%}). "
        "한 블록의 문서들은 서로 보지 않는다")
    say(f"계획: {schedule.steps} step(워밍업 {schedule.warmup}), {schedule.interval} step마다 평가하고 저장한다. "
        f"batch {batch.size} = micro {parts}, 학습률 {settings.learning_rate:g}")
    for line in [*pairs.plan_lines(settings, documents), *memory.lines()]:
        say(line)
    return Plan(schedule, memory, share // memory.micro_batch_size, n_processes())


def build_model(settings: Settings, inputs: Inputs, say: Callable[[str], None]):
    """기반 모델을 4비트로 올리고 LoRA를 붙인다.

    Raises:
        UsageError: 모델을 읽지 못한다. 저장한 어댑터를 다시 얹지 못하는 구조다.
    """
    from peft import LoraConfig, get_peft_model

    quantize = None if inputs.device.device.type == "mps" else "4bit"
    base = loader.load_base(settings.base_model, inputs.device, quantize, settings.cache_dir)
    if next(base.parameters()).is_cuda:
        vram.gather(base)
    if widths := loader.inexact_widths(base):
        say(f"주의: bitsandbytes의 CPU 커널은 64의 배수가 아닌 폭({', '.join(map(str, widths))})의 4비트를 바르게 풀지 "
            "못한다. 여기에서 배운 어댑터는 GPU에서 다른 답을 낸다")
    base.name_or_path = located(settings.base_model)  # PEFT는 어댑터의 설정에 이것을 적는다
    torch.manual_seed(settings.seed)
    model = get_peft_model(base, LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        target_modules=targets.peft_targets(base, inputs.targets), task_type="CAUSAL_LM",
        fan_in_fan_out=inputs.config["model_type"] in targets.TRANSPOSED))
    adapter.require_reloadable(model)
    trainable, total = model.get_nb_trainable_parameters()
    say(f"모델: {total:,} 매개변수, 그 가운데 {trainable:,}개({trainable / total:.2%})를 배운다")
    return model
