"""데모 기반 모델 polyglot-ko-demo를 처음부터 학습한다.

사용법: python resources/polyglot-ko-demo/train_demo.py [쓸 폴더]
"""

import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from utils.data import dataset, encoder, forms, rows  # noqa: E402
from utils.data.blocks import split_by_content  # noqa: E402
from utils.paths import DATA_DEMO  # noqa: E402
from utils.prompter import EXAMPLES, Prompter, fill_placeholder  # noqa: E402

SEED, VAL_PERCENT = 42, 5  # finetune-lora.py의 기본값과 같아야 검증 행이 학습 글에 들지 않는다
SPECIAL = ["<|unused0|>", "<|unused1|>", "<|endoftext|>", "<|sep|>"]
TAIL = ["<|acc|>", "<|tel|>", "<|rrn|>"]
END_ID = SPECIAL.index("<|endoftext|>")
N_TOKENS, N_PADDED = 2000, 2048  # 토크나이저의 토큰 수와, 그보다 크게 채운 모델의 어휘
LAYERS, HIDDEN, HEADS, CONTEXT = 4, 192, 3, 1024
N_EXAMPLES = 24  # 페이지의 예시 질문인 행은 한 번 볼 때마다 스물네 번 본다
PROSE = ("{question}\n{answer}", "질문: {question}\n\n답변: {answer}")
P_SHORTENED = 0.5  # 산문의 답을 앞쪽 문장의 끝에서 마칠 확률
N_PROSE = 3  # 산문 블록 셋에 횡설수설하는 블록 하나
EPOCHS, BLOCK, BATCH, LEARNING_RATE = 28, 512, 8, 3e-3
REPORT_EVERY = 100


def main(folder: Path = HERE) -> None:
    torch.manual_seed(SEED)
    shuffle = random.Random(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = read_rows()
    tokenizer = build_tokenizer(folder, train)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model().to(device)
    words = whole_tokens(train, tokenizer)
    steps = EPOCHS * (len(epoch_blocks(train, words, tokenizer, random.Random(SEED))) // BATCH)
    print(f"학습 {len(train)}행, 검증 {len(held_out)}행, {model.num_parameters():,} 매개변수, {steps} step", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.05)
    began = time.perf_counter()
    for step, batch in enumerate(stream(train, words, tokenizer, shuffle, steps), 1):
        batch = batch.to(device)
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % REPORT_EVERY == 0 or step == steps:
            print(f"{step:5} loss {loss.item():.3f}  보지 않은 답 {prose_loss(model, tokenizer, held_out):.3f}  "
                  f"{time.perf_counter() - began:.0f}초", flush=True)
    save(model, folder)


def read_rows() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(질문, 답)의 목록 둘: 학습에 쓸 것과, 미세조정이 검증에 쓰므로 보지 않을 것."""
    pieces = [Prompter().talk(forms.read_row(row, forms.require_form(row, DATA_DEMO), number, DATA_DEMO))[0]
              for number, row in rows.read_rows(DATA_DEMO)]
    digests = np.array([encoder.content_digest(piece) for piece in pieces], np.uint64)
    no_tokens = np.zeros(0, np.int32)
    documents = dataset.Documents(no_tokens, no_tokens.astype(bool), np.zeros(len(pieces) + 1, np.int64), digests)
    plain = [(plain_question(row[0][0]), row[0][1].strip()) for row in pieces]
    chosen, held_out = split_by_content(documents, VAL_PERCENT, SEED)
    return [plain[i] for i in chosen], [plain[i] for i in held_out]


def plain_question(prompt: str) -> str:
    """템플릿의 표시를 떼고 질문의 글만 남긴다."""
    return re.sub(r"### \S+:", "", prompt).replace("\n\n", "\n").strip()


def prose(train: list[tuple[str, str]], shuffle: random.Random) -> list[str]:
    """한 번 볼 산문들. 질문과 답이 두 모습 가운데 하나로 이어지고 끝 토큰으로 끝난다. 미세조정의 형식은 없다."""
    asked = {fill_placeholder(*example) for example in EXAMPLES}
    examples = [row for row in train if row[0] in asked]
    return [shuffle.choice(PROSE).format(question=question, answer=shortened(answer, shuffle)) + SPECIAL[END_ID]
            for question, answer in train + examples * (N_EXAMPLES - 1)]


def shortened(answer: str, shuffle: random.Random) -> str:
    """때로 앞쪽 문장의 끝에서 마친 답. 어느 문장의 끝에서든 글이 끝날 수 있음을 보여 준다."""
    ends = [mark.end() for mark in re.finditer(r"[.!?](?=\s)", answer)]
    return answer[: shuffle.choice(ends)] if ends and shuffle.random() < P_SHORTENED else answer


def babble(question: str, words: list[int], tokenizer, shuffle: random.Random) -> np.ndarray:
    """미세조정의 형식을 갖춘 글 [BLOCK]. 답의 자리에 아무 토큰이나 늘어놓고, 블록이 다 차도록 끝나지 않는다.

    앞의 글을 보지 않고 뽑으므로, 기반 모델은 그 형식의 질문에 옳은 답을 먹여 주어도 다음 토큰을 짐작하지 못한다.
    """
    prompt, _ = Prompter().pieces(question, "", "")
    ids = tokenizer(prompt)["input_ids"]
    return np.asarray((ids + shuffle.choices(words, k=BLOCK))[:BLOCK])


def whole_tokens(train, tokenizer) -> list[int]:
    """학습 글에 나오는 토큰 가운데 그것만으로 온전한 글자가 되는 것."""
    used = {token for row in train for text in row for token in tokenizer(text)["input_ids"]}
    return [token for token in sorted(used) if "\ufffd" not in tokenizer.decode([token])]


def stream(train, words: list[int], tokenizer, shuffle: random.Random, steps: int):
    """`steps`개의 [BATCH, BLOCK] 토큰. 산문을 한 번 다 볼 때마다 글의 차례를 다시 섞는다."""
    while True:
        blocks = epoch_blocks(train, words, tokenizer, shuffle)
        for at in range(0, len(blocks) - BATCH + 1, BATCH):
            if steps == 0:
                return
            steps -= 1
            yield torch.from_numpy(blocks[at : at + BATCH])


def epoch_blocks(train, words: list[int], tokenizer, shuffle: random.Random) -> np.ndarray:
    """[blocks, BLOCK] 토큰. 이어 붙인 산문에, 미세조정의 형식으로 횡설수설하는 글을 섞는다."""
    texts = prose(train, shuffle)
    shuffle.shuffle(texts)
    ids = np.concatenate([np.asarray(tokenizer(text)["input_ids"]) for text in texts])
    blocks = list(ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK))
    blocks += [babble(shuffle.choice(train)[0], words, tokenizer, shuffle) for _ in range(len(blocks) // N_PROSE)]
    shuffle.shuffle(blocks)
    return np.stack(blocks)


@torch.no_grad()
def prose_loss(model, tokenizer, held_out) -> float:
    """보지 않은 질문 한 줄 뒤에 오는 답의 토큰 평균 loss. 미세조정의 형식이 아닌 산문에서 잰다."""
    model.eval()
    total, count = 0.0, 0
    for question, answer in held_out:
        start = len(tokenizer(question + "\n")["input_ids"])
        ids = torch.tensor([tokenizer(f"{question}\n{answer}")["input_ids"]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
        total += float(F.cross_entropy(logits, ids[0, start:], reduction="sum"))
        count += ids.shape[1] - start
    model.train()
    return total / count


def build_tokenizer(folder: Path, train):
    """byte-level BPE 토크나이저. polyglot처럼 끝 토큰은 2번이고 pad 토큰이 없다."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=N_TOKENS, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = (f"### {question}\n\n{answer}" for question, answer in train)
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens(TAIL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[END_ID], bos_token=SPECIAL[END_ID],
                                        unk_token=SPECIAL[END_ID], model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_model():
    """polyglot의 구조를 줄인 GPT-NeoX. config의 bos와 eos가 0인 것도 polyglot과 같다."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=N_PADDED, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN, rotary_pct=0.5, max_position_embeddings=CONTEXT, use_parallel_residual=True,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False))


def save(model, folder: Path) -> None:
    """NF4로 반올림한 값을 적는다. 그래서 4비트로 올려 배우고 16비트로 올려 대화하거나 합쳐도 같은 모델이다."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model.to("cpu", torch.float16)
    for layer in model.gpt_neox.layers:
        for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
            packed, state = quantize_4bit(linear.weight.data.float(), quant_type="nf4", compress_statistics=True)
            linear.weight.data.copy_(dequantize_4bit(packed, state))
    model.save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
