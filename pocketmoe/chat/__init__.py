"""Conversations as the text that a model was trained on: chat templates in a sandbox with limits."""
