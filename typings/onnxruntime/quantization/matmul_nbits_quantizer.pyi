from collections.abc import Sequence

from torch import Tensor

class HQQWeightOnlyQuantizer:
    @staticmethod
    def optimize_weights(
        tensor: Tensor, scale: Tensor, zero: Tensor, min_max: Sequence[int], axis: int = 0
    ) -> tuple[Tensor, Tensor]: ...  # scale, zero
