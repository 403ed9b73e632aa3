"""What a text shows of a bundle: inputs of its experts, ranges of its caches, reference logits."""
