"""PocketMoE: Mixture-of-Experts language models on machines that are too small for them."""

__version__ = "0.1.0"
