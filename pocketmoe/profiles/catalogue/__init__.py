"""Data files of devices, prices and published figures, each value with its source.

clouds.py         prices of GPUs and APIs, published throughput (`profiles/clouds.toml`), a user's own rows
devices.py        common devices (`profiles/devices.toml`): memory, bandwidths, compute, power, price
sky.py            SkyPilot's catalogue, and a task that serves the same model
sourced_value.py  values that say where they come from, and the data files that hold them
"""
