"""Mixed precision: what each format costs each matrix, and the best choice within a budget."""
