"""비교할 흔한 방법: 같은 4비트 기반 모델과 LoRA를 PEFT와 transformers.Trainer로 배운다. 행마다 채워서 묶는다."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from utils.data.blocks import IGNORE
from utils.train import stage
from utils.train.records import Plan, Settings

MOST_ROWS = 4  # 한 번에 계산하는 행의 수. 어휘가 크면 로짓이 카드를 채운다


class Rows(torch.utils.data.Dataset):
    """문서 하나가 한 행이다. 정답의 자리는 블록에 채운 것과 같다."""

    def __init__(self, documents, members: np.ndarray, train_on_inputs: bool):
        self.documents, self.members, self.train_on_inputs = documents, members, train_on_inputs

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        tokens, answer = self.documents.document(self.members[index])
        labels = tokens if self.train_on_inputs else np.where(answer, tokens, IGNORE)
        return {"input_ids": tokens.tolist(), "labels": [IGNORE, *labels[1:].tolist()]}


def padded(rows: list[dict], end_id: int) -> dict[str, torch.Tensor]:
    """오른쪽을 채운 한 묶음. 모두 [행, 가장 긴 행]이다."""
    longest = max(len(row["input_ids"]) for row in rows)

    def fill(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {"input_ids": fill("input_ids", end_id), "labels": fill("labels", IGNORE),
            "attention_mask": torch.tensor(mask)}


def train_plainly(settings: Settings, inputs: stage.Inputs, plan: Plan, model, work: Path) -> dict:
    """배우고, 검증 loss가 가장 낮은 때의 어댑터를 모델에 남긴다. step마다 배우는 행의 수는 이 도구의 평균과 같다."""
    members = np.sort(np.concatenate(inputs.train_set.blocks))
    rows = max(1, round(len(members) / len(inputs.train_set) * inputs.batch.size))
    together = max(count for count in range(1, MOST_ROWS + 1) if rows % count == 0)
    model.config.use_cache = False
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(dir=work), per_device_train_batch_size=together,
        gradient_accumulation_steps=rows // together, max_steps=plan.schedule.steps,
        learning_rate=settings.learning_rate, lr_scheduler_type="linear",
        warmup_steps=plan.schedule.warmup, weight_decay=0.0, max_grad_norm=1.0,
        bf16=inputs.device.dtype is torch.bfloat16, optim="adamw_torch", seed=settings.seed, report_to=[],
        use_cpu=inputs.device.device.type == "cpu", disable_tqdm=True, remove_unused_columns=False,
        eval_strategy="steps", eval_steps=plan.schedule.interval, save_strategy="steps",
        save_steps=plan.schedule.interval, save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", prediction_loss_only=True, per_device_eval_batch_size=MOST_ROWS,
        logging_strategy="no")
    trainer = Trainer(model, arguments, train_dataset=Rows(inputs.documents, members, settings.train_on_inputs),
                      eval_dataset=Rows(inputs.documents, inputs.parts.held_out, False),
                      data_collator=lambda batch: padded(batch, inputs.end_id))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {"path": "transformers.Trainer", "val_loss": trainer.state.best_metric,
            "best_step": trainer.state.best_global_step}
