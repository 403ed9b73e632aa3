import numpy as np

def quant_tensor_k_quant_cpu(
    data: np.ndarray, num_bits: int = 4, group_size: int = 32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...  # codes, scale, zero point, a row per block
def gptq(
    W: np.ndarray,
    H: np.ndarray,
    num_bits: int = 4,
    group_size: int = 32,
    scheme: str = "asym",
    blocksize: int = 128,
    percdamp: float = 0.01,
    actorder: bool = False,
) -> np.ndarray: ...  # the weights as their codes give them back
