"""transformers의 forward로 한 토큰씩 만드는 길을 맡는다. 어떤 causal LM이든 된다."""

import inspect
from collections.abc import Iterator

import torch
from transformers import DynamicCache, StaticCache

from utils.sampling import Sampling, pick


class ForwardDecode:
    """KV cache를 쓰는 forward를 토큰마다 한 번 부른다. GPU에서는 그 한 번을 CUDA graph로 캡처해 본다.

    Attributes:
        path: 이 길을 설명하는 한 줄.
    """

    PREFILL = 512  # 질문을 이만큼씩 나누어 읽어서 긴 질문도 메모리를 조금만 쓴다

    def __init__(self, model, context: int, vocab: int):
        self._model = model
        self._context = context
        self._vocab = vocab
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        parameters = inspect.signature(causal_lm.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._config = causal_lm.config
        self._device = next(model.parameters()).device
        self._graphs: dict[bool, tuple] = {}
        self._adapter_on = True
        self._capturable = self._device.type == "cuda"
        self.path = f"transformers forward({self._device.type})"
        if self._capturable:
            self._cache = StaticCache(config=self._config, max_cache_len=context)
            self._try_capture()

    def use_adapter(self, on: bool) -> None:
        """PEFT 모델이면 어댑터를 켜거나 끈다. 다른 모델에서는 하는 일이 없다."""
        if hasattr(self._model, "disable_adapter_layers"):
            self._model.enable_adapter_layers() if on else self._model.disable_adapter_layers()
            self._adapter_on = on

    def tokens(self, input_ids: list[int], settings: Sampling, limit: int) -> Iterator[int]:
        """토큰을 최대 `limit`개 내놓는다. 끝 토큰에서 멈추는 일은 부르는 쪽이 한다."""
        generator = torch.Generator(self._device).manual_seed(settings.seed_number())
        step, cache = self._start()
        answer, past = [], 0
        for part in torch.tensor([input_ids], device=self._device).split(self.PREFILL, dim=1):
            logits = self._forward(part, cache, past)
            past += part.shape[1]
        while True:
            answer.append(pick(logits, answer, settings, generator))
            yield answer[-1]
            if len(answer) == limit:
                return
            logits = step(answer[-1], past)
            past += 1

    def _start(self) -> tuple:
        if self._capturable and self._adapter_on not in self._graphs:
            self._try_capture()
        if not self._capturable:
            cache = DynamicCache(config=self._config)
            return lambda token, past: self._forward(torch.tensor([[token]], device=self._device), cache, past), cache
        self._cache.reset()
        graph, token_in, position_in, logits = self._graphs[self._adapter_on]

        def replay(token: int, past: int) -> torch.Tensor:
            token_in.fill_(token)
            position_in.fill_(past)
            graph.replay()
            return logits

        return replay, self._cache

    @torch.inference_mode()
    def _try_capture(self) -> None:
        """토큰 하나의 forward를 캡처한다. 캡처할 수 없는 연산이 있으면 그 뒤로는 한 번씩 부른다."""
        token, position = (torch.zeros(1, 1, dtype=torch.long, device=self._device) for _ in range(2))
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._forward(token, self._cache, position)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._forward(token, self._cache, position)
        except RuntimeError as error:
            self._capturable = False
            self.path = f"transformers forward(cuda, CUDA graph로 캡처하지 못함: {str(error).splitlines()[0][:100]})"
            return
        self._graphs[self._adapter_on] = graph, token, position, logits
        self.path = "transformers forward(cuda, CUDA graph)"

    def _forward(self, input_ids: torch.Tensor, cache, past: int | torch.Tensor) -> torch.Tensor:
        positions = past + torch.arange(input_ids.shape[1], device=self._device)[None]
        output = self._model(input_ids=input_ids, position_ids=positions, use_cache=True, logits_to_keep=1,
                             **{self._cache_name: cache})
        return output.logits[0, -1, : self._vocab]
