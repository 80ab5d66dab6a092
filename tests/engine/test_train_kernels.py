"""GPU 없이 확인하는 학습의 커널: 같은 소스를 CPU에서 돌린 것이 torch 식과 같고, 모든 세대에서 컴파일된다."""

import cuda_on_cpu
import families
import pytest
import torch
from test_train_families import FAMILIES, SIZES, add_lora, build, make_batch
from train_ops_check import op_errors

from utils.engine.cuda import CompileError, compile_to_cubin
from utils.engine.families import describe
from utils.engine.train_kernels import KERNELS, SOURCES, CudaOps, kernel_defines, kernel_source
from utils.engine.train_step import TrainStep

BF16 = torch.bfloat16
needs_compiler = pytest.mark.skipif(not cuda_on_cpu.AVAILABLE, reason="x86-64 Linux의 g++가 없다")


def run(step, model, batch) -> tuple[float, dict]:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad.zero_()
    loss = float(step.train(batch))
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@needs_compiler
@pytest.mark.parametrize("name, rank, kind", [
    ("gpt_neox", 9, "nf4"), ("gpt_neox-sequential", 3, "plain"), ("llama", 3, "nf4"), ("qwen3", 11, "single"),
    ("gemma3_text", 3, "nf4"), ("exaone4", 3, "nf4"), ("hyperclovax", 3, "nf4"), ("granite", 8, "nf4")])
def test_kernels_equal_the_formulas(name, rank, kind, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 208}
    if name == "qwen3":
        sizes["head_dim"] = 48  # bitsandbytes의 CPU 식은 폭이 64의 배수가 아닌 행렬을 틀리게 푼다
    model = build(name, **sizes).to(BF16)
    if kind != "plain":
        model = families.quantize(model, "nf4", kind == "nf4")
    family = describe(model)
    model = add_lora(model, family.linears(), 0.25, rank)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameter.grad = torch.zeros_like(parameter)
    batch, step = make_batch(), TrainStep(model, 1, 3)
    kernels = cuda_on_cpu.load_kernels(list(KERNELS), kernel_defines(family, BF16), tmp_path, SOURCES)
    cuda = CudaOps(family, BF16, kernels)
    errors = op_errors(cuda, step, BF16, "cpu")
    assert max(errors.values()) < 0.006, errors
    wanted = run(step, model, batch)
    step.ops = cuda
    got, again = run(step, model, batch), run(step, model, batch)
    assert got[0] == pytest.approx(wanted[0], rel=0.02)  # bf16의 반올림은 층을 지나며 커진다
    assert got[0] == again[0]
    assert all(torch.equal(got[1][part], again[1][part]) for part in got[1])


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("name", ["gpt_neox", "qwen3", "gemma3_text"])
def test_kernels_compile_for_every_generation(capability, name):
    family = describe(SIZES | FAMILIES[name] | {"model_type": name})
    dtype = BF16 if capability >= (8, 0) else torch.float16
    try:
        assert compile_to_cubin(kernel_source(), capability, kernel_defines(family, dtype))
    except CompileError as error:
        if "NVRTC" not in str(error):
            raise
        pytest.skip(str(error))
