"""CUDA graph로 찍어 되풀이하는 micro-step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from utils.errors import first_line
from utils.train.micro_step import Batch, Step


class CapturedStep:
    """micro-step을 CUDA graph로 찍어 되풀이한다. 찍을 수 없으면 그대로 실행하고 이유를 `path`에 남긴다.

    작은 모델의 micro-step은 커널 수천 개이고, GPU가 계산하는 시간보다 Python이 하나씩 시작하는 시간이 길다. 찍어 둔
    graph는 한 번의 호출로 모두 시작한다. 대신 커널이 읽고 쓰는 주소가 찍을 때의 것으로 굳는다. 그래서 입력은 늘 같은
    자리(static tensor)에 복사하고, gradient는 `weights`가 잡아 둔 같은 `.grad`에 더하고, 결과는 베껴서 돌려준다.

    첫 번째는 그대로 실행해 워밍업으로 삼는다. 학습과 평가를, 그리고 batch마다 다른 인자(`Step.options`)를 따로 찍지만
    메모리 풀은 함께 쓴다: 번갈아 돌 뿐 겹치지 않으므로 중간값의 자리를 함께 쓸 수 있다. cuBLAS는 stream마다 작업 공간을
    잡으므로 모두 stream 하나에서 한다.
    """

    def __init__(self, step: Step, device: torch.device, stream: torch.cuda.Stream | None = None):
        """stream: 계산할 stream. None이면 GPU에서는 새로 만든다."""
        self.step = step
        self.device = device
        self.stream = torch.cuda.Stream(device) if stream is None and device.type == "cuda" else stream
        self.enabled = device.type == "cuda" and getattr(step, "capturable", True)
        self._failure = None
        self.release()

    def release(self) -> None:
        """찍은 graph와 입력을 버린다. 모양이 바뀌거나 메모리가 모자랄 때 부른다."""
        self._inputs, self._graphs, self._outputs, self._warm, self._pool = {}, {}, {}, set(), None
        self.step.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def path(self) -> str:
        if self._failure:
            return f"{self.step.path}, graph 없이({self._failure})"
        return self.step.path + (", CUDA graph" if self.enabled else ", graph 없이")

    def train(self, batch: Batch) -> torch.Tensor:
        return self._run("train", batch)

    def evaluate(self, batch: Batch) -> torch.Tensor:
        return self._run("evaluate", batch)

    def recompute_more(self) -> bool:
        return self.step.recompute_more()

    def has_captured(self, batch: Batch) -> bool:
        """이 batch를 학습할 graph가 이미 찍혔는지. 찍힌 뒤의 실행은 메모리를 새로 잡지 않는다."""
        return ("train", *self.step.options(batch).values()) in self._graphs

    def _run(self, name: str, batch: Batch) -> torch.Tensor:
        options = self.step.options(batch)
        kind, function = (name, *options.values()), partial(getattr(self.step, name), **options)
        if not self.enabled:
            with self._aside():
                return function({name: value.to(self.device) for name, value in batch.items()})
        batch = self._copy_inputs(batch)
        if kind not in self._graphs:
            with self._aside():
                if kind not in self._warm:
                    self._warm.add(kind)
                    return function(batch)
                if not self._capture(kind, function, batch):
                    return function(batch)  # 찍다가 그만둔 것은 실행되지 않았다
        self._graphs[kind].replay()
        return self._outputs[kind].clone()  # 다음 replay가 같은 자리를 덮어쓴다

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """`stream`에서 계산한다. 앞뒤의 stream과 차례를 지킨다."""
        if self.stream is None:
            yield
            return
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            yield
        outside.wait_stream(self.stream)

    def _copy_inputs(self, batch: Batch) -> Batch:
        """입력을 static tensor에 복사한다. CPU의 입력도 그대로 받는다."""
        known = [name for name in batch if name in self._inputs]
        if any(self._inputs[name].shape != batch[name].shape for name in known):
            self.release()
        for name, value in batch.items():
            if name not in self._inputs:
                self._inputs[name] = torch.empty_like(value, device=self.device)
            self._inputs[name].copy_(value, non_blocking=True)
        return self._inputs

    def _capture(self, kind: tuple, function: Callable[[Batch], torch.Tensor], batch: Batch) -> bool:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()  # 찍는 동안에는 다른 stream의 일이 끼어들 수 없다
        torch.cuda.empty_cache()  # 워밍업이 쓰던 메모리를 graph의 풀이 쓸 수 있게 한다
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
                self._outputs[kind] = function(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.enabled = False
            self._graphs.clear()
            self._failure = first_line(error)
            torch.cuda.synchronize()
            return False
        self._graphs[kind] = graph
        return True
