"""Rewrites of the final network that only the device can say the worth of, one per file."""
