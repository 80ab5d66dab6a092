"""어느 기반에 합치고 어떻게 4비트로 띄울지를 학습된 모델로 잰다. 마지막 줄은 JSON이다.

NF4로 학습한 어댑터마다, 합치는 방법별로 검증 문서의 loss와 학습한 모델(NF4 기반 + 어댑터)까지의 KL을 잰다.
가중치의 차이만 보려고 계산은 모두 fp32로 한다.

    python tests/bench/exp_merge_base.py --model resources/polyglot-ko-demo --out demo.json
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

ADAPTERS = ((1, 8, 1e-3), (2, 16, 5e-4), (3, 4, 2e-3), (4, 32, 2e-4))  # (seed, rank, 학습률)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=str(ROOT / "ko-datasets/polyglot-ko-lite_textonly.json"))
    parser.add_argument("--out")
    parser.add_argument("--cutoff", type=int, default=384)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--train_docs", type=int, default=10**9)
    parser.add_argument("--held_out", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[seed for seed, *_ in ADAPTERS])
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_rows, held_rows, pad = read_documents(options)
    targets = target_names(options.model)
    results = []
    for seed, rank, rate in (adapter for adapter in ADAPTERS if adapter[0] in options.seeds):
        began = time.perf_counter()
        trained = train_adapter(options, device, targets, train_rows, pad, seed, rank, rate)
        row = measure(options.model, device, trained, held_rows, pad)
        row |= {"seed": seed, "rank": rank, "learning_rate": rate, "seconds": time.perf_counter() - began}
        results.append(row)
        print_table(row)
        report = {"model": options.model, "parameters": row["parameters"], "device": device, "targets": targets,
                  "train_documents": len(train_rows), "held_out_documents": len(held_rows), "adapters": results}
        if options.out:
            Path(options.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def read_documents(options) -> tuple[list[list[int]], list[list[int]], int]:
    """(학습 문서, 검증 문서, 채움 토큰). 문서는 끝 토큰으로 끝나는 토큰 목록이다."""
    from utils.data import dataset, encoder
    from utils.data.blocks import split_by_content
    from utils.model.tokenizer import end_token_id, load_tokenizer
    from utils.prompter import Prompter

    tokenizer = load_tokenizer(options.model)
    end = end_token_id(tokenizer)
    documents = dataset.load_documents(options.data, Prompter(), encoder.Encoder(tokenizer, end), options.cutoff, end)
    train, held_out = split_by_content(documents, 100 * 1.2 * options.held_out / len(documents), 42)
    tokens = [documents.document(i)[0].tolist() for i in (*train[: options.train_docs], *held_out[: options.held_out])]
    n = min(len(train), options.train_docs)
    return tokens[:n], tokens[n:], end


def target_names(model: str) -> list[str]:
    kind = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["model_type"]
    return ["query_key_value"] if kind == "gpt_neox" else ["q_proj", "k_proj", "v_proj", "o_proj"]


def load(model: str, device: str, four_bit: bool):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from utils.model.loader import keep_nf4_layout

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32) if four_bit else None
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=config,
                                                  device_map={"": device}, use_safetensors=True)
    keep_nf4_layout(loaded)
    loaded.config.use_cache = False
    return loaded


def batches(rows: list[list[int]], pad: int, device: str, size: int = 16):
    """길이가 비슷한 문서끼리 묶은 (input_ids, labels). 채운 자리의 label은 -100이다."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(order), size):
        members = [rows[i] for i in order[at : at + size]]
        longest = max(map(len, members))
        ids = torch.tensor([m + [pad] * (longest - len(m)) for m in members], device=device)
        labels = torch.tensor([m + [-100] * (longest - len(m)) for m in members], device=device)
        yield ids, labels


def train_adapter(options, device: str, targets: list[str], rows, pad: int, seed: int, rank: int, rate: float):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(load(options.model, device, four_bit=True), LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM"))
    blocks = list(batches(rows, pad, device))
    steps = max(1, int(len(blocks) * options.epochs))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        if step % len(blocks) == 0:
            epoch = torch.randperm(len(blocks), generator=order).tolist()
        ids, labels = blocks[epoch[step % len(blocks)]]
        warm = min(1.0, (step + 1) / max(1, steps * 0.06))
        optimizer.param_groups[0]["lr"] = rate * warm * (1 - step / steps)
        loss = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """bitsandbytes의 NF4와 이중 양자화를 다녀온 값. 띄울 때의 4비트와 같다."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(codes, state).float()


def nf4_codes(weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import quantize_4bit

    packed = quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")[0].flatten()
    return torch.stack([packed >> 4, packed & 15])


def int8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return torch.round(weight / scale) * scale


@torch.no_grad()
def measure(path: str, device: str, trained, rows, pad: int) -> dict:
    """합치는 방법마다의 검증 loss, 학습한 모델까지의 KL, 남은 개선."""
    from peft.tuners.lora import LoraLayer

    delta = {name.removeprefix("base_model.model."): module.get_delta_weight("default").float()
             for name, module in trained.named_modules() if isinstance(module, LoraLayer)}
    work = load(path, device, four_bit=False).eval()
    linear = {name: module for name, module in work.named_modules()
              if isinstance(module, torch.nn.Linear) and module is not work.get_output_embeddings()}
    original = {name: module.weight.clone() for name, module in linear.items()}
    rounded = {name: nf4(weight) for name, weight in original.items()}

    def merged(base: dict, dtype: torch.dtype) -> dict:
        return {name: (weight + delta.get(name, 0)).to(dtype).float() for name, weight in base.items()}

    def each(rounding, weights: dict) -> dict:
        return {name: rounding(weight) for name, weight in weights.items()}

    def served(weights: dict) -> dict:
        return {name: nf4(weight) + delta.get(name, 0) for name, weight in recovered(weights).items()}

    def recovered(weights: dict) -> dict:
        return {name: weight - delta[name] if name in delta else weight for name, weight in weights.items()}

    flips = [(nf4_codes(original[n]) != nf4_codes(w)).float().mean()
             for n, w in recovered(merged(original, torch.float16)).items() if n in delta]
    fp16, bf16 = torch.float16, torch.bfloat16
    variants = {  # 하나씩 만들어 재고 버린다
        "original+update fp16": lambda: merged(original, fp16),
        "original+update bf16": lambda: merged(original, bf16),
        "dequantised+update fp16": lambda: merged(rounded, fp16),
        "dequantised+update bf16": lambda: merged(rounded, bf16),
        "original+update fp16 -> NF4": lambda: each(nf4, merged(original, fp16)),
        "original+update bf16 -> NF4": lambda: each(nf4, merged(original, bf16)),
        "dequantised+update fp16 -> NF4": lambda: each(nf4, merged(rounded, fp16)),
        "original+update fp16 -> int8": lambda: each(int8, merged(original, fp16)),
        "NF4(original merge - update) + adapter": lambda: served(merged(original, fp16)),
        "NF4(dequantised merge - update) + adapter": lambda: served(merged(rounded, fp16)),
    }
    base_loss = mean_loss(trained, None, rows, pad, device)
    row = {"parameters": sum(p.numel() for p in work.parameters()), "base_nf4_loss": base_loss,
           "base_fp16_loss": mean_loss(trained, work, rows, pad, device),
           "flipped_codes": torch.stack(flips).mean().item(), "variants": {}}
    expected = list(log_probabilities(trained, rows, pad, device))
    for name, make in variants.items():
        for key, weight in make().items():
            linear[key].weight.copy_(weight)
        row["trained_loss"], row["variants"][name] = compare_trained(expected, work, rows, pad, device)
    peft_merge = trained.merge_and_unload()
    for name, module in peft_merge.named_modules():
        if name in linear:
            from bitsandbytes.functional import dequantize_4bit

            linear[name].weight.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state).float())
    row["variants"]["PEFT merge on the 4-bit model"] = compare_trained(expected, work, rows, pad, device)[1]
    for value in row["variants"].values():
        value["retained"] = (base_loss - value["loss"]) / (base_loss - row["trained_loss"])
    return row


def log_probabilities(model, rows, pad: int, device: str):
    """batch마다 실제 토큰의 (로그 확률 [tokens, vocab], 정답 [tokens])."""
    for ids, labels in batches(rows, pad, device):
        keep = labels[:, 1:] != -100
        yield F.log_softmax(model(input_ids=ids).logits[:, :-1][keep].float(), -1), labels[:, 1:][keep]


def compare_trained(expected: list, work, rows, pad: int, device: str) -> tuple[float, dict]:
    """(학습한 모델의 loss, {work의 loss, KL(학습한 모델 || work)})."""
    losses, kl, n = [0.0, 0.0], 0.0, 0
    for (wanted, goal), (actual, _) in zip(expected, log_probabilities(work, rows, pad, device), strict=True):
        losses[0] += F.nll_loss(wanted, goal, reduction="sum").item()
        losses[1] += F.nll_loss(actual, goal, reduction="sum").item()
        kl += F.kl_div(actual, wanted, log_target=True, reduction="sum").item()
        n += len(goal)
    return losses[0] / n, {"loss": losses[1] / n, "kl": kl / n}


def mean_loss(trained, work, rows, pad: int, device: str) -> float:
    """work의, work가 None이면 어댑터를 끈 trained의 토큰 평균 loss."""
    total, n = 0.0, 0
    for ids, labels in batches(rows, pad, device):
        if work is None:
            with trained.disable_adapter():
                logits = trained(input_ids=ids).logits
        else:
            logits = work(input_ids=ids).logits
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum").item()
        n += int((labels[:, 1:] != -100).sum())
    return total / n


def print_table(row: dict) -> None:
    print(f"\nseed {row['seed']} rank {row['rank']} lr {row['learning_rate']:g}: 기반 NF4 {row['base_nf4_loss']:.4f}, "
          f"기반 fp16 {row['base_fp16_loss']:.4f}, 학습한 모델 {row['trained_loss']:.4f}, "
          f"뒤집힌 코드 {row['flipped_codes']:.2e}, {row['seconds']:.0f}초")
    for name, value in row["variants"].items():
        print(f"  {name:44} loss {value['loss']:.4f}  KL {value['kl']:9.2e}  남은 개선 {value['retained']:7.1%}",
              flush=True)


if __name__ == "__main__":
    main()
