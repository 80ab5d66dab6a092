"""학습 한 step을 맡는다: 토큰 평균 loss, 토막 낸 cross entropy, 토큰 평균 검증 loss."""

import torch
import torch.nn.functional as F
from transformers import Trainer

IGNORE = -100


class LeanTrainer(Trainer):
    """블록을 배우는 Trainer. loss는 optimizer step 전체의 토큰 평균이다."""

    def __init__(self, *args, plan=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.plan = plan
        self.model_accepts_loss_kwargs = True
        self.path = "eager"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total, count = self._sum_nll(model, inputs)
        loss = total / (num_items_in_batch if num_items_in_batch is not None else count)
        return (loss, None) if return_outputs else loss

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.model.eval()
        total, count = 0.0, 0
        for batch in self.get_eval_dataloader(eval_dataset):
            nll, tokens = self._sum_nll(self.model, self._prepare_inputs(batch))
            total, count = total + float(nll), count + int(tokens)
        metrics = {f"{metric_key_prefix}_loss": total / max(count, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _sum_nll(self, model, inputs):
        logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
        targets = inputs["labels"][:, 1:].flatten()
        nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE, reduction="sum")
        return nll, (targets != IGNORE).sum()
