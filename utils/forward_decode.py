"""transformers의 forward로 한 토큰씩 만드는 길을 맡는다. 어떤 causal LM이든 된다."""

import inspect
from collections.abc import Iterator

import torch
from transformers import DynamicCache

from utils.sampling import Sampling, pick


class ForwardDecode:
    """KV cache를 쓰는 forward를 토큰마다 한 번 부른다.

    Attributes:
        path: 이 길을 설명하는 한 줄.
    """

    PREFILL = 512  # 질문을 이만큼씩 나누어 읽어서 긴 질문도 메모리를 조금만 쓴다

    def __init__(self, model, context: int, vocab: int):
        self._model = model
        self._vocab = vocab
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        parameters = inspect.signature(causal_lm.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._config = causal_lm.config
        self._device = next(model.parameters()).device
        self.path = f"transformers forward({self._device.type})"

    def use_adapter(self, on: bool) -> None:
        """PEFT 모델이면 어댑터를 켜거나 끈다. 다른 모델에서는 하는 일이 없다."""
        if hasattr(self._model, "disable_adapter_layers"):
            self._model.enable_adapter_layers() if on else self._model.disable_adapter_layers()

    def tokens(self, input_ids: list[int], settings: Sampling, limit: int) -> Iterator[int]:
        """토큰을 최대 `limit`개 내놓는다. 끝 토큰에서 멈추는 일은 부르는 쪽이 한다."""
        generator = torch.Generator(self._device).manual_seed(settings.seed_number())
        cache, answer = DynamicCache(config=self._config), []
        prompt = torch.tensor([input_ids], device=self._device)
        for part in prompt.split(self.PREFILL, dim=1):
            logits = self._forward(part, cache)
        while True:
            answer.append(pick(logits, answer, settings, generator))
            yield answer[-1]
            if len(answer) == limit:
                return
            logits = self._forward(torch.tensor([answer[-1:]], device=self._device), cache)

    def _forward(self, input_ids: torch.Tensor, cache) -> torch.Tensor:
        output = self._model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})
        return output.logits[0, -1, : self._vocab]
