"""Ablations: what each part of the method is worth, at the same measured latency.

    python -m benchmarks.ablations                      all cells that have no result yet (hours)
    python -m benchmarks.ablations --minutes 60         for about that long
    python -m benchmarks.ablations --only '*/flops@0'   NET/BUDGET/ABLATION@SEED, shell patterns
    python -m benchmarks.ablations --core               one seed
    python -m benchmarks.ablations --list               the cells, and which are done
    python -m benchmarks.ablations --table              what there is so far; writes ablations.json
    python -m benchmarks.ablations --quick --only ...   a try-out on few samples, in runs/ablations/quick

A cell is `deploy build` of ResNet-56 on JPEG-re-encoded CIFAR-10 at 0.5x with one thing taken away (arms.py), from an
empty cache, with one of three seeds; arena, recovery, judge and the common session are those of benchmarks/frontier. An
ablation that ends above the budget, or leaves more of it unused than a build may, is built again for another budget,
until the measured latency is that of the others, so that accuracies are compared at one latency. All of its builds
count in its seconds, and what the first one measured is told. Accuracies: of the repaired network, and after one epoch
of the recovery that all get, both of the test images. Each cell is a line of benchmarks/results/ablations.jsonl.
"""
