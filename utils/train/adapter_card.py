"""어댑터 폴더의 README.md: 무엇을 무엇으로 배웠고, 얼마나 나아졌고, 어떻게 쓰는지."""

from pathlib import Path

from utils import record
from utils.files import staged_file
from utils.paths import portable
from utils.train.progress import clock
from utils.train.records import Settings

CARD_FILE = "README.md"


def write(settings: Settings, run: dict) -> None:
    """run.json의 내용으로 README.md를 쓴다."""
    with staged_file(Path(settings.output_dir) / CARD_FILE) as stream:
        stream.write(render(settings, run))


def render(settings: Settings, run: dict) -> str:
    """README.md의 글.

    Args:
        run: run.json에 담길 것.
    """
    folder = Path(settings.output_dir).as_posix().rstrip("/")
    data, plan = run["data"], run["plan"]
    given = ", ".join(settings.lora_target_modules)
    rows = f"{data['rows']:,}행(검증 {data['validation_rows']:,}행), 학습 토큰 {data['train_tokens']:,}개"
    lengths = f"{settings.num_train_epochs:g} epoch, {plan['steps']:,} step, batch {plan['batch_size']} x " \
              f"{plan['block_len']}토큰, 학습률 {settings.learning_rate:g}"
    return f"""# {Path(folder).name}

`finetune-lora.py`가 QLoRA 4비트로 학습한 LoRA 어댑터다. 기반 모델이 있어야 쓸 수 있다.

| | |
| --- | --- |
| 기반 모델 | `{portable(settings.base_model)}` |
| 데이터 | `{portable(settings.data_path)}`, {rows} |
| 템플릿 | {settings.prompt_template} |
| 학습 | {lengths} |
| LoRA | r {settings.lora_r}, alpha {settings.lora_alpha:g}, dropout {settings.lora_dropout:g}, 층 {given} |
| 결과 | {outcome(run)} |
| 걸린 시간 | {clock(run["train_seconds"])} ({run["device"]["name"]}) |

모든 설정과 버전은 `{record.RUN_FILE}`, 곡선은 `{record.CURVES_FILE}`, 시험 답은 `{record.SAMPLES_FILE}`에 있다.

## 쓰기

```sh
python generate.py --peft_root "{folder}"
python generate.py --peft_root "{folder}" --ask "질문"
```

## 합치기

기반 모델 없이 쓰는 폴더 하나를 만든다.

```sh
python merge-lora.py --peft_root "{folder}" --output_dir "{folder}-merged"
python generate.py --base_model "{folder}-merged"
```

기반 모델과 데이터의 라이선스를 따른다.
"""


def outcome(run: dict) -> str:
    """검증 loss가 어떻게 되었는지 한마디."""
    before, after = run["eval_loss_before"], run["eval_loss_after"]
    if before is None or after is None:
        return "검증하지 않았다"
    found = f"검증 loss {before:.4f} -> {after:.4f}" + ("" if after < before else " (학습 전보다 나쁘다)")
    if "reward_accuracy_after" in run:
        found += f", 검증 쌍에서 고른 답의 보상이 더 높은 비율 {run['reward_accuracy_after']:.1%}"
    return found
