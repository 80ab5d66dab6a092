"""GPU 없이 확인하는 빠른 길: 커널이 모든 세대에서 컴파일되고, 맡을 수 없는 모델은 까닭을 말한다."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from utils.engine.cuda import CompileError, compile_to_cubin
from utils.engine.decode_engine import kernel_defines, kernel_source
from utils.engine.weights import ROWS, Weights, why_not

POLYGLOT = GPTNeoXConfig(vocab_size=30_080, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16,
                         intermediate_size=8192, rotary_pct=0.5, bos_token_id=None, eos_token_id=None)
LARGE = GPTNeoXConfig(vocab_size=30_080, hidden_size=4096, num_hidden_layers=28, num_attention_heads=16,
                      intermediate_size=16384, rotary_pct=0.25, bos_token_id=None, eos_token_id=None)


@pytest.mark.parametrize(("capability", "config", "nf4", "double", "bf16"), [
    ((7, 5), POLYGLOT, True, False, False), ((8, 6), POLYGLOT, True, True, True), ((8, 6), LARGE, False, False, True),
    ((8, 9), LARGE, True, True, True), ((9, 0), POLYGLOT, False, False, True), ((12, 0), POLYGLOT, True, True, True)])
def test_kernels_compile(capability, config, nf4, double, bf16):
    defines = kernel_defines(config, 30_003, 8, nf4, double, bf16)
    try:
        assert len(compile_to_cubin(kernel_source(), capability, defines)) > 10_000
    except CompileError as error:
        if "NVRTC(" in str(error):
            pytest.skip("NVRTC가 없다")
        raise


def small(**changes):
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=100, bos_token_id=None, eos_token_id=None, **(sizes | changes)))


def test_reasons():
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2))
    assert "llama" in why_not(llama)
    assert why_not(small()) == "GPU가 아님"


def test_weights_as_the_kernels_read_them():
    """LoRA A를 16비트 둘로 나눈 것의 합은 A에, B에 곱한 배율은 PEFT의 배율에 맞는다."""
    from peft import LoraConfig, get_peft_model

    model = small().to(torch.bfloat16)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=["query_key_value"]))
    layer = tuned.get_base_model().gpt_neox.layers[0].attention.query_key_value
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    weights = Weights(tuned)
    adapter, down = weights.layers[0].adapter, layer.lora_A["default"].weight.float()
    assert weights.rank == 4 and not weights.nf4 and adapter.split_down.shape == (ROWS, 128)
    assert torch.allclose(adapter.split_down[:4].float() + adapter.split_down[4:8].float(), down, atol=1e-6)
    assert torch.equal(adapter.up, layer.lora_B["default"].weight.float() * 3)
    assert len(weights.head) % ROWS == 0 and torch.equal(weights.head[:100], model.lm_head.weight)
