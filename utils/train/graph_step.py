"""micro-step을 CUDA graph로 찍어 되풀이하고, 문서가 서로를 보지 않음을 시작할 때 확인하는 일을 맡는다."""

import torch

from utils.data.blocks import IGNORE
from utils.errors import UsageError


class CapturedStep:
    """micro-step을 CUDA graph로 찍어 되풀이한다. 찍을 수 없으면 그대로 실행하고 까닭을 `path`에 남긴다.

    입력은 늘 같은 자리(static tensor)에 복사되고, 첫 번째는 그대로 실행해 준비 운동을 삼는다. 학습과 평가를 따로
    찍지만 메모리 풀은 함께 쓴다.
    """

    def __init__(self, step, device: torch.device):
        self.step = step
        self.device = device
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

    def train(self, batch: dict) -> torch.Tensor:
        return self._run("train", batch)

    def evaluate(self, batch: dict) -> torch.Tensor:
        return self._run("evaluate", batch)

    def recompute_more(self) -> bool:
        return self.step.recompute_more()

    @property
    def captured(self) -> bool:
        """학습 graph가 이미 찍혔는지. 찍힌 뒤의 실행은 메모리를 새로 잡지 않는다."""
        return "train" in self._graphs

    def _run(self, kind: str, batch: dict) -> torch.Tensor:
        function = getattr(self.step, kind)
        if not self.enabled:
            return function({name: value.to(self.device) for name, value in batch.items()})
        batch = self._copy_inputs(batch)
        if kind not in self._graphs:
            if kind not in self._warm:
                self._warm.add(kind)
                return function(batch)
            if not self._capture(kind, function, batch):
                return function(batch)  # 찍다가 그만둔 것은 실행되지 않았다
        self._graphs[kind].replay()
        return self._outputs[kind].clone()

    def _copy_inputs(self, batch: dict) -> dict:
        """입력을 static tensor에 복사한다. CPU의 입력도 그대로 받는다."""
        same = all(self._inputs[name].shape == value.shape for name, value in batch.items() if name in self._inputs)
        if not same:
            self.release()
        for name, value in batch.items():
            if name not in self._inputs:
                self._inputs[name] = torch.empty_like(value, device=self.device)
            self._inputs[name].copy_(value, non_blocking=True)
        return self._inputs

    def _capture(self, kind: str, function, batch: dict) -> bool:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # 준비 운동이 쓰던 메모리를 graph의 풀이 쓸 수 있게 한다
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._outputs[kind] = function(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.enabled = False
            self._graphs.clear()
            self._failure = str(error).strip().splitlines()[0][:120]
            torch.cuda.synchronize()
            return False
        self._graphs[kind] = graph
        return True


def check_isolation(step, vocab: int, rows: int, block: int, device: torch.device, extra: dict) -> None:
    """한 블록에 든 두 문서가 서로를 보지 못함을 실제 micro-step으로 확인한다.

    첫 문서의 내용을 바꾸어도 둘째 문서의 손실은 그대로여야 하고, 둘째 문서의 첫 토큰을 바꾸면 달라져야 한다.

    Raises:
        UsageError: 문서가 서로를 본다. 조용히 틀린 학습이 되므로 시작하지 않는다.
    """
    cut = block // 2
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab, (rows, block), generator=generator)
    labels = tokens.clone()
    labels[:, :cut + 1] = IGNORE
    positions = torch.cat([torch.arange(cut), torch.arange(block - cut)]).expand(rows, block).contiguous()
    other_first, other_own = tokens.clone(), tokens.clone()
    other_first[:, :cut] = (other_first[:, :cut] + 1) % vocab
    other_own[:, cut] = (other_own[:, cut] + 1) % vocab
    losses = []
    for variant in (tokens, other_first, other_own):
        batch = {"input_ids": variant, "labels": labels, "position_ids": positions, **extra}
        losses.append(float(step.evaluate({name: value.to(device) for name, value in batch.items()})))
    # 가려진 글은 0을 더할 뿐이므로 같은 모양의 계산은 거의 비트까지 같다
    if abs(losses[1] - losses[0]) > 5e-7 * abs(losses[0]) or losses[2] == losses[0]:
        raise UsageError(f"이 모델({step.path})은 한 블록에 든 문서들을 떼어 놓지 못해 묶어서 학습할 수 없다: "
                         f"앞 문서를 바꾸자 손실이 {losses[0]:.4f}에서 {losses[1]:.4f}로, 제 첫 토큰을 바꾸자 "
                         f"{losses[2]:.4f}로 바뀌었다")
