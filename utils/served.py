"""합친 모델을 4비트로 올린다. 배운 것이 반올림에 묻히지 않게, 어댑터를 뺀 가중치를 양자화하고 어댑터를 얹는다."""

import filecmp
from dataclasses import replace
from pathlib import Path

import torch

from utils import diskmap, lora, shards
from utils.loader import Device, load_adapter, load_base
from utils.merger import ADAPTER_FOLDER
from utils.modelfolder import open_model_folder


def has_adapter(folder: str | Path) -> bool:
    """합칠 때 어댑터를 함께 담아 둔 폴더인지."""
    return (Path(folder) / ADAPTER_FOLDER / lora.WEIGHTS_FILE).is_file()


def has_merged(folder: str | Path, adapter: Path) -> bool:
    """이 어댑터를 이미 합친 폴더인지. 담아 둔 어댑터의 바이트를 견준다."""
    return has_adapter(folder) and filecmp.cmp(
        Path(folder) / ADAPTER_FOLDER / lora.WEIGHTS_FILE, adapter / lora.WEIGHTS_FILE, shallow=False)


def load_merged_4bit(folder: str | Path, device: Device, cache_dir: str | None = None):
    """합친 모델을 NF4로 올리고 어댑터를 얹은 PeftModel.

    합친 가중치를 그대로 양자화하면 작은 갱신이 NF4의 눈금 사이로 사라진다. 합친 것에서 갱신을 빼면 원래 가중치가
    16비트 반올림 안에서 되돌아오고, 그 NF4 코드는 학습할 때의 것과 거의 모두 같다.

    Raises:
        UsageError: 폴더가 온전하지 않거나 어댑터가 맞지 않는다.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    folder = Path(folder)
    adapter = folder / ADAPTER_FOLDER
    updates = lora.read_updates(adapter, lora.read_config(adapter))
    disk = diskmap.read(open_model_folder(folder))
    model = load_base(folder, device, "4bit", cache_dir)
    for name, update in updates.items():
        module = model.get_submodule(name)
        if isinstance(module, Linear4bit):
            entry, update = disk.entries[f"{name}.weight"], replace(update, transposed=name in disk.transposed)
            weight = torch.cat([shards.read_rows(entry, *span).float() - update.rows(*span)
                                for span in shards.row_spans(entry.shape)])
            weight = weight.T.contiguous() if update.transposed else weight  # bitsandbytes는 [out, in]으로 둔다
            module.weight = Params4bit(weight.to(device.dtype), requires_grad=False, compress_statistics=True,
                                       quant_type="nf4", module=module).to(device.device)
    return load_adapter(model, adapter)
