"""CPU 두 프로세스에서 FSDP를 쓰게 한 다음 스크립트를 실행한다. accelerate는 FSDP를 가속기에서만 켠다.

사용법: torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py finetune-lora.py --output_dir ...
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import _init_utils

os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_USE_ORIG_PARAMS": "false",
               "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPTNeoXLayer",
               "FSDP_SYNC_MODULE_STATES": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
               "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "ACCELERATE_MIXED_PRECISION": "no"}
start = PartialState.__init__


def start_as_accelerator(self, *args, **kwargs) -> None:
    start(self, *args, **kwargs)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = start_as_accelerator
_init_utils._get_compute_device = lambda *_: torch.device("cpu")
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
