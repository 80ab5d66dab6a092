"""한국어 언어 모델을 QLoRA 4비트로 미세조정한다."""

from utils import cli, console, process
from utils.paths import BASE_DEMO, DATA_DEMO, find_input, script, shown

MAX_BATCH, MAX_BLOCK, MAX_RANK, MAX_EPOCHS = 1 << 16, 1 << 17, 1 << 13, 100_000
RETIRED = {
    "load_4bit": "학습은 언제나 4비트다.",
    "load_8bit": "학습은 언제나 4비트다.",
    "gpt2_datasets": "열 이름을 보고 형식을 스스로 안다.",
    "keep_linebreaks": "줄바꿈은 언제나 그대로 둔다.",
    "block_size": "--cutoff_len이 블록의 길이다.",
    "add_eos_token": "끝 토큰은 언제나 한 번 붙는다.",
    "group_by_length": "문서를 블록에 빈틈없이 채우므로 필요 없다.",
}


def train(
    *,
    # 모델과 데이터
    base_model: str = str(BASE_DEMO),
    data_path: str = str(DATA_DEMO),
    output_dir: str = "train/lora-demo",
    cache_dir: str | None = None,
    # 학습
    num_train_epochs: float = 5,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    learning_rate: float | None = None,
    dpo_beta: float | None = None,
    cutoff_len: int = 1024,
    val_set_size: float = 5,
    train_on_inputs: bool = True,
    early_stopping_patience: int | None = None,
    eval_task: str | None = None,
    seed: int = 42,
    # LoRA
    lora_r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.05,
    lora_target_modules: tuple[str, ...] = ("query_key_value",),
    # 템플릿, 메모리, 재개
    prompt_template: str = "default",
    vram_gb: float | None = None,
    deterministic: bool = False,
    resume_from_checkpoint: bool | str | None = None,
    check_data: bool = False,
    repair_data: str | None = None,
    # 기록
    report_to: str = "none",
    wandb_project: str | None = None,
    wandb_run_name: str | None = None,
    wandb_watch: str | None = None,
    wandb_log_model: str | None = None,
    verbose: bool = False,
):
    """한국어 언어 모델을 QLoRA 4비트로 미세조정한다.

    가장 좋은 어댑터를 output_dir에, 학습의 기록을 run.json, curves.png, samples.md에 남긴다.

    Args:
        base_model: 기반 모델의 폴더나 hub id. 기본은 함께 든 데모 모델이다.
        data_path: 데이터 파일(.json .jsonl .csv .tsv .xlsx .parquet .txt)이나 hub id. 열 이름이 형식을 정한다.
        output_dir: 결과를 쓸 폴더.
        cache_dir: 받은 모델과 데이터를 둘 폴더.
        num_train_epochs: 데이터를 몇 번 볼지. 몇천 행이면 1과 5의 결과가 같았고, 몇십 행에는 3으로 모자랐다.
        batch_size: optimizer step 한 번에 쓰는 블록의 수. 블록 하나는 cutoff_len 토큰이다. 적지 않으면 16이고, 데이터가
            적어 100 step이 되지 않으면 batch와 블록을 더 작게 고르고 알린다.
        micro_batch_size: 한 번에 계산하는 블록의 수. 적지 않으면 메모리에 맞게 고른다. 결과는 같다.
        learning_rate: 가장 높을 때의 학습률. 적지 않으면 polyglot은 1e-3, 다른 모델은 5e-4다.
        dpo_beta: 선호 쌍(prompt, chosen, rejected의 열)을 배울 때 기반 모델에서 멀어지는 것을 얼마나 막을지(DPO의
            beta). 작을수록 멀리 간다. 적지 않으면 0.1이고, 이때 학습률을 적지 않으면 3e-5다.
        cutoff_len: 블록의 길이(토큰). 이보다 긴 행은 토큰 경계에서 자르고 몇 개인지 알린다.
        val_set_size: 검증에 쓸 행의 비율(퍼센트). 검증 loss는 답의 토큰만 센다. 0이면 검증하지 않는다.
        train_on_inputs: False면 답만 배운다(질문은 loss에서 뺀다). Gemma 3 270M에 짧은 답(KoBEST SentiNeg)을 가르치면
            3,649행에서는 98.8%와 98.3%로 거의 같고, 30행에서는 질문도 배운 것이 95%, 답만 배운 것이 92%였다.
        early_stopping_patience: 검증 loss가 이만큼 잇달아 나아지지 않으면 멈춘다. 적지 않으면 끝까지 간다.
        eval_task: 학습한 다음 볼 시험(kobest, KoBEST의 파일이 든 폴더, 내 행의 파일). 맞힌 비율을 run.json에 남긴다.
        seed: 나누기, 섞기, 드롭아웃의 난수 시드.
        lora_r: LoRA의 rank. 4, 16, 32로 바꾸어도 결과는 8과 같았다.
        lora_alpha: LoRA의 배율은 lora_alpha / lora_r이다.
        lora_dropout: LoRA 입력의 드롭아웃 확률.
        lora_target_modules: LoRA를 붙일 층의 이름. "['a','b']"나 a,b로 적는다. attention, all(모든 선형층), auto도
            된다. auto는 Llama, Qwen, Gemma 같은 구조에서 all이고, 기본값의 층이 없는 모델에서는 auto와 같다. all은
            1.3배쯤 오래 걸리고 VRAM을 조금 더 쓰지만, 조금 더 잘 배웠다.
        prompt_template: templates/ 안의 이름이나 json 파일. chat이면 토크나이저의 대화 템플릿을 쓴다.
        vram_gb: 쓸 VRAM의 상한(GB). 적지 않으면 지금 비어 있는 만큼에서 여유를 뺀다.
        deterministic: True면 512토큰이 넘는 문서가 있어도 GPU에서 두 번 배운 결과가 비트까지 같다. 1,024토큰 문서뿐이면
            1.3b가 18% 느려진다(H200). 문서가 모두 512토큰 이하면 적지 않아도 같다.
        resume_from_checkpoint: True면 output_dir의 가장 새 체크포인트에서, 경로면 거기서 이어 간다.
        check_data: 데이터만 검사하고 끝낸다. 찾은 것과 두 행의 loss 자리와, 시작하면 무엇을 할지의 계획을 보인다.
        repair_data: 데이터를 검사하고, 고친 데이터를 쓸 .jsonl 파일. 입력 파일은 그대로 둔다.
        report_to: none, tensorboard, wandb 가운데 하나.
        wandb_project: 적으면 이 프로젝트로 wandb에 기록한다. 적지 않으면 wandb를 부르지 않는다.
        wandb_run_name: wandb에서 보일 이름.
        wandb_watch: wandb의 watch(false, gradients, parameters, all).
        wandb_log_model: wandb에 모델도 올린다(false, checkpoint, end).
        verbose: 어떤 계산 방법을 골랐는지처럼, 이 도구를 고치는 사람에게 쓸모 있는 것도 말한다.

    Examples:
        python finetune-lora.py --data_path faq.csv --output_dir train/faq
        python finetune-lora.py --base_model resources/polyglot-ko-1.3b --data_path faq.csv --output_dir train/faq-1.3b
    """
    flags = dict(locals())
    console.show_details(verbose)
    base_model, data_path = find_input(base_model), find_input(data_path)
    check_flags(flags)

    with process.importing():
        from utils.train import corpus, defaults, stage
        from utils.train.records import Settings
    settings = Settings(**{**flags, "base_model": base_model, "data_path": data_path})
    if check_data or repair_data is not None:
        corpus.check(settings, console.say)
        if check_data:
            say_plan(settings)
        return

    from utils.train import planner, results, run_folder, verdict
    from utils.train.fit import fit

    run_folder.require_startable(settings)
    inputs = stage.prepare(settings, console.say)
    settings = defaults.fill(settings, inputs.config, inputs.documents.pairs)
    plan = stage.plan(settings, inputs, console.say)
    with run_folder.open_run(settings, inputs, console.say) as run:
        planner.cap_allocator(plan.memory, inputs.device.device)
        model = stage.build_model(settings, inputs, console.say)
        result = fit(settings, inputs, plan, model, run, console.say)
        with run.saving():
            results.write(settings, inputs, plan, result, console.say)
    say_end(verdict.judge(settings, plan, result), base_model, output_dir)


def say_plan(settings) -> None:
    """이대로 시작하면 무엇을 할지 말한다. 시작할 수 없으면 그 이유다."""
    from utils.errors import UsageError
    from utils.train import defaults, stage

    try:
        inputs = stage.prepare(settings, lambda line: line.startswith("주의") and console.say(line))
        stage.plan(defaults.fill(settings, inputs.config, inputs.documents.pairs), inputs, console.say)
    except UsageError as error:
        console.say(f"계획: 이대로는 시작할 수 없다. {error}")


def check_flags(flags: dict) -> None:
    """모델을 올리기 전에 값의 범위를 모두 본다."""
    idle = [name for name in ("wandb_run_name", "wandb_watch", "wandb_log_model") if flags[name] is not None]
    batch, micro = flags["batch_size"], flags["micro_batch_size"]
    divisors = [n for n in range(1, min(batch or 0, MAX_BATCH) + 1) if batch % n == 0]
    below = max((n for n in divisors if n <= (micro or 1)), default=1)
    above = min((n for n in divisors if n >= (micro or 1)), default=max(batch or 1, 1))
    cli.check(
        [
            (0 < flags["num_train_epochs"] <= MAX_EPOCHS,
             f"num_train_epochs는 0보다 크고 {MAX_EPOCHS:,} 이하여야 한다: {flags['num_train_epochs']:g}"),
            (batch is None or 1 <= batch <= MAX_BATCH, f"batch_size는 1 이상 {MAX_BATCH:,} 이하여야 한다: {batch}"),
            (micro is None or 1 <= micro <= MAX_BATCH,
             f"micro_batch_size는 1 이상 {MAX_BATCH:,} 이하여야 한다: {micro}"),
            (None in (batch, micro) or micro < 1 or batch < 1 or batch % micro == 0,
             f"micro_batch_size가 batch_size {batch}의 약수가 아니다: {micro}. 가까운 값: {below}, {above}"),
            (flags["learning_rate"] is None or flags["learning_rate"] > 0,
             f"learning_rate는 0보다 커야 한다: {flags['learning_rate']}"),
            (flags["dpo_beta"] is None or 0 < flags["dpo_beta"] <= 100,
             f"dpo_beta는 0보다 크고 100 이하여야 한다: {flags['dpo_beta']}"),
            (8 <= flags["cutoff_len"] <= MAX_BLOCK,
             f"cutoff_len은 8 이상 {MAX_BLOCK:,} 이하여야 한다: {flags['cutoff_len']}"),
            (0 <= flags["val_set_size"] < 100, f"val_set_size는 0 이상 100 미만의 퍼센트다: {flags['val_set_size']}"),
            (1 <= flags["lora_r"] <= MAX_RANK, f"lora_r은 1 이상 {MAX_RANK:,} 이하여야 한다: {flags['lora_r']}"),
            (0 < flags["lora_alpha"] <= 1e5, f"lora_alpha는 0보다 크고 1e5 이하여야 한다: {flags['lora_alpha']:g}"),
            (0 <= flags["lora_dropout"] < 1, f"lora_dropout은 0 이상 1 미만이다: {flags['lora_dropout']}"),
            (flags["vram_gb"] is None or flags["vram_gb"] > 0, f"vram_gb는 0보다 커야 한다: {flags['vram_gb']}"),
            (0 <= flags["seed"] < 2**32, f"seed는 0 이상 2^32 미만이다: {flags['seed']}"),
            (flags["early_stopping_patience"] is None or flags["early_stopping_patience"] >= 1,
             f"early_stopping_patience는 1 이상이어야 한다: {flags['early_stopping_patience']}"),
            (flags["early_stopping_patience"] is None or flags["val_set_size"] > 0,
             "early_stopping_patience에는 검증이 필요하다. val_set_size를 0보다 크게 한다"),
            (flags["report_to"] in ("none", "tensorboard", "wandb"),
             f"report_to는 none, tensorboard, wandb 가운데 하나다: {flags['report_to']}"),
            (not idle or flags["wandb_project"] is not None or flags["report_to"] == "wandb",
             f"{', '.join(idle)}은 wandb에 기록할 때 쓴다. --wandb_project를 함께 적는다"),
        ]
    )


def say_end(verdict, base_model: str, output_dir: str) -> None:
    """어댑터가 있는 곳과 다음 명령. 배우지 못했으면 다음 명령 대신 그 말과 해 볼 것으로 끝낸다."""
    console.say(f"\n어댑터: {shown(output_dir)}  (기반 모델: {shown(base_model)})")
    for line in verdict.lines:
        console.say(line)
    if verdict.learned:
        merged = f"{output_dir.rstrip('/')}-merged"
        console.say("다음 명령:")
        console.say(f'  대화:   python {script("generate.py")} --peft_root "{output_dir}"')
        console.say(f'  합치기: python {script("merge-lora.py")} --peft_root "{output_dir}" --output_dir "{merged}"')


if __name__ == "__main__":
    cli.run(train, RETIRED)
