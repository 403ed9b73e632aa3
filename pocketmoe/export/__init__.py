"""A checkpoint becomes a bundle: capture the graph, cut it at its experts, stream the weights."""
