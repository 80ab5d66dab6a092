"""LoRA 어댑터를 기반 모델에 합쳐 모델 폴더 하나로 만든다."""

from dataclasses import asdict

from utils import cli, console, process
from utils.paths import find_input, script, shown

ONTO = ("original", "quantized")
EXPORTS = (None, "gguf")
GGUF_TYPES = ("f16", "q8_0")


def merge(
    *,
    # 합칠 것
    peft_root: str,
    output_dir: str,
    base_model: str | None = None,
    cache_dir: str | None = None,
    # 방법
    max_shard_size: str = "1GB",
    merge_onto: str = "original",
    verify: bool = True,
    # 내보내기
    export: str | None = None,
    gguf_type: str = "f16",
):
    """LoRA 어댑터를 기반 모델에 합쳐 16비트 모델 폴더 하나로 만든다.

    모델이 아무리 커도 조각으로 읽고 쓰며, 다 쓴 다음 다시 읽어 기반 모델 + 어댑터와 같은지 비교한다.

    Args:
        peft_root: finetune-lora.py의 output_dir. 완성된 어댑터가 없으면 가장 새 체크포인트를 쓴다.
        output_dir: 합친 모델을 쓸 새 폴더.
        base_model: 기반 모델의 폴더나 hub id. 적지 않으면 어댑터가 말하는 것을 쓴다.
        cache_dir: 받은 모델을 둘 폴더.
        max_shard_size: 가중치 파일 하나의 가장 큰 크기(1GB, 500MB).
        merge_onto: original이면 기반 모델의 원래 가중치에, quantized면 학습할 때처럼 NF4를 다녀온 가중치에 합친다.
        verify: 다 쓴 다음 다시 읽어 기반 모델 + 어댑터와 비교한다. False면 건너뛴다.
        export: gguf면 llama.cpp와 Ollama에서 쓰는 GGUF 파일과 Modelfile도 쓴다.
        gguf_type: GGUF의 정밀도(f16, q8_0).

    Examples:
        python merge-lora.py --peft_root train/faq --output_dir train/faq-merged
        python merge-lora.py --peft_root train/faq --output_dir train/faq-gguf --export gguf --gguf_type q8_0
    """
    cli.check([
        (merge_onto in ONTO, f"merge_onto는 {', '.join(ONTO)} 가운데 하나다: {merge_onto}"),
        (export in EXPORTS, f"export에는 gguf를 적는다: {export}"),
        (gguf_type in GGUF_TYPES, f"gguf_type은 {', '.join(GGUF_TYPES)} 가운데 하나다: {gguf_type}"),
    ])
    with process.importing():
        from utils import files
        from utils.merge import exportable, gguf, proof, writer
        from utils.merge.job import open_job

    max_bytes = writer.parse_size(max_shard_size)
    job = open_job(find_input(peft_root), base_model, cache_dir, merge_onto)
    if export:
        exportable.require_exportable(job.base.config)
    writer.check_target(output_dir, job, job.base.n_bytes if export else 0)
    for warning in job.warnings:
        console.say(f"경고: {warning}")
    console.say(f"어댑터: {shown(job.adapter)}  기반 모델: {shown(job.base.path)}  갱신할 행렬 {len(job.updates)}개")
    windows = proof.read_windows(job) if verify else None
    with files.staged(output_dir) as folder:
        hashed = writer.write_model(folder, job, max_bytes, console.say)
        proven = prove(job, windows, folder) if verify else None
        if export:
            console.say(f"GGUF: {gguf.write(folder, gguf_type)}")
        writer.finish(folder, job, hashed, proven)
    console.say(f"합친 모델: {shown(output_dir)}")
    console.say(f'  대화: python {script("generate.py")} --base_model "{output_dir}"')


def prove(job, windows, folder) -> dict:
    """검산하고 그 결과를 알린다. 쓴 것이 쓰려던 것과 다르면 멈추고, 배운 것과 다르면 경고한다."""
    from utils.merge import proof

    report = proof.prove(job, windows, folder)
    proof.judge(report)
    console.say(f"검산: {proof.describe(report)}")
    for warning in proof.warnings(report):
        console.say(f"경고: {warning}")
    return asdict(report)


if __name__ == "__main__":
    cli.run(merge)
