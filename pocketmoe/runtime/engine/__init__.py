"""Tokens through segments and experts, within one memory plan."""
