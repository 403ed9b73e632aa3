"""Bundles on the Hugging Face hub.

client.py       what every call of the hub has in common: ids, one line for each way to fail, progress
pull.py         a bundle by its hub id: looked at, downloaded, checked against its seals
push.py         a bundle to a repository, in one commit
card.py         the page that the hub shows of it, with the metadata that it understands
"""
