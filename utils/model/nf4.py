"""NF4와 이중 양자화를 다녀온 가중치를 조각으로 계산한다. bitsandbytes가 4비트로 올린 값과 같다."""

import torch

from utils.model.configs import auto_config
from utils.model.folder import TensorEntry
from utils.model.shards import read_rows, read_whole, row_spans

BLOCK = 64  # absmax 하나를 함께 쓰는 가중치의 수
OFFSET_BLOCK = 256  # 이중 양자화에서 배율 하나를 함께 쓰는 absmax의 수
SCALE_BYTES = 1 / BLOCK + 4 / (BLOCK * OFFSET_BLOCK)  # 값 하나에 드는 배율: 8비트 absmax와, 그것들의 fp32


class NF4Rows:
    """행렬 하나를 NF4로 올렸다가 다시 편 값을 행의 범위로 준다.

    가중치 64개의 블록 i는 w = NF4[code] * a_i이고, a_i는 그 블록의 가장 큰 절댓값(absmax)이다. 이중 양자화는 a_i도
    a_i = dequantize(quantize(a_i - 평균(a))) + 평균(a)로 줄인다. 평균이 행렬 전체의 것이므로, 먼저 행렬을 한 번 훑어
    absmax를 모두 모은다. absmax는 fp32이고 가중치 64개에 하나라 5.8b의 가장 큰 행렬(4,096 x 16,384)에서도 4 MB다.
    """

    def __init__(self, entry: TensorEntry, dtype: torch.dtype = torch.float32, transposed: bool = False):
        """
        Args:
            dtype: 학습할 때 가중치를 올린 dtype. 그 값으로 반올림한 다음에 양자화되고, 편 값도 그 dtype이다.
            transposed: [in, out]으로 둔 가중치(Conv1D). bitsandbytes는 [out, in]으로 뒤집어 양자화한다.
        """
        from bitsandbytes import functional as bnb

        self._entry = entry
        self._dtype = dtype
        self._whole = None
        self.spans = list(row_spans(entry.shape))
        if transposed or (entry.shape[1] % BLOCK and len(self.spans) > 1):  # 블록이 행을 걸치면 조각으로 나눌 수 없다
            self._whole = round_trip(read_whole(entry), dtype, transposed)
            return
        # [원소의 수 / 64], fp32
        absmax = torch.cat([self._quantize(read_rows(entry, *span))[1].absmax for span in self.spans])
        offset = absmax.mean()
        codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=OFFSET_BLOCK)
        self._absmax = bnb.dequantize_blockwise(codes, state).float() + offset

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """[start, stop) 행. fp32. 범위는 `spans`의 것이어야 한다."""
        from bitsandbytes import functional as bnb

        if self._whole is not None:
            return self._whole[start:stop].float()
        codes, state = self._quantize(read_rows(self._entry, start, stop))
        first = start * self._entry.shape[1] // BLOCK  # start행의 첫 원소가 든 블록의 번호
        state.absmax = self._absmax[first : first + len(state.absmax)]  # 이중 양자화를 다녀온 값으로 바꾼다
        return bnb.dequantize_4bit(codes, state).to(self._dtype).float()

    def _quantize(self, values: torch.Tensor):
        """(4비트 값 [원소 / 2] uint8, absmax가 든 `QuantState`). 이중 양자화는 하지 않는다."""
        from bitsandbytes import functional as bnb

        values = values.to(self._dtype).float()
        return bnb.quantize_4bit(values, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")


def round_trip(values: torch.Tensor, dtype: torch.dtype, transposed: bool = False) -> torch.Tensor:
    """온전한 행렬 [out, in]을 NF4로 올렸다가 다시 편 값. `dtype`이다. `transposed`면 [in, out]으로 받고 준다."""
    from bitsandbytes import functional as bnb

    values = values.to(dtype).float()
    values = values.T.contiguous() if transposed else values
    codes, state = bnb.quantize_4bit(values, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    values = bnb.dequantize_4bit(codes, state).to(dtype)
    return values.T.contiguous() if transposed else values


def quantised_modules(config_folder) -> set[str]:
    """4비트로 올릴 때 bitsandbytes가 바꾸는 층의 이름. 무엇을 바꿀지는 transformers가 고른다."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    config = auto_config().from_pretrained(str(config_folder), trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=torch.float32, device_map={"": "cpu"})
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
