"""요즘 고르는 모델의 모양에 무작위 가중치를 넣는다: `build`는 GPU에서 양자화해 만들고, `write_folder`는 폴더로 쓴다."""

import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import standin
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.model import shards  # noqa: E402
from utils.model.configs import auto_config  # noqa: E402

SHARD_BYTES = 2**31
PIECE = 2**22
POOL = 2**24 + 43  # 무작위 수의 개수. 어느 행렬의 폭으로도 나누어지지 않아 큰 행렬에도 같은 행이 되풀이되지 않는다
GROUPED = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
SHAPES = {
    **{f"polyglot-ko-{size}": standin.config_of(size) for size in standin.SHAPES},
    "qwen3-0.6b": {"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
                   "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 40960, **GROUPED},
    "qwen3-1.7b": {"model_type": "qwen3", "hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144,
                   "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 40960, **GROUPED},
    "llama-1.5b": {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 7168,
                   "vocab_size": 110592, "tie_word_embeddings": True, "max_position_embeddings": 131072, **GROUPED},
    "qwen3-4b": {"model_type": "qwen3", "hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728,
                 "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 40960, **GROUPED,
                 "num_attention_heads": 32},
    "llama-2.1b": {"model_type": "llama", "hidden_size": 1792, "num_hidden_layers": 32, "intermediate_size": 8064,
                   "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 32768, **GROUPED,
                   "num_attention_heads": 24},
    "exaone4-1.2b": {"model_type": "exaone4", "hidden_size": 2048, "num_hidden_layers": 30, "intermediate_size": 4096,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 102400,
                     "tie_word_embeddings": True, "max_position_embeddings": 65536, "sliding_window": None,
                     "layer_types": ["full_attention"] * 30},
    "gemma3-270m": {"model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18,
                    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 2048,
                    "vocab_size": 262144, "tie_word_embeddings": True, "max_position_embeddings": 32768,
                    "sliding_window": 512, "query_pre_attn_scalar": 256},
    "gemma3-1b": {"model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26,
                  "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 6912,
                  "vocab_size": 262144, "tie_word_embeddings": True, "max_position_embeddings": 32768,
                  "sliding_window": 512, "query_pre_attn_scalar": 256},
}


def build(shape: str, kind: str = "nf4", dtype: torch.dtype = torch.bfloat16, double_quant: bool = True,
          compute: torch.dtype | None = None):
    """무작위 가중치의 CausalLM. 어댑터는 없다.

    Args:
        kind: "nf4", "int8", "wide"(16비트 그대로).
        dtype: 양자화하지 않는 가중치의 dtype.
        compute: 4비트 선형층이 계산하는 dtype. None이면 dtype과 같다.
    """
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    conf = dict(SHAPES[shape])
    no_ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = auto_config().for_model(conf.pop("model_type"), **conf | no_ends)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        # fp32로 만들어 줄이면 그 큰 자리가 할당기에 틈으로 남아 VRAM이 실제보다 많이 재어진다
        return torch.empty(*size, dtype=dtype, device="cuda").normal_(0.0, 0.02, generator=generator)

    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            weight = random(module.out_features, module.in_features)
            if kind == "nf4":
                linear = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False,
                                           compute_dtype=compute or dtype,
                                           compress_statistics=double_quant, quant_type="nf4", device="meta")
                linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=double_quant,
                                                  quant_type="nf4", module=linear).to("cuda")
            elif kind == "int8":
                linear = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False,
                                             has_fp16_weights=False, device="meta")
                linear.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to("cuda")
            else:
                linear = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            linear.bias = None if module.bias is None else torch.nn.Parameter(random(module.out_features))
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, linear)
    norms = {id(module.weight) for name, module in model.named_modules() if "norm" in name.rsplit(".", 1)[-1]}
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, leaf = name.rsplit(".", 1)
            value = random(*parameter.shape)
            if id(parameter) in norms and config.model_type != "gemma3_text":
                value = value + 1
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, type(module)(config).to("cuda"))
        elif hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device="cuda")
    model.is_loaded_in_4bit = kind == "nf4"
    return model.requires_grad_(False).eval()


def add_lora(model, targets="all-linear", rank: int = 8):
    """LoRA(r 8, alpha 16, dropout 0.05). B도 무작위라서 어댑터가 답을 바꾼다."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.05, task_type="CAUSAL_LM",
                                             target_modules=targets)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False)


def write_folder(shape: str, folder: Path) -> Path:
    """그 모양의 무작위 fp16 모델 폴더를 쓴다. 토크나이저는 함께 든 데모 모델의 것이다.

    무작위 수는 한 덩어리만 만들고, tensor마다 그 안의 다른 자리에서 시작해 읽는다. 디스크가 쓰는 만큼 빠르다.
    """
    from transformers import AutoModelForCausalLM

    shutil.rmtree(folder, ignore_errors=True)  # 끊긴 실행이 남긴 것
    folder.mkdir(parents=True)
    sizes = dict(SHAPES[shape])
    config = auto_config().for_model(sizes.pop("model_type"), **sizes | {"bos_token_id": 0, "eos_token_id": 0})
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(folder)
    generator = np.random.default_rng(0)
    pool = (generator.standard_normal(POOL, np.float32) * 0.02).astype(np.float16)
    one = pool if config.model_type == "gemma3_text" else pool + np.float16(1)  # norm의 weight
    planned = []
    for name, parameter in skeleton.named_parameters():  # 묶인 출력 행렬은 한 번만 나온다
        values = one if "norm" in name and name.endswith("weight") else pool
        chunks = partial(repeated, values, int(generator.integers(POOL)), parameter.numel())
        name = name.replace("lm_head.", "embed_out.") if config.model_type == "gpt_neox" else name
        planned.append(shards.Planned(name, "F16", tuple(parameter.shape), chunks))
    shards.write_model(folder, planned, SHARD_BYTES, lambda line: None)
    for file in (ROOT / "resources/polyglot-ko-demo").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def repeated(values: np.ndarray, begin: int, count: int) -> Iterator[memoryview]:
    """values [POOL]를 begin부터 되풀이해 읽은 count개의 바이트."""
    while count:
        piece = values[begin : begin + min(count, PIECE)]
        yield memoryview(piece).cast("B")
        count -= len(piece)
        begin = (begin + len(piece)) % len(values)
