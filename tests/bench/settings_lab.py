"""학습 하나를 이 프로세스 안에서 끝까지 하고 시험 문항으로 재는 `Lab`. `bench_settings.py`의 일꾼이 쓴다.

학습은 `finetune-lora.py`와 같은 단계(prepare, plan, build_model, 학습 루프)를 지난다. 다른 것은 다섯이다: 토크나이저와
읽은 데이터와 기반 모델을 다음 학습이 다시 쓰고, 빠른 길을 모델의 forward와 비교하지 않고(카드를 함께 쓰면 비교가
학습보다 오래 걸린다), batch의 블록을 되도록 함께 계산하고, 가장 좋은 때의 가중치를 디스크가 아니라 메모리에 두고, 시험
답을 만들지 않는다.
"""

import functools
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import train_settings
from settings_train import as_it_is, on_wide_base, silent, together, train, unpacked, wide_base

from utils.data.exams import Exam, Item, load_exams, make_exam
from utils.data.kobest_files import find_task, read_task
from utils.decode import likelihood, scorecard
from utils.model import loader
from utils.train import corpus, defaults, stage, step
from utils.train.records import Settings

VRAM_GB = 8.0  # 계획에만 쓴다. 한 카드에서 여럿이 함께 배운다
BOOLQ_TRAIN, KOALPACA_TRAIN = 500, 400  # BoolQ는 dev만 있고 KoAlpaca는 500행뿐이라 나누어 쓴다
Rows = list[dict[str, str]]


class Lab:
    """설정 하나를 받아 가르치고 재는 곳. 일꾼 하나가 하나를 갖는다.

    Args:
        base: 기반 모델의 폴더.
        kobest: KoBEST의 TSV가 든 폴더.
        koalpaca: KoAlpaca의 textonly 파일.
        rows: 0이 아니면 학습과 시험의 행을 이만큼만 쓴다. 돌아가는지 볼 때 적는다.
    """

    def __init__(self, base: str, kobest: str, koalpaca: str, rows: int = 0):
        self.base, self.kobest, self.koalpaca, self.rows = base, Path(kobest), Path(koalpaca), rows
        self.work = Path(tempfile.mkdtemp())
        self.exams: dict[str, Exam] = {}
        corpus.load_tokenizer = functools.cache(corpus.load_tokenizer)
        read, known = corpus.read, {}

        def read_once(settings: Settings) -> corpus.Corpus:
            key = settings.data_path, settings.cutoff_len
            if key not in known:
                known[key] = read(settings)
            return known[key]

        corpus.read = read_once
        load, self.bases = loader.load_base, {}
        loader.load_base = lambda base, device, quantize=None, cache_dir=None: (
            self.bases.pop(quantize, None) or load(base, device, quantize, cache_dir))
        step.choose_step = lambda candidates, *others, **more: candidates[0]()
        if torch.cuda.is_available():
            likelihood.LOGIT_BYTES, likelihood.ROW_TOKENS = 1 << 29, 16384

    def run(self, case: dict) -> dict:
        """설정 하나의 결과: 맞힌 비율, 정답의 loss, 학습의 기록, 걸린 시간."""
        began = time.perf_counter()
        extra = case["extra"]
        flags = {**case["flags"], "lora_target_modules": tuple(case["flags"]["lora_target_modules"])}
        settings = train_settings(base_model=self.base, output_dir=str(self.work), cache_dir=str(self.work),
                                  vram_gb=VRAM_GB, seed=case["seed"], data_path=self.training_file(case), **flags)
        inputs = stage.prepare(settings, silent)
        settings = defaults.fill(settings, inputs.config, inputs.documents.pairs)
        if extra.get("alone"):
            inputs = unpacked(settings, inputs)
        plan = together(stage.plan(settings, inputs, silent), inputs.batch.block_len)
        with wide_base() if extra.get("wide") else as_it_is():
            model = stage.build_model(settings, inputs, silent)
        loaded = time.perf_counter()
        if extra.get("base"):
            found = {}
        elif extra.get("trainer"):
            from settings_trainer import train_plainly

            found = train_plainly(settings, inputs, plan, model, self.work)
        else:
            found = train(settings, inputs, plan, model, extra)
        trained = time.perf_counter()
        if extra.get("asked_wide"):
            model = on_wide_base(settings, inputs, model)
        found |= self.score(case["task"], model, inputs)
        if extra.get("pairs"):  # 배운 것과 상관없는 답이 깨지지 않았는지
            found["talk_loss"] = self.score("koalpaca", model, inputs)["answer_loss"]
        if not extra.keys() & {"trainer", "neftune"}:  # 남의 길은 모델에 무엇을 남겼는지 모른다
            self.give_back(model, None if extra.keys() & {"wide", "asked_wide"} else "4bit")
        return {**found, "batch": [inputs.batch.size, inputs.batch.block_len, inputs.batch.room],
                "steps": plan.schedule.steps, "tokens": inputs.train_set.n_tokens,
                "seconds": [round(loaded - began, 2), round(trained - loaded, 2),
                            round(time.perf_counter() - trained, 2)]}

    def give_back(self, model, quantize: str | None) -> None:
        """어댑터를 떼어 낸 기반 모델을 다음 학습에 남긴다. 실패한 학습의 것은 남기지 않아 새로 올린다."""
        self.bases[quantize] = model.unload()

    def score(self, task: str, model, inputs: stage.Inputs) -> dict:
        """시험의 성적. 보기가 있으면 맞힌 비율, 고르기의 loss를, 없으면 정답의 토큰마다의 loss를 잰다(nat)."""
        exam = self.exam(task, inputs)
        measured: list[likelihood.Likelihood] = []

        def ask(name: str, pairs: list, told) -> list[likelihood.Likelihood]:
            measured[:] = likelihood.measure(model, pairs, told=told)
            return measured

        model.eval()
        context = inputs.config["max_position_embeddings"]
        score = scorecard.measure(ask, ["tuned"], [exam], inputs.encoder, inputs.end_id, context, silent)[0]
        if len(exam.items[0].options) == 1:
            tokens = sum(len(each.logprobs) for each in measured)
            return {"answer_loss": -sum(each.total for each in measured) / tokens, "items": len(exam.items)}
        values = iter(measured)
        losses = [choice_loss([next(values).total for _ in item.options], item.answer) for item in exam.items]
        return {"accuracy": score.share("tuned"), "choice_loss": float(np.mean(losses)), "items": len(exam.items)}

    def exam(self, task: str, inputs: stage.Inputs) -> Exam:
        """배우지 않은 문항들."""
        if task not in self.exams:
            if task == "koalpaca":
                exam = load_exams(self.write(task, self.pool(task)[1]), inputs.prompter)[0]
            else:
                kind, rows = self.pool(task)[1]
                exam = make_exam(kind, rows, inputs.prompter, task)
            self.exams[task] = replace(exam, items=exam.items[:self.rows or None])
        return self.exams[task]

    @functools.cache  # noqa: B019 - 일꾼과 함께 끝난다
    def pool(self, task: str) -> tuple:
        """(배울 것, 시험). KoBEST면 (문항들, (Task, 행들))이고 KoAlpaca면 (행들, 행들)이다."""
        shuffle = np.random.default_rng(0).permutation
        if task == "koalpaca":
            lines = self.koalpaca.read_text(encoding="utf-8").splitlines()
            rows = [split_textonly(json.loads(line)["text"]) for line in lines if line.strip()]
            order = shuffle(len(rows))
            return [rows[at] for at in order[:KOALPACA_TRAIN]], [rows[at] for at in order[KOALPACA_TRAIN:]]
        files = {file.name.lower(): file for file in self.kobest.glob("*.tsv")}
        kind = find_task(files[f"{task}-dev.tsv"])
        held_out = read_task(files[f"{task}-dev.tsv"], kind)
        if f"{task}-train.tsv" in files:
            learned = read_task(files[f"{task}-train.tsv"], kind)
        else:
            order = shuffle(len(held_out))
            learned = [held_out[at] for at in order[:BOOLQ_TRAIN]]
            held_out = [held_out[at] for at in order[BOOLQ_TRAIN:]]
        items = make_exam(kind, learned, None, task).items
        return items, (kind, held_out)

    def training_file(self, case: dict) -> str:
        """배울 행을 담은 파일. 행의 수를 적었으면 시드마다 다른 행이다."""
        task, rows, count = case["task"], self.pool(case["task"])[0], case["rows"] or self.rows
        name = f"{task}-train"
        if count:
            name = f"{task}-{count}-{case['seed']}"
            rows = [rows[at] for at in np.random.default_rng(case["seed"]).permutation(len(rows))[:count]]
        if case["extra"].get("pairs"):
            return self.write(f"{name}-pairs", [pair for item in rows for pair in preferred(item)])
        return self.write(name, [answered(row) if isinstance(row, Item) else row for row in rows])

    def write(self, name: str, rows: Rows) -> str:
        file = self.work / f"{name}.jsonl"
        if not file.exists():
            file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        return str(file)


def answered(item: Item) -> dict[str, str]:
    """문항과 정답을 적은 행."""
    return {"instruction": item.text, "output": item.options[item.answer]}


def preferred(item: Item) -> Rows:
    """정답을 고르고 다른 보기를 버린 선호 쌍들."""
    right = item.options[item.answer]
    return [{"prompt": item.text, "chosen": right, "rejected": wrong} for wrong in item.options if wrong != right]


def split_textonly(text: str) -> dict[str, str]:
    question, answer = text.removeprefix("### 질문: ").split("\n\n### 답변: ", 1)
    return {"instruction": question, "output": answer.removesuffix("<|endoftext|>")}


def choice_loss(totals: list[float], answer: int) -> float:
    """보기들의 로그 가능도를 확률로 보았을 때 정답의 음의 로그 확률(nat)."""
    most = max(totals)
    return most + math.log(sum(math.exp(total - most) for total in totals)) - totals[answer]
