"""Which channels belong together, which can go, and the surgery that takes them out."""
