"""함께 배우는 프로세스들의 통신: 합치고 기다린다. 몇 개인지는 `process`가 안다."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from utils.process import n_processes


@dataclass(frozen=True)
class Group:
    """프로세스들 가운데 나의 자리.

    Attributes:
        rank: 나의 번호. 0번만 말하고 쓴다.
        world: 프로세스의 수.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def add_up(self, value: torch.Tensor) -> torch.Tensor:
        """모든 프로세스의 합을 제자리에 적고 돌려준다. 모양은 무엇이든 되지만 프로세스마다 같아야 한다."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """모두가 여기에 올 때까지 기다린다."""
        if self.world > 1:
            dist.barrier()


ALONE = Group()


def join_group(device: torch.device) -> Group:
    """다른 프로세스들과 연결한다. 혼자면 아무것도 하지 않는다."""
    if n_processes() == 1:
        return ALONE
    if not dist.is_initialized():
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    return Group(dist.get_rank(), dist.get_world_size())
