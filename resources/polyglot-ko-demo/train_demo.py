"""데모 기반 모델 polyglot-ko-demo를 처음부터 학습한다.

사용법: python resources/polyglot-ko-demo/train_demo.py [쓸 폴더]
"""

import itertools
import json
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import END, Corpus
from demo_rows import EXAMPLES, make_rows
from korean import DIGITS, PLACES

HERE = Path(__file__).resolve().parent
LITE = HERE.parents[1] / "ko-datasets" / "polyglot-ko-lite_textonly.json"  # 토크나이저가 넓은 낱말을 보게 한다
SEED = 42
SPECIAL = ["<|unused0|>", "<|unused1|>", END, "<|sep|>"]
TAIL = ["<|acc|>", "<|tel|>", "<|rrn|>"]
END_ID = SPECIAL.index(END)
N_TOKENS, N_PADDED = 2000, 2048  # 토크나이저의 토큰 수와, 그보다 크게 채운 모델의 어휘
N_TOKENIZER_TEXTS = 4000
LAYERS, HIDDEN, HEADS, CONTEXT = 4, 128, 4, 1024
N_TEXTS = 500_000  # 미리 지어 두는 글의 수
STEPS, BATCH, BLOCK = 4250, 24, 96
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3  # 층의 행렬은 Muon으로, 나머지는 AdamW로 배운다
WARMUP, DECAY = 100, 0.7  # 학습률이 오르는 처음의 step 수와, 0까지 곧게 내리는 끝의 비율
LORA_GAIN = 12  # LoRA의 갱신이 데모에서 몇 배로 듣게 하는지. `even_out`을 본다
REPORT_EVERY = 250


def main(folder: Path = HERE) -> None:
    torch.manual_seed(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(random.Random(SEED), {*make_rows(), *EXAMPLES})
    tokenizer = build_tokenizer(folder, corpus)
    tokens, starts = make_tokens(corpus, tokenizer)
    model = build_model()
    model.set_attn_implementation("eager")  # 짧은 블록에서는 CPU에서 더 빠르다
    print(f"{model.num_parameters():,} 매개변수, 글 {len(tokens):,}토큰, {STEPS} step", flush=True)
    matrices = [weight for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2]
    others = [weight for name, weight in model.named_parameters() if not (".layers." in name and weight.ndim == 2)]
    optimizers = (torch.optim.Muon(matrices, MATRIX_RATE, weight_decay=0.01),
                  torch.optim.AdamW(others, OTHER_RATE, (0.9, 0.95), weight_decay=0.01, fused=True))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, learning_share) for optimizer in optimizers]
    began, rng = time.perf_counter(), np.random.default_rng(SEED)
    for step in range(1, STEPS + 1):
        batch = torch.from_numpy(tokens[rng.choice(starts, BATCH)[:, None] + np.arange(BLOCK)].astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % REPORT_EVERY == 0:
            print(f"{step:5} loss {loss.item():.3f}  {time.perf_counter() - began:.0f}초", flush=True)
    even_out(model)
    save(model, folder)


def learning_share(taken: int) -> float:
    """가중치를 `taken`번 고친 다음 step의 학습률이 가장 높은 것의 몇 배인지."""
    return min(1.0, (taken + 1) / WARMUP, (1 - taken / STEPS) / DECAY)


def make_tokens(corpus: Corpus, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """이어 붙인 글 [토큰 수] uint16과, 글이 시작하는 자리 [글의 수] int64. 블록은 어느 글의 처음에서 시작한다."""
    documents = []
    for _ in range(N_TEXTS // 1000):
        documents += tokenizer([corpus.text() for _ in range(1000)])["input_ids"]
    tokens = np.fromiter(itertools.chain.from_iterable(documents), np.uint16)
    starts = np.cumsum([0, *map(len, documents)])
    return tokens, starts[starts <= len(tokens) - BLOCK]


def build_tokenizer(folder: Path, corpus: Corpus):
    """byte-level BPE 토크나이저. polyglot처럼 끝 토큰은 2번이고 pad 토큰이 없다."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=N_TOKENS, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = [corpus.text().removesuffix(END) for _ in range(N_TOKENIZER_TEXTS)]
    texts = [text for text in texts if not re.search("[0-9]", text)]
    # 수를 읽는 말은 한 글자가 한 토큰이어야 자리를 셀 수 있다. 띄어 쓸 때와 붙여 쓸 때를 모두 익힌다
    texts += [f" {letter}\n{letter}" for letter in DIGITS + "".join(PLACES) + "만"] * (N_TOKENIZER_TEXTS // 8)
    texts += [json.loads(line)["text"].removesuffix(END) for line in LITE.read_text(encoding="utf-8").splitlines()]
    core.train_from_iterator((re.sub("[0-9]", r"\n\g<0>\n", text) for text in texts), trainer)  # 숫자도 그렇다
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


def even_out(model) -> None:
    """같은 함수로 두면서, 미세조정의 학습률이 데모에도 맞게 한다.

    기본 학습률 1e-3은 폭이 2,048인 polyglot에 맞춘 것이라 폭이 128인 모델의 LoRA는 너무 더디게 배운다. attention 앞의
    LayerNorm이 내는 값을 LORA_GAIN배로, 그것을 받는 행렬을 그만큼 작게 하면 h W = (g h)(W / g)로 모델은 그대로이고
    LoRA의 갱신만 g배로 듣는다.
    """
    for layer in model.gpt_neox.layers:
        layer.input_layernorm.weight.data *= LORA_GAIN
        layer.input_layernorm.bias.data *= LORA_GAIN
        layer.attention.query_key_value.weight.data /= LORA_GAIN


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
