from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import csr_array

class Bounds:
    def __init__(self, lb: float, ub: float) -> None: ...

class LinearConstraint:
    def __init__(self, A: np.ndarray | csr_array, lb: float, ub: float) -> None: ...

class OptimizeResult:
    x: np.ndarray | None  # None where nothing was found

def milp(
    c: np.ndarray,
    *,
    integrality: np.ndarray,
    bounds: Bounds,
    constraints: Sequence[LinearConstraint],
    options: Mapping[str, float],
) -> OptimizeResult: ...
