"""This machine: limits, speeds, energy, temperature."""
