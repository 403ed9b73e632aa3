"""A profile beside rented GPUs and hosted APIs."""
