"""이 도구가 합친 모델의 폴더: 합친 어댑터를 안에 담고, 4비트로 올릴 때 그것을 되돌려 얹는다."""

import filecmp
from dataclasses import replace
from pathlib import Path

import torch

from utils.files import read_json
from utils.model import diskmap, lora, shards
from utils.model.adapter import load_adapter
from utils.model.folder import ADAPTER_WEIGHTS, TensorEntry, open_model_folder
from utils.model.loader import Device, load_base

ADAPTER_FOLDER = "adapter"
MERGE_REPORT = "merge-report.json"
UNMERGED_BYTES = 2**25  # 갱신을 빼는 조각 하나의 fp32. 작으면 GPU를 부르는 일이, 크면 메모리가 는다


def has_adapter(folder: str | Path) -> bool:
    """합칠 때 어댑터를 함께 담아 둔 폴더인지."""
    return (Path(folder) / ADAPTER_FOLDER / ADAPTER_WEIGHTS).is_file()


def merged_onto(folder: str | Path) -> str | None:
    """어느 가중치에 합친 폴더인지(original, quantized). 이 도구가 합친 폴더가 아니면 None이다."""
    file = Path(folder) / MERGE_REPORT
    report = read_json(file, "") if file.is_file() else None
    return report.get("merge_onto") if isinstance(report, dict) else None


def has_merged(folder: str | Path, adapter: Path) -> bool:
    """이 어댑터를 이미 합친 폴더인지. 담아 둔 어댑터의 바이트를 비교한다."""
    return has_adapter(folder) and filecmp.cmp(
        Path(folder) / ADAPTER_FOLDER / ADAPTER_WEIGHTS, adapter / ADAPTER_WEIGHTS, shallow=False)


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
            weight = unmerged(entry, update, device)
            weight = weight.T.contiguous() if update.transposed else weight  # bitsandbytes는 [out, in]으로 둔다
            module.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4",
                                       module=module).to(device.device)
    return load_adapter(model, adapter)


def unmerged(entry: TensorEntry, update: lora.Update, device: Device) -> torch.Tensor:
    """합친 가중치에서 갱신을 뺀 것 [entry.shape]. 조각마다 장치에서 fp32로 빼고 장치의 dtype으로 반올림한다."""
    update = replace(update, a=update.a.to(device.device), b=update.b.to(device.device))
    weight = torch.empty(entry.shape, dtype=device.dtype, device=device.device)
    for start, stop in shards.row_spans(entry.shape, UNMERGED_BYTES):
        merged = shards.read_rows(entry, start, stop).to(device.device).float()
        weight[start:stop] = merged - update.rows(start, stop)
    return weight
