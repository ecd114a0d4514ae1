"""Coupling across the networks that people use: what `python -m benchmarks.zoo` runs, judges and shows.

networks: where they come from. steps: what ours does on one of them. depgraph: Torch-Pruning on the same one, by the
same equality test. table: counts, one line a network, and the picture of seconds against layers.
"""
