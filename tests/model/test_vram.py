"""카드에 남은 양과 상한, 모자람을 말하는 오류, 가중치의 자리."""

import families
import pytest
import torch

from utils.model import loader, vram

SHORT = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA GPU가 없다")(test))


def test_a_library_that_lacks_memory_says_so_in_one_way():
    with pytest.raises(torch.OutOfMemoryError, match="cublasCreate"), vram.shortage():
        raise RuntimeError(SHORT)
    with pytest.raises(RuntimeError, match="모양") as other, vram.shortage():
        raise RuntimeError("모양이 다르다")
    assert not isinstance(other.value, torch.OutOfMemoryError)


def test_gathered_weights_compute_the_same(tmp_path):
    families.build("qwen3", torch.float32).save_pretrained(tmp_path)
    model = loader.load_base(tmp_path, loader.choose_device(), "4bit")
    ids = torch.arange(1, 13, device=model.device)[None]
    packed = [parameter for parameter in model.parameters() if hasattr(parameter, "quant_state")]
    before, places = model(input_ids=ids).logits, {parameter.untyped_storage().data_ptr() for parameter in packed}
    vram.gather(model)
    after = {parameter.untyped_storage().data_ptr() for parameter in packed}
    assert torch.equal(model(input_ids=ids).logits, before)
    assert len(after) < len(places) / 2 and not after & places
    assert all(parameter.storage_offset() * parameter.itemsize % 512 == 0 for parameter in packed)


@on_gpu
def test_libraries_are_counted_before_the_plan():
    """부른 다음에 같은 것을 계산해도 할당기 밖에서 더 쓰지 않는다."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert vram.load_libraries(device, torch.float16) >= 0
    assert vram.load_libraries(device, torch.float16) < 4 << 20


@on_gpu
def test_what_is_left_stays_under_the_cap():
    """상한 아래로 남았다고 한 만큼은 잡을 수 있고, 그보다 많이는 잡을 수 없다."""
    device = torch.device("cuda", torch.cuda.current_device())
    held = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    before = vram.left(device)
    try:
        vram.cap(device, torch.cuda.memory_reserved(device) + (256 << 20))
        left = vram.left(device)
        assert 250 << 20 < left < min(before, 320 << 20)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(left) + (64 << 20), dtype=torch.uint8, device=device)
        more = torch.empty(int(left) - (32 << 20), dtype=torch.uint8, device=device)
        assert vram.left(device) < 40 << 20
        del held, more
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert vram.left(device) > before


@on_gpu
def test_loading_takes_little_more_than_the_weights(tmp_path):
    """어휘가 큰 모델도 다 올린 것보다 조금만 더 쓰며 올린다. 빈 VRAM에 겨우 들어가는 모델이 올리다 죽지 않는다."""
    embedding = 2 * 300_000 * 256
    families.build("qwen3", torch.bfloat16, vocab_size=300_000, hidden_size=256).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    model = loader.load_base(tmp_path, loader.choose_device(), "4bit")
    assert embedding < torch.cuda.max_memory_reserved() - before < 1.3 * embedding
    del model
