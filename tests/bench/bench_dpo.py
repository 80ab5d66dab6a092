"""선호 쌍의 학습을 잰다: TRL의 손실과 같은지(trl), 데모에서 처음 보는 쌍의 취향이 바뀌는지(demo). 마지막 줄은 JSON이다.

    python tests/bench/bench_dpo.py trl                          # pip install trl이 있어야 한다
    python tests/bench/bench_dpo.py demo --folder /tmp/dpo --rates 1e-4 5e-4

demo는 SFT -> 병합 -> DPO의 길을 끝까지 간다. 먼저 데모 모델에게 짧은 부탁에 반말과 존댓말로 반씩 답하는 것을 가르치고,
합친 모델에 "존댓말이 낫다"는 쌍을 DPO로 가르친다. 쌍의 문장은 SFT에서 본 적이 없고, 쌍의 20%는 학습에 쓰지 않는다.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "resources" / "polyglot-ko-demo"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(DEMO)]

ASKS = ("한마디 해 줘.", "무슨 일이 있었어?", "아무 말이나 해 줘.", "이야기해 줘.", "하나 말해 줘.")
N_TUNED, N_PAIRS = 600, 400
BETA = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("trl", "demo"))
    parser.add_argument("--folder", type=Path, default=Path("train/bench-dpo"), help="만든 것을 둘 폴더")
    parser.add_argument("--rates", nargs="+", default=["1e-5", "1e-4", "1e-3"], help="비교할 학습률")
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found = compare_trl(arguments.folder) if arguments.part == "trl" else run_demo(arguments)
    print(json.dumps({"part": arguments.part, "cpu_cores": os.cpu_count(), **found}, ensure_ascii=False))


def compare_trl(folder: Path) -> dict:
    """같은 모델, 같은 토큰에서 TRL의 DPOTrainer가 낸 손실과 gradient의 크기를 이 도구의 두 길과 비교한다."""
    import torch
    from datasets import Dataset
    from tiny import build_neox, lora_neox
    from trl import DPOConfig, DPOTrainer

    from utils.data.blocks import PairedDataset
    from utils.data.dataset import load_documents
    from utils.data.encoder import Encoder
    from utils.engine.train_step import TrainStep
    from utils.model.tokenizer import load_tokenizer
    from utils.prompter import Prompter
    from utils.train.autograd_step import AutogradStep
    from utils.train.batches import n_targets, read_blocks
    from utils.train.parity import nudged, take_gradients

    base = build_neox(folder / "tiny", context=256)
    rows = [{"prompt": f"{n} 더하기 {n}는?", "chosen": f"{2 * n}입니다." * (1 + n % 3), "rejected": f"{2 * n}야."}
            for n in range(8)]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    tokenizer, prompter = load_tokenizer(str(base)), Prompter()
    documents = load_documents(data, prompter, Encoder(tokenizer, 2), 256, 2, str(folder))
    dataset = PairedDataset(documents, torch.arange(len(documents)).numpy(), 256, 2, BETA, seed=0)
    model = lora_neox(base, dropout=0.0)
    take_gradients(model)
    with torch.no_grad():
        for index in range(len(dataset)):  # LoRA B가 0이라 어댑터를 끈 것과 같다
            ratios = AutogradStep(model).evaluate({**read_blocks(dataset, [index]), "keys": None})
            dataset.references[index] += ratios[0].nan_to_num()

    config = DPOConfig(output_dir=str(folder / "trl"), beta=BETA, per_device_train_batch_size=len(rows),
                       report_to="none", max_length=None, use_cpu=True, bf16=False, gradient_checkpointing=False)
    # TRL은 받은 어댑터를 그때 베껴 기준으로 삼는다. 그래서 B가 0일 때 짓는다
    trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows[:1]),
                         processing_class=tokenizer)
    split = []  # TRL의 행: 이 도구와 같은 토큰. 쌍의 두 문서에서 같은 앞부분이 prompt다
    for number in range(len(rows)):
        (chosen, learned), (rejected, _) = documents.document(2 * number), documents.document(2 * number + 1)
        start = int(learned.argmax())
        split.append({"prompt_ids": chosen[:start].tolist(), "chosen_ids": chosen[start:].tolist(),
                      "rejected_ids": rejected[start:].tolist()})
    batch = trainer.data_collator(split)
    with nudged(model):  # B에 작은 수를 더해, 정책이 기준과 다르게 한다
        take_gradients(model)
        trainer.model.train()
        theirs = trainer.compute_loss(trainer.model, batch)
        theirs.backward()
        their_gradients = take_gradients(model)
        found = {"trl": float(theirs.detach())}
        for name, step in (("engine", TrainStep(model, 0, 32)), ("autograd", AutogradStep(model))):
            batches = [read_blocks(dataset, [index]) for index in range(len(dataset))]
            count = sum(n_targets(each) for each in batches).float()
            values = sum(step.train({**each, "keys": None, "factor": 1 / count}) for each in batches)
            ours = take_gradients(model)
            apart = max(float((ours[key] - value).norm() / value.norm()) for key, value in their_gradients.items())
            found |= {name: float(values[0]), f"{name}_gradients_apart": apart,
                      f"{name}_loss_apart": abs(float(values[0]) - found["trl"])}
    return found


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def make_data(folder: Path) -> tuple[Path, Path]:
    """(SFT의 행, 선호 쌍). 문장은 서로 겹치지 않는다."""
    from sentences import Writer

    rng = random.Random(11)
    writer, said = Writer(rng), {}
    while len(said) < N_TUNED + N_PAIRS:
        sentence = writer.sentence()
        if sentence.casual != sentence.polite:
            said[sentence.casual] = sentence
    sentences = list(said.values())
    tuned = [{"prompt": rng.choice(ASKS), "completion": rng.choice((each.casual, each.polite))}
             for each in sentences[:N_TUNED]]
    pairs = [{"prompt": rng.choice(ASKS), "chosen": each.polite, "rejected": each.casual}
             for each in sentences[N_TUNED:]]
    return write_rows(folder / "sft.jsonl", tuned), write_rows(folder / "pairs.jsonl", pairs)


def run(script: str, **flags) -> float:
    """스크립트를 돌리고 걸린 초를 돌려준다."""
    began = time.perf_counter()
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, str(ROOT / script), *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def count_polite(samples: Path, title: str, name: str) -> dict:
    """samples.md에서 그 모델의 답의 수와, 그 가운데 "-니다."로 끝난 한 줄의 수."""
    parts = samples.read_text(encoding="utf-8").split(f"**{title}**\n\n> ")[1:]
    answers = [part.split("\n")[0].strip() for part in parts]
    return {f"{name}_answers": len(answers), f"{name}_polite": sum(answer.endswith("니다.") for answer in answers)}


def run_demo(arguments) -> dict:
    """학습률마다, 시드마다 검증 쌍의 값을 잰다."""
    folder = arguments.folder
    tuned, pairs = make_data(folder)
    base = folder / "sft-merged"
    if not base.exists():
        run("finetune-lora.py", base_model=DEMO, data_path=tuned, output_dir=folder / "sft", num_train_epochs=3)
        run("merge-lora.py", peft_root=folder / "sft", output_dir=base)
    results = []
    for rate in arguments.rates:
        for seed in arguments.seeds:
            output = folder / f"dpo-{rate}-{seed}-{arguments.epochs}"
            if not (output / "run.json").is_file():
                run("finetune-lora.py", base_model=base, data_path=pairs, output_dir=output, learning_rate=rate,
                    seed=seed, num_train_epochs=arguments.epochs, val_set_size=20)
            record = json.loads((output / "run.json").read_text(encoding="utf-8"))
            names = ("eval_loss_before", "eval_loss_after", "reward_accuracy_after", "reward_margin_after",
                     "chosen_reward_after", "chosen_likelier_before", "chosen_likelier_after", "train_seconds")
            results.append({"rate": rate, "seed": seed, **{name: record[name] for name in names},
                            "steps": record["plan"]["steps"], "pairs": record["data"]["validation_rows"],
                            **count_polite(output / "samples.md", "기반 모델", "base"),
                            **count_polite(output / "samples.md", "학습한 모델", "tuned")})
            print(json.dumps(results[-1]), flush=True)
    return {"results": results}


if __name__ == "__main__":
    main()
