"""백만 행(약 1 GB)의 데이터를 검사하고 토큰으로 바꾸는 속도와 RAM을 잰다. 마지막 줄은 JSON이다.

    python tests/bench/bench_data.py --rows 1000000 --folder /tmp/bench

토크나이저는 함께 든 데이터로 그 자리에서 학습한다(어휘 30,000). 단계마다 새 프로세스에서 잰다.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ROW_BYTES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="만든 파일을 두었다가 지울 폴더")
    parser.add_argument("--phase", choices=("load",))
    arguments = parser.parse_args()
    if arguments.phase:
        print(json.dumps(measure_load(arguments.folder)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    data = arguments.folder / "rows.jsonl"
    try:
        write_rows(data, arguments.rows)
        train_tokenizer(arguments.folder)
        result = {"rows": arguments.rows, "gb": data.stat().st_size / 1e9, "cpu_cores": os.cpu_count()}
        for name in ("first", "second"):
            command = [sys.executable, __file__, "--phase", "load", "--folder", str(arguments.folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
            result |= {f"{name}_{key}": value for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
        result["rows_per_second"] = arguments.rows / result["first_seconds"]
        print(json.dumps(result))
    finally:
        remove(arguments.folder)


def measure_load(folder: Path) -> dict:
    """검사하고 토큰으로 바꾸고 나누고 블록에 담는다. 둘째 실행은 캐시를 연다."""
    import resource

    from utils.data import check, dataset, encoder
    from utils.data.blocks import PackedDataset, split_by_content
    from utils.model.tokenizer import end_token_id, load_tokenizer
    from utils.prompter import Prompter

    tokenizer = load_tokenizer(folder)
    end_id = end_token_id(tokenizer)
    began = time.perf_counter()
    documents = dataset.load_documents(folder / "rows.jsonl", Prompter(), encoder.Encoder(tokenizer, end_id), 1024,
                                       end_id, str(folder), on_row=lambda n: None)
    loaded = time.perf_counter()
    train, held_out = split_by_content(documents, 5, 42)
    found = check.document_faults(documents, train, held_out)
    blocks = PackedDataset(documents, train, 1024, end_id, True, 42)
    return {"seconds": loaded - began, "split_and_pack_seconds": time.perf_counter() - loaded,
            "peak_ram_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            "documents": len(documents), "tokens": len(documents.tokens), "blocks": len(blocks),
            "found": sorted({**documents.found, **found})}


def write_rows(path: Path, n_rows: int) -> None:
    """함께 든 데이터의 문장을 섞어 서로 다른 행을 만든다."""
    lines = (ROOT / "ko-datasets" / "polyglot-ko-lite_textonly.json").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"].split("### 답변: ")[-1].removesuffix("<|endoftext|>") for line in lines]
    sentences = [part for text in texts for part in re.split(r"(?<=[.?!])\s+", text)]
    rng = random.Random(0)
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for number in range(n_rows):
            answer, size = [], 0
            while size < ROW_BYTES - 150:
                answer.append(rng.choice(sentences))
                size += len(answer[-1].encode()) + 1
            text = f"### 질문: {number}번째 이야기를 들려줘.\n\n### 답변: {' '.join(answer)}<|endoftext|>"
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def train_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    with (folder / "rows.jsonl").open(encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line, _ in zip(stream, range(20_000), strict=False)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=30_000, special_tokens=["<|unused0|>", "<|unused1|>", "<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(folder)


def remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
