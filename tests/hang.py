"""How long a test waits for what cannot but come."""

HANG_S = 1800.0  # no machine is so busy that anything here takes as long: what does hangs
