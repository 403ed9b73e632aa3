"""What a bundle and a machine are worth, measured: quality, speed, memory, cost."""
