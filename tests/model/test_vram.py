"""카드에 남은 양과 상한. GPU가 있어야 한다."""

import families
import pytest
import torch

from utils.model import loader, vram

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA GPU가 없다")]


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
