"""Data files of devices, prices and published figures, each value with its source."""
