"""Training that gives back what pruning took."""
