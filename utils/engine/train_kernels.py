"""`kernels/train.cu`를 부르는 `CudaOps`."""

from utils.engine.train_ops import TorchOps


class CudaOps(TorchOps):
    name = "커널"
