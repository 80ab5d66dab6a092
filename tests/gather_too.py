"""나뉜 모델의 어댑터를 쓸 때마다, torch의 all_gather만으로 모은 것을 따로 적으며 다음 스크립트를 실행한다.

`compare`로 두 파일이 같은지 본다. FSDP의 `summon_full_params`를 거치지 않으므로 어댑터 파일의 참값이 된다.

사용법: torchrun --nproc_per_node 2 tests/gather_too.py gathered.safetensors finetune-lora.py --output_dir ...
"""

import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file


def main(file: str) -> None:
    from utils.train import fsdp

    save = fsdp.ShardedWeights.save_adapter

    def save_and_gather(self, folder: Path) -> None:
        save(self, folder)
        flat = {}
        for prefix, unit in self._units():
            for shard in unit.module.parameters(recurse=False):
                parts = [torch.empty_like(shard) for _ in range(self.group.world)]
                dist.all_gather(parts, shard.detach())
                flat[f"{prefix}weight"] = torch.cat(parts).float().cpu()
        if self.group.is_first:
            save_file(flat, file)

    fsdp.ShardedWeights.save_adapter = save_and_gather
    runpy.run_path(sys.argv[0], run_name="__main__")


def compare(adapter: Path, gathered: Path) -> dict[str, int]:
    """어댑터의 tensor가 모은 것과 한 비트도 다르지 않은지 본다.

    Returns:
        tensor의 수(tensors), 그 가운데 모두 0인 것(zeros), 값이 다른 것(different), 값의 수(values).
    """
    saved, truth = load_file(adapter), load_file(gathered)
    different = set(saved) ^ set(truth)
    for name in set(saved) & set(truth):
        flat = saved[name].flatten()
        if flat.numel() == 0 or not torch.equal(flat, truth[name][:flat.numel()]):
            different.add(name)
    return {"tensors": len(saved), "values": sum(value.numel() for value in saved.values()),
            "zeros": sum(not bool(value.any()) for value in saved.values()), "different": len(different)}


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    gathered = sys.argv.pop(0)
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
    main(gathered)
