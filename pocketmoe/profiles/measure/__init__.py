"""A bundle run at several budgets on this machine, into a profile."""
