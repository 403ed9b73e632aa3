import numpy as np

class csr_array:
    def __init__(self, values_at: tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]) -> None: ...
