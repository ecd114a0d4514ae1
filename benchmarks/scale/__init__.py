"""What a network's size costs: seconds and memory of each step, and how they grow with the number of layers.

    python -m benchmarks.scale                          the nets of real size, those without a result yet; measures
    python -m benchmarks.scale --nets resnet50 --rows 60    one of them again, 60 rows of its table measured
    python -m benchmarks.scale --growth                 one family at several depths, the steps that measure nothing
    python -m benchmarks.scale --table                  what there is, with the exponents; draws it

Real size: ResNet-50 at 224x224, and two detectors of torchvision up to what picks boxes (benchmarks/coupling), SSDlite
and RetinaNet with a ResNet-50 and its pyramid, at 320x320; random weights, a process each. The family: the ResNets of
CIFAR at 32x32, whose depth alone changes; their rows are timed by the simulated device, so no device has a part in it.

    capture, groups, proofs     the network as a graph; its groups, not proved; the groups again, with their proofs
    onnx, table                 the file and its passes; the rows, made and measured, and what is fitted between
    solve                       the exact solver at half of the dense latency, for values that are drawn by a seed
    probe, losses               dense activations that values start from; a few of the plans that a round tries
    round                       three plans narrowed and measured beside the dense network in one session

With --rows a sample of the rows is measured, and the others take a roofline's times, scaled to those of the sample. A
whole round tries `plans` plans at the seconds of one in `losses`, which are asked for with --plans. Seconds are wall
time, `cpu_s` that of the process alone (a measured session is another's); memory is the peak of the process until
then. Torch has one thread. Everything is kept in benchmarks/results/scale.json with the load of the machine beside it.
"""
