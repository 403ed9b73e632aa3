"""The one budget, and memory that stays."""
