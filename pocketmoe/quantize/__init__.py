"""Quantizing a bundle: schemes (arrays to arrays), the graph rewrite, and their application to a whole bundle."""
