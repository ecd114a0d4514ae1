"""How much of the networks that people use can be pruned, and whether what is pruned is right.

    python -m benchmarks.zoo [--family torchvision|segmentation|video|timm] [NAME …] [--size 64] [--limit 120] [--again]

Every network of a family with random weights, in a process of its own with a time limit: capture, groups with their
proofs, a cut of 30 % of every group, the cut network against the masked dense one, one training step, ONNX, ONNX
Runtime against torch, and the ONNX narrowed from the dense one against the one exported from the pruned network.
One JSON line a network in benchmarks/results/zoo.jsonl; a network that is there is not run again. `--report` prints
the counts. Needs the extra `bench` (torchvision and timm, both installed with --no-deps beside a CPU build of torch).
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from pipeline.graph.export import export
from pipeline.graph.narrow import narrow_file
from pipeline.graph.optimize import optimize
from pipeline.nouns import KeepUnits, PruningPlan
from pipeline.prune.capture import Network, capture, tensors
from pipeline.prune.execute import MaskedRun
from pipeline.prune.groups import find_groups
from pipeline.prune.neutral import layers
from pipeline.prune.plan import kept_units, resolve
from pipeline.prune.proof import randomised
from pipeline.prune.surgery import carry_out, prune
from profiles.schema import GraphSpec, InputSpec

RESULTS = Path(__file__).resolve().parent / "results" / "zoo.jsonl"
CUT = 0.3
FIXED = {"inception_v3": 96, "maxvit_t": 224, "alexnet": 224, "s3d": 224} | {
    f"vgg{n}": 224 for n in (11, 13, 16, 19)
}  # networks that ask for a size, or for at least one
TIMM = """
convnext_atto convnext_tiny convnextv2_atto edgenext_xx_small edgenext_small mobilenetv4_conv_small
mobilenetv4_hybrid_medium mobilenetv3_small_100 efficientnet_lite0 tf_efficientnetv2_b0 efficientnetv2_rw_t regnetx_004
regnety_004 regnetz_c16 repvgg_a0 repghostnet_050 mobileone_s0 fastvit_t8 fastvit_sa12 efficientvit_b0 efficientvit_m0
efficientformer_l1 efficientformerv2_s0 ghostnet_100 ghostnetv2_100 densenet121 inception_v3 inception_v4
inception_resnet_v2 xception41 hrnet_w18_small resnet18 resnet50d resnext26ts seresnet18 ecaresnet26t skresnet18
resnest14d res2net50_26w_4s selecsls42 dla34 dpn68 vovnet39a ese_vovnet19b_dw cspresnet50 cspdarknet53 darknet53
hardcorenas_a tinynet_e mnasnet_small mixnet_s lcnet_050 spnasnet_100 fbnetc_100 rexnet_100 gernet_s nf_resnet26
vit_tiny_patch16_224 vit_small_patch32_224 deit_tiny_patch16_224 deit3_small_patch16_224 cait_xxs24_224
swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 pvt_v2_b0 levit_128s levit_conv_128s xcit_nano_12_p16_224
resmlp_12_224 mixer_s32_224 gmlp_ti16_224 poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18 coat_tiny
coatnet_0_rw_224 maxvit_tiny_rw_224 mobilevit_xxs mobilevitv2_050 tiny_vit_5m_224 twins_pcpvt_small twins_svt_small
nest_tiny visformer_tiny crossvit_tiny_240 convit_tiny beit_base_patch16_224 focalnet_tiny_srf davit_tiny
gcvit_xxtiny inception_next_atto repvit_m0_9 starnet_s1 shvit_s1 hgnetv2_b0 rdnet_tiny mambaout_femto sequencer2d_s
"""


# --- networks ------------------------------------------------------------------------------------------------------


def families() -> dict[str, Callable[[], list[str]]]:
    """Family -> names of its networks."""
    return {
        "torchvision": lambda: _torchvision_names("torchvision.models"),
        "segmentation": lambda: _torchvision_names("torchvision.models.segmentation"),
        "video": lambda: _torchvision_names("torchvision.models.video"),
        "timm": TIMM.split,
    }


@cache
def _torchvision() -> Any:
    """torchvision beside a CPU build of torch: two operators that its compiled part would declare are declared here."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    torchvision.kept = library
    return torchvision


def _torchvision_names(module: str) -> list[str]:
    import importlib

    models = _torchvision().models
    return list(models.list_models(module=importlib.import_module(module)))


def build(family: str, name: str, size: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network with random weights in eval mode, and an example."""
    torch.manual_seed(0)
    if family == "timm":
        _torchvision()
        import timm

        for options in ({"img_size": size}, {}):
            try:
                model = timm.create_model(name, pretrained=False, **options).eval()
                with torch.no_grad():
                    model(torch.randn(1, 3, size, size))
                return model, (torch.randn(1, 3, size, size),)
            except (TypeError, RuntimeError, AssertionError, ValueError):
                continue
        size = model.pretrained_cfg["input_size"][-1]
        return model, (torch.randn(1, 3, size, size),)
    models = _torchvision().models
    size = max(size, FIXED.get(name.removesuffix("_bn"), size))
    if name.startswith("vit_"):
        size = max(size, 28) // 32 * 32 if "32" in name else max(size, 28) // 14 * 14 if "14" in name else size
    options: dict[str, Any] = {"weights": None}
    if family == "segmentation":
        options["weights_backbone"] = None
    if name.startswith("vit_"):
        options["image_size"] = size
    if name in ("inception_v3", "googlenet"):
        options |= {"init_weights": False, "aux_logits": name != "googlenet"}
    model = models.get_model(name, **options).eval()
    frames = (16,) if family == "video" else ()
    return model, (torch.randn(1, 3, *frames, size, size),)


# --- one network ---------------------------------------------------------------------------------------------------


class Record(dict[str, Any]):
    """One line of the table. Each step notes its seconds and the peak memory after it."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is the result
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            self[f"{name}_error"] = f"{type(error).__name__}: {first}"[:300]
        finally:
            self.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 2)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            self.setdefault("peak_mib", {})[name] = round(peak)


def judge(family: str, name: str, size: int) -> Record:
    """Run every step on one network."""
    record = Record(family=family, name=name)
    model, example = build(family, name, size)
    record["input"] = list(example[0].shape)
    record["parameters"] = sum(p.numel() for p in model.parameters())
    network: Network | None = None
    with record.step("capture"):
        network = capture(model, example)
    record["captured"] = network is not None
    if network is None:
        return record
    record["leaves"] = dict(network.leaves)
    record["layers"] = len(layers(network))
    with record.step("groups"):
        network = find_groups(network, prove=False)
    bare = network.topology
    with record.step("proofs"):
        network = find_groups(network)
    topology = network.topology
    before = {g.id for g in bare.offered}
    after = {g.id for g in topology.offered}
    record |= {
        "offered": len(after),
        "refuted": dict(Counter(_plain(topology.group(id).frozen) for id in before - after)),
        "frozen": dict(Counter(_plain(g.frozen) for g in topology.groups if g.frozen).most_common(8)),
        "blocks": len(topology.removable),
    }
    if not after:
        return record
    record |= shares(network)
    plan = cut(network, CUT)
    with record.step("cut"):
        _cut(record, network, plan)
    with tempfile.TemporaryDirectory() as folder, record.step("onnx"):
        _onnx(record, network, plan, Path(folder))
    return record


def _plain(reason: str | None) -> str:
    """A reason without the names in it."""
    words = (reason or "").split("'")
    return "'…'".join(words[::2])[:120] if len(words) > 2 else str(reason)[:120]


def cut(network: Network, share: float) -> PruningPlan:
    """Keep a random 1 - share of every offered group."""
    draw = np.random.default_rng(0)
    edits = []
    for group in network.topology.offered:
        kept = max(1, group.size - max(1, round(share * group.size)))
        edits.append(KeepUnits(group.id, tuple(sorted(int(i) for i in draw.permutation(group.size)[:kept]))))
    return PruningPlan(tuple(edits))


def shares(network: Network) -> dict[str, float]:
    """Share of parameters and of MACs of layers that a 30 % cut removes, and that one unit a group leaves removed."""
    found = {}
    dense = _work(network, None)
    for label, share in (("at_30", CUT), ("at_all", 1.0)):
        left = _work(network, cut(network, share))
        found[f"parameters_removed_{label}"] = round(1 - left[0] / dense[0], 4)
        found[f"macs_removed_{label}"] = round(1 - left[1] / dense[1], 4)
    free, total = 0, 0
    units = {u for g in network.topology.offered for u in g.units}
    for layer in network.topology.layers:
        macs = int(np.prod(layer.shape)) * layer.positions
        total += macs
        axes = network.topology.params.get(layer.weight, {})
        free += macs * any(np.isin(ids, list(units)).any() for ids in axes.values())
    return found | {"macs_touched": round(free / max(1, total), 4)}


def _work(network: Network, plan: PruningPlan | None) -> tuple[int, int]:
    """Parameters, and multiplications of convolutions and linear layers for one sample."""
    params = {} if plan is None else resolve(network.topology, plan).params
    state = dict(network.graph.named_parameters())

    def size(name: str, shape: tuple[int, ...]) -> int:
        axes = params.get(name, {})
        return int(np.prod([len(axes[a]) if a in axes else n for a, n in enumerate(shape)]))

    counted = sum(size(name, tuple(value.shape)) for name, value in state.items())
    macs = sum(size(layer.weight, layer.shape) * layer.positions for layer in network.topology.layers)
    return counted, macs


def _cut(record: Record, network: Network, plan: PruningPlan) -> None:
    pruned = prune(network, plan)
    with torch.no_grad():
        got = tensors(pruned(*network.example))
    record["cut"] = True
    random = randomised(network.graph, 1, 0.3)  # deep networks of unit gain are chaotic: rounding alone moves them
    inputs = tuple(x.double() if x.is_floating_point() else x for x in network.example)
    keep = torch.from_numpy(kept_units(network.topology, plan))
    with torch.no_grad():
        masked = tensors(MaskedRun(random, network.readers, keep).run(*inputs))
        got = tensors(carry_out(random, resolve(network.topology, plan))(*inputs))
    worst = max(float((a - b).abs().max() / (1 + a.abs().max())) for a, b in zip(masked, got, strict=True))
    record["cut_difference"] = worst
    record["cut_equal"] = worst < 1e-8
    pruned.train()
    wide = tuple(torch.cat([x, x.flip(-1)]) for x in network.example)
    optimizer = torch.optim.SGD(pruned.parameters(), 1e-3)
    loss = sum(t.square().mean() for t in tensors(pruned(*wide)) if t.is_floating_point())
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    record["trained"] = True


def _onnx(record: Record, network: Network, plan: PruningPlan, folder: Path) -> None:
    specs = tuple(
        InputSpec(name=f"input_{i}", shape=tuple(x.shape), dtype="float32") for i, x in enumerate(network.example)
    )
    pruned = prune(network, plan)
    with redirect_stdout(io.StringIO()):  # torch prints the graph that it cannot export
        export(network.graph, specs, folder / "dense.onnx")
        export(pruned, specs, folder / "pruned.onnx")
    record["exported"] = True
    with torch.no_grad():
        expected = [t.numpy() for t in tensors(pruned(*network.example))]
    got = _run(folder / "pruned.onnx", network.example)
    record["onnx_difference"] = _difference(expected, got)
    record["onnx_equal"] = record["onnx_difference"] < 1e-3
    optimize(folder / "dense.onnx", GraphSpec().passes, folder / "optimized.onnx")
    narrow_file(folder / "optimized.onnx", resolve(network.topology, plan), folder / "narrow.onnx")
    record["narrow_difference"] = _difference(got, _run(folder / "narrow.onnx", network.example))
    record["narrow_equal"] = record["narrow_difference"] < 1e-4


def _run(path: Path, example: tuple[Tensor, ...]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {info.name: x.numpy() for info, x in zip(session.get_inputs(), example, strict=True)}
    return [np.asarray(out) for out in session.run(None, feeds)]


def _difference(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    if [x.shape for x in a] != [y.shape for y in b]:
        return float("inf")
    return max(float(np.abs(x - y).max() / (1e-6 + np.abs(x).max())) for x, y in zip(a, b, strict=True))


# --- the table -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--family", default="torchvision", choices=sorted(families()))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--limit", type=float, default=120, help="seconds for one network")
    parser.add_argument("--again", action="store_true", help="run networks that are in the table already")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--one", action="store_true", help="run one network here and print its line")
    args = parser.parse_args()
    if args.report:
        print(report(load()))
    elif args.one:
        torch.set_num_threads(1)
        print(json.dumps(judge(args.family, args.names[0], args.size)))
    else:
        torch.set_num_threads(1)
        for name in args.names or families()[args.family]():
            if args.again or (args.family, name) not in load():
                keep(_apart(args.family, name, args.size, args.limit))


def _apart(family: str, name: str, size: int, limit: float) -> dict[str, Any]:
    """One network in a process of its own, forked so that the libraries are loaded once."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    start = time.perf_counter()
    child = fork.Process(target=_send, args=(theirs, family, name, size), daemon=True)
    child.start()
    theirs.close()
    row: dict[str, Any] = {"family": family, "name": name, "failed": f"more than {limit:.0f} s"}
    if ours.poll(limit):
        try:
            row = ours.recv()
        except EOFError:
            child.join()
            row["failed"] = f"ended with {child.exitcode}"
    else:
        child.kill()
    child.join()
    return row | {"total_s": round(time.perf_counter() - start, 1)}


def _send(pipe: Connection, family: str, name: str, size: int) -> None:
    try:
        row = dict(judge(family, name, size))
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the result
        row = {"family": family, "name": name, "failed": f"{type(error).__name__}: {error}"[:300]}
    pipe.send(row)
    pipe.close()


def load() -> dict[tuple[str, str], dict[str, Any]]:
    """The table as it is stored, the last line of a network counts."""
    if not RESULTS.exists():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines() if line.strip()]
    return {(row["family"], row["name"]): row for row in rows}


def keep(row: dict[str, Any]) -> None:
    """Write one line in the place of the network's older one, and show it in short."""
    rows = load() | {(row["family"], row["name"]): row}
    fresh = RESULTS.with_suffix(".new")  # a run that is stopped here leaves the table whole
    fresh.write_text("".join(json.dumps(r, sort_keys=True) + "\n" for _, r in sorted(rows.items())))
    fresh.replace(RESULTS)
    errors = {key: value for key, value in row.items() if key.endswith("_error") or key == "failed"}
    short = {key: row.get(key) for key in ("offered", "macs_removed_at_30", "macs_touched", "cut_equal", "onnx_equal")}
    print(f"{row['name']:32} {row.get('total_s', 0):6} s  {short}  narrow {row.get('narrow_equal')}", flush=True)
    for key, value in (row.get("leaves") or {}).items():
        print(f"      leaf {key}: {value}")
    if row.get("refuted"):
        print(f"      refuted {row['refuted']}")
    for key, value in errors.items():
        print(f"      {key}: {value}", flush=True)


def report(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Counts over every family, and what freezes most."""
    lines = []
    for family in sorted({family for family, _ in rows}):
        own = [row for (f, _), row in rows.items() if f == family]
        done = [row for row in own if row.get("captured")]
        pruned = [row for row in done if row.get("offered")]
        counts = {
            "tried": len(own),
            "captured": len(done),
            "with groups": len(pruned),
            "no group refuted": sum(not row["refuted"] for row in pruned),
            "cut equal": sum(bool(row.get("cut_equal")) for row in pruned),
            "trained": sum(bool(row.get("trained")) for row in pruned),
            "exported equal": sum(bool(row.get("onnx_equal")) for row in pruned),
            "narrowed equal": sum(bool(row.get("narrow_equal")) for row in pruned),
        }
        lines.append(f"{family}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        for key in ("macs_removed_at_30", "macs_removed_at_all", "macs_touched"):
            values = [row[key] for row in pruned if key in row]
            if values:
                lines.append(f"  {key}: median {np.median(values):.3f}, lowest {min(values):.3f}")
        reasons: Counter[str] = Counter()
        for row in done:
            reasons.update(list(row.get("frozen", {})))
        lines += [f"  {count:4} networks: {reason}" for reason, count in reasons.most_common(12)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
