"""The frontier: accuracy at the same measured latency, this pipeline against what its users would do without it.

    python -m benchmarks.frontier                       all cells that have no result yet, the core first (hours, days)
    python -m benchmarks.frontier --core                the core alone (many hours)
    python -m benchmarks.frontier --minutes 60          for about that long
    python -m benchmarks.frontier --only 'resnet20_gtsrb/0.5x/scratch-*'      net/budget/contestant, shell patterns
    python -m benchmarks.frontier --list                the cells, and which are done
    python -m benchmarks.frontier --table               what there is so far; writes frontier.json and frontier.png
    python -m benchmarks.frontier --quick --only ...    a try-out on few samples, in runs/frontier/quick

A cell is a network, a budget, a contestant and a recovery (`distilled` or `plain`). All contestants of a network start
from the same dense weights and get the same calibration images, validation split (by track), recovery (one epoch, same
schedule and optimizer; learning from the dense network and the labels, or from the labels alone), export, graph passes
and ONNX Runtime session, so that only the network differs. Test accuracy is taken once, of the finished ONNX file.
Before the recovery, accuracies are those on the validation split. Then the finalists of a network and budget are
measured in one interleaved session with the dense network, which is where a cell's ratio and its interval come from.
Each cell is a line of benchmarks/results/frontier.jsonl; what they leave behind is in runs/frontier. Dense weights that
are in neither data nor benchmarks/trained are trained first. Contestants, as their users would run them:

    ours                        `deploy build` as it is (ours-solver-NAME, ours-criterion-NAME: with another method)
    torch-pruning-METHOD-N      Torch-Pruning 1.6.1, widths rounded to N, its ratio searched likewise: depgraph.py;
                                with -freed behind it where shortcuts are padded: they are convolutions then
    fastnas-N                   ModelOpt 0.47 FastNAS, widths multiples of N, its FLOPs searched likewise: fastnas.py
    scratch-width, -depth       the same network narrower or shallower, trained from nothing for as many steps in all as
                                the pruned ones had, 10 epochs at most: scratch.py

What is searched is searched by measuring on the device, sessions of accepting length included, and the seconds of it
are part of the result. Whether ours leads as it has to is said only where all peers of the core (with --core) or all
there are have a measured result, and where the difference is larger than the noise of the test images (noise.py).

Peers are in the extra `bench`: torch-pruning and nvidia-modelopt with what they ask for, torchprofile (which FastNAS
counts FLOPs with; 0.1.0 no longer has the `profile.handlers` it uses) with --no-deps. Left out, tried on Python 3.11
with torch 2.13.0:

    NNI 3.0          installs, imports (with tensorboard for its speed-up) and masks; `ModelSpeedup` then ends in its
                     tracer: AttributeError: 'NoneType' object has no attribute 'startswith'
    MMRazor 1.0.0    `import mmrazor` needs mmcv 2, which has no wheel; its source build ends with ModuleNotFoundError:
                     No module named 'pkg_resources', which setuptools no longer brings
"""
