"""What a bundle and a machine are worth, measured: quality, speed, memory, cost.

profile.py  profile.json: typed, versioned, checked (docs/PROFILE.md)
"""
