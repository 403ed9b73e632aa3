"""Conversations to prompts, by strangers' templates within counted limits."""
