"""The types of a profile: what is asked of which device. Frozen; an unknown key is an error that names its near miss.

A profile is a TOML file in this folder or one of the user's own with `extends = "<profile>"`. Latencies are in
milliseconds; a latency ratio is measured / dense, taken interleaved in one session.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from profiles.errors import UsageError, near_miss

Precision = Literal["fp32", "fp16"]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
SEED = Field(default=0, description="of what is drawn at random")
PERCENTILES = ("p50", "mean", "p90", "p99")
_BUDGET = re.compile(
    r"^\s*(?P<value>[0-9]*\.?[0-9]+(?:[eE][-+]?\d+)?)\s*(?P<unit>ms|us|s|x)\s*(?:@\s*(?P<at>\w+))?\s*$"
)


class Spec(BaseModel):
    """Base of all profile tables: frozen; an unknown key is refused, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class Budget(Spec):
    """A latency limit: absolute (`limit_ms`) or relative to the dense network of the same session (`ratio`).

    Text form: `8ms`, `0.5x`, `0.5x@p90`. At `p50` a relative budget is met when the 99 % upper bound of the
    interleaved ratio is at most `ratio`. Neither, and the text `none`, where none was asked of what is only built.
    """

    limit_ms: float | None = Field(default=None, gt=0)
    ratio: float | None = Field(default=None, gt=0)
    percentile: Literal["p50", "mean", "p90", "p99"] = "p50"

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `8ms`, `0.5x` or `0.5x@p90`; anything else, zero included, is a UsageError."""
        match = _BUDGET.match(text)
        if not match or math.isinf(float(match["value"])):
            raise UsageError(f"budget '{text}' is not a latency.", "write it like 8ms, 0.5x or 0.5x@p90.")
        value = float(match["value"])
        if value <= 0:
            raise UsageError(f"budget '{text}' must be above zero.", "write it like 8ms or 0.5x.")
        at: Any = match["at"] or "p50"
        if at not in PERCENTILES:
            raise UsageError(f"budget '{text}' names the percentile '{at}'. {near_miss(at, PERCENTILES)}")
        if match["unit"] == "x":
            return cls(ratio=value, percentile=at)
        return cls(limit_ms=value * {"ms": 1.0, "us": 1e-3, "s": 1e3}[match["unit"]], percentile=at)

    def __str__(self) -> str:
        if self.ratio is None and self.limit_ms is None:
            return "none"
        head = f"{self.ratio:g}x" if self.ratio is not None else f"{self.limit_ms:g}ms"
        return head if self.percentile == "p50" else f"{head}@{self.percentile}"


class InputSpec(Spec):
    """One input of the network, batch axis first."""

    name: str = "input"
    shape: tuple[int, ...] = Field(min_length=1)
    dtype: Literal["float32", "int64"] = "float32"


class PruneSpec(Spec):
    """What may be pruned, how units are ranked and how widths are chosen."""

    criterion: str = Field(default="obs", description="what ranks the channels: deploy list criteria")
    solver: str = Field(default="exact", description="what chooses the widths: deploy list solvers")
    normalise: Literal["none", "macs", "memory", "ms"] = Field(
        default="none", description="what a unit's score is divided by, for solvers that compare scores of groups"
    )
    repair: Literal["none", "bn", "merge", "layerwise", "least-squares"] = Field(
        default="least-squares", description="how the layers behind removed channels make up for them"
    )
    rounds: int = Field(default=4, ge=1, le=32, description="at most so often plans are measured and the table mended")
    min_width: int = Field(default=8, ge=1, description="channels that every group keeps")
    drop_blocks: bool = Field(default=True, description="whole residual blocks may go")
    slack: float = Field(default=0.03, gt=0, lt=1, description="largest part of the budget that may stay unused")
    calibration: int = Field(default=1024, ge=1, description="samples that repair uses; rankings and values use fewer")
    value_widths: int = Field(default=3, ge=1, description="widths per group whose loss is measured")
    grid: int | None = Field(default=None, ge=1, description="width step; measured on the device if left out")
    freeze: tuple[str, ...] = Field(default=(), description="layers that stay as they are, by how their names begin")
    attention: Literal["channels", "heads"] = Field(
        default="channels", description="what goes from an attention: channels inside its heads, or whole heads"
    )
    solver_seconds: float = Field(default=15.0, gt=0, description="after so long the best plan found so far is taken")
    seed: Seed = SEED


class MeasureSpec(Spec):
    """How latency is measured: the protocol of docs/measuring.md. Blocks are interleaved over a session's models."""

    threads: int = Field(default=1, ge=1, description="of the runtime, inside one operator")
    spin: bool = Field(default=False, description="ONNX Runtime's threads spin while they wait, for a GPU too")
    rank_processes: int = Field(default=3, ge=1, description="processes of a session that compares plans in a search")
    rank_rounds: int = Field(default=30, ge=3, description="rounds of each; in a round every model has one block")
    accept_processes: int = Field(default=8, ge=2, description="processes of a session that decides")
    accept_rounds: int = Field(default=60, ge=3, description="rounds of each")
    block_dropped: int = Field(default=4, ge=0, description="inferences at the head of a block that do not count")
    block_timed: int = Field(default=10, ge=1, description="inferences of a block that count, at least")
    block_min_ms: float = Field(default=5.0, ge=0, description="they last so long together, at least")
    least_s: float = Field(
        default=10.0, ge=0, description="deploy measure times each network for so long in all, by longer blocks; 0: off"
    )
    warmup_s: float = Field(default=1.0, ge=0, description="shortest warm-up of a process")
    warmup_inferences: int = Field(default=50, ge=1, description="inferences of it, at least")
    warmup_max_s: float = Field(default=10.0, gt=0, description="after so long an unsteady process begins all the same")
    steady: float = Field(default=0.02, gt=0, description="largest difference of two successive half-second medians")
    max_seconds: float = Field(
        default=300.0, gt=0, description="cap of one session; fewer inferences per block to keep it"
    )
    paced_ms: float | None = Field(
        default=None,
        ge=0.1,
        le=60_000.0,
        description="control period, up to a minute: one inference at each of its ticks; left out, back to back",
    )
    start_below_c: float | None = Field(
        default=None, gt=0, description="a hotter device is not measured; left out, its temperature is only recorded"
    )
    sustained_s: float = Field(
        default=0.0,
        ge=0,
        le=86_400.0,
        description="accepting goes on so long in each network's first process, to show heat; 0: off",
    )
    seed: Seed = SEED

    def lasting(self) -> MeasureSpec:
        """With blocks so long that the accepting processes of a network last `least_s` together; the cap stays."""
        block_ms = 1e3 * self.least_s / (self.accept_processes * self.accept_rounds)
        return self if block_ms <= self.block_min_ms else self.model_copy(update={"block_min_ms": block_ms})


class CheckSpec(Spec):
    """The nightly check: docs/measuring.md. Tolerances are shares of the baseline's latency."""

    fail: float = Field(default=0.02, gt=0, description="a slowdown beyond it fails, when it is shown in both stages")
    fail_low: float = Field(default=0.01, gt=0, description="what a block's 10th percentile must show too for a fail")
    warn: float = Field(default=0.005, gt=0, description="a slowdown beyond it warns")
    control: float = Field(default=0.005, gt=0, description="largest shift of the baseline against itself")
    control_sd: float = Field(default=0.015, gt=0, description="largest scatter of it between processes")
    tail_mean: float = Field(default=0.05, gt=0, description="a mean slower by more fails, when both stages show it")
    tail_p99: float = Field(default=0.25, gt=0, description="a p99 slower by more fails, when both stages show it")
    miss_points: float = Field(default=0.001, gt=0, description="a deadline-miss ratio that rises by more fails")
    screen_processes: int = Field(default=8, ge=3, description="processes of stage 1")
    confirm_processes: int = Field(default=16, ge=3, description="processes of stage 2, which a suspicion asks for")
    rounds: int = Field(default=60, ge=3, description="rounds of each")
    warmup_s: float = Field(default=0.2, ge=0, description="shortest warm-up of a process; two equal halves end it")
    max_seconds: float = Field(
        default=150.0, gt=0, description="cap of screen_processes, more for more; fewer inferences a block to keep it"
    )

    @model_validator(mode="after")
    def _ordered(self) -> CheckSpec:
        for name in ("warn", "fail_low"):
            value = getattr(self, name)
            if value > self.fail:
                raise ValueError(f"{name} is {value:g}, above fail, which is {self.fail:g}; lower it or raise fail")
        return self

    def session(self, measure: MeasureSpec, processes: int, seed: int) -> MeasureSpec:
        """How one stage is measured: the profile's conditions with the check's own counts.

        The cap grows with the processes, so that every process has as long in stage 2 as in stage 1.
        """
        return measure.model_copy(
            update={
                "accept_processes": processes,
                "accept_rounds": self.rounds,
                "warmup_s": self.warmup_s,
                "sustained_s": 0.0,
                "max_seconds": self.max_seconds * processes / self.screen_processes,
                "seed": seed,
            }
        )


class RecoverSpec(Spec):
    """Distillation from the dense network after repair."""

    epochs: int = Field(default=1, ge=0, description="0: nothing is trained")
    max_minutes: float = Field(default=60.0, ge=0, description="the learning rate comes to its end within this time")
    learning_rate: float = Field(default=0.1, gt=0, description="its highest value")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(default=5e-4, ge=0, description="of SGD")
    temperature: float = Field(default=4.0, gt=0, description="of the distillation term")
    alpha: float = Field(default=0.9, ge=0, le=1, description="share of the distillation term")
    patience: int = Field(default=3, ge=1, description="epochs without a better validate before stopping")
    hooks: tuple[str, ...] = Field(default=(), description="what else the training does: deploy list hooks")
    strengths: dict[str, PositiveFloat] = Field(
        default={}, description="what a hook's term is multiplied by, instead of its own: strengths.ccm=0.05"
    )
    seed: Seed = SEED


class PrepareSpec(RecoverSpec):
    """Training of the dense network before it is pruned, and what it grows by before that; off with 0 epochs.

    It ends with its latest weights that score no more than `accuracy.max_drop` below the user's own network: what hooks
    do shows in what can be pruned afterwards, and seldom in the score.
    """

    epochs: int = Field(default=0, ge=0, description="0: the user's network is pruned as it is")
    learning_rate: float = Field(default=0.02, gt=0, description="its highest value")
    alpha: float = Field(default=0.5, ge=0, le=1, description="share of distillation from the user's own network")
    patience: int = Field(default=1000, ge=1, description="epochs without a better validate before stopping")
    grow: bool = Field(default=False, description="grow first, by what the device measures to fit")
    grow_to: float = Field(
        default=1.25, gt=1, description="latency it may grow to: times the user's network's, or the budget if larger"
    )


class GraphSpec(Spec):
    """Which ONNX is written, which passes rewrite it, in order, and which rewrites the device is asked about."""

    opset: int = Field(default=17, ge=11, le=20, description="of the ONNX files; torch's exporter knows up to 20")
    passes: tuple[str, ...] = (
        "fold-constants",
        "drop-identity",
        "drop-dropout",
        "fold-batchnorm",
        "merge-pads",
        "merge-slices",
        "shortcut-conv",
        "dead-ends",
    )
    candidates: tuple[str, ...] = Field(
        default=(), description="rewrites of the final network that are taken where the device measures them faster"
    )
    hash_error: float = Field(
        default=0.0, ge=0, lt=1, description="share by which hashing may change weights for a rewrite; 0: as they are"
    )


class SshSpec(Spec):
    """How a board is reached by OpenSSH, which reads ~/.ssh/config as always: docs/boards.md. Its name is `host`.

    Unknown host keys are refused and nothing is asked.
    """

    python: str = Field(
        default="python3", min_length=1, description="Python 3.6 or later on the board, by name or path"
    )
    folder: str = Field(default="~/.cache/edge-deploy", min_length=1, description="where files and results lie there")
    config: str | None = Field(default=None, description="a file to read instead of ~/.ssh/config")
    options: dict[str, str | int] = Field(
        default={}, description="of ssh_config, as { Port = 2222, ProxyJump = 'gate' }"
    )

    @model_validator(mode="after")
    def _strict(self) -> SshSpec:
        for name in self.options:
            if name.lower() in ("batchmode", "stricthostkeychecking"):
                raise ValueError(f"options sets {name}, which is always yes here; leave it out")
        return self


class JetsonSpec(Spec):
    """What a Jetson is asked for while something is measured on it, and given back afterwards: docs/boards.md.

    modules: p-numbers of the modules that the profile is for, whole (p3767-0005) or the family (p3767).
    """

    modules: tuple[str, ...] = Field(default=(), description="modules the profile is for; empty: any Jetson")
    power_mode: str | None = Field(default=None, description="nvpmodel's name of it; left out, it stays as it is")
    clocks: Literal["as-is", "locked"] = Field(
        default="as-is", description="locked: held by jetson_clocks while something is measured"
    )
    telemetry_ms: int = Field(default=1000, ge=0, description="pause between two readings of power; 0: none")


def _capability(value: Any) -> Any:
    """A compute capability written as a number, 8.6 or 12, as text with one decimal; the rest as it is."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and value == round(value, 1)
    return f"{value:.1f}" if number else value


class TensorRTSpec(Spec):
    """How engines are built, and how they are run and timed, by TensorRT or TensorRT for RTX: docs/boards.md.

    Precision is no key: it is what the ONNX file says. A key that the library at hand does not know is an error.
    """

    workspace_mib: int | None = Field(
        default=None, ge=1, description="largest scratch memory while building; left out, a share of what is free"
    )
    workspace_share: float = Field(default=0.5, gt=0, le=1, description="that share, rounded down to a power of two")
    version_compatible: bool = Field(default=False, description="engines that later versions of the library run too")
    hardware_compatible: Literal["none", "ampere+", "same-compute-capability"] = Field(
        default="none", description="engines that other GPUs run too"
    )
    dla_core: int | None = Field(default=None, ge=0, description="the DLA core that runs what it can, the GPU the rest")
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d$"), BeforeValidator(_capability)] | None = Field(
        default=None, description="as 8.6: of another GPU than this one's; built, not measured"
    )
    optimization_level: int | None = Field(default=None, ge=0, le=5, description="of the builder; left out, its own")
    tf32: bool = Field(default=True, description="float32 products may round their operands to 10 bits, as is usual")
    timing_cache: bool = Field(default=True, description="reuse what was timed on this device by earlier builds")
    cuda_graph: bool = Field(default=False, description="launch the engine as a CUDA graph")
    spin: bool = Field(default=False, description="spin while waiting for the GPU, instead of sleeping")
    copies: bool = Field(default=True, description="an inference includes the copies to the GPU and back")


class Profile(Spec):
    """A device and what is asked of it."""

    name: str = Field(description="left out, the name of the file")
    target: str = Field(description="a file of targets/: local, ssh, jetson, …")
    runtime: str = Field(default="ort", description="a file of targets/runtimes/")
    host: str | None = Field(default=None, description="the board behind SSH, as user@robot-7 or a Host of ssh_config")
    providers: tuple[str, ...] = Field(default=("CPUExecutionProvider",), description="of ONNX Runtime, in order")
    precision: Precision = Field(
        default="fp32", description="of what runs on the device: a rewrite of the graph, never a flag of a builder"
    )
    budget: Budget | None = Field(default=None, description="as '8ms' or '0.5x@p90', for builds without --budget")
    prune: PruneSpec = PruneSpec()
    measure: MeasureSpec = MeasureSpec()
    check: CheckSpec = CheckSpec()
    prepare: PrepareSpec = PrepareSpec()
    recover: RecoverSpec = RecoverSpec()
    graph: GraphSpec = GraphSpec()
    ssh: SshSpec = SshSpec()
    jetson: JetsonSpec = JetsonSpec()
    tensorrt: TensorRTSpec = TensorRTSpec()


def keys(model: type[BaseModel], under: str = "") -> Iterator[tuple[str, str]]:
    """All keys of the tables below a type, as `prune.rounds`, with their defaults as TOML and what they mean."""
    for name, field in model.model_fields.items():
        key = f"{under}{field.alias or name}"
        if isinstance(field.default, Spec):
            yield from keys(type(field.default), f"{key}.")
            continue
        default = "" if field.is_required() or field.default is None else f"{_toml(field.default)}  "
        yield key, f"{default}{field.description or ''}".strip()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{{ {} }}".format(", ".join(f"{k} = {_toml(v)}" for k, v in value.items())) if value else "{}"
    return f'"{value}"' if isinstance(value, str) else f"{value}"


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _complaint(error: ValidationError) -> Any:
    complaints = error.errors()
    return next((each for each in complaints if each["type"] == "extra_forbidden"), complaints[0])


def _holds(table: Any, path: Sequence[str | int]) -> bool:
    """Whether nested tables have a value at this place, or a wrong one on the way to it."""
    for part in path:
        if not isinstance(table, dict):
            return True
        if part not in table:
            return False
        table = table[part]
    return True


def explain(error: ValidationError, model: type[BaseModel], where: str) -> UsageError:
    """Turn pydantic's first complaint (a misspelt key before others) into a sentence with key, value and near miss."""
    first = _complaint(error)
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        table: type[BaseModel] | None = model
        for part in (part for part in path[:-1] if not part.isdigit()):
            kind = _keys(table).get(part) if table else None
            candidates = [kind, *getattr(kind, "__args__", ())]
            table = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        known = list(_keys(table)) if table else []
        return UsageError(f"{where}: no key named '{key}'. {near_miss(path[-1], known)}")
    if first["type"] == "missing":
        return UsageError(f"{where}: the key '{key}' is missing.", f"add '{path[-1]} = …' to {where}.")
    if first["type"] == "value_error":
        return UsageError(f"{where}: {'.'.join([*path, str(first['ctx']['error'])])}.")
    value = first.get("input")
    kind = "a string" if isinstance(value, str) else "a table" if isinstance(value, dict) else "a value"
    return UsageError(f"{where}: {key} is {value!r}, {kind}; {first['msg'][0].lower()}{first['msg'][1:]}.")


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; what is missing or malformed is a UsageError that names the place."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file '{path}'.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from None


def profile_names() -> list[str]:
    """Names of the profiles that come with the product."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.toml"))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _resolve(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    """The tables of a profile with those that it extends below them. seen: the profiles that led here."""
    asked = f"{seen[-1]} extends '{name}', and " if seen else ""
    if name in seen:
        raise UsageError(f"profiles extend each other in a circle: {' -> '.join((*seen, name))}.")
    path = Path(name) if name.endswith(".toml") else Path(__file__).parent / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise UsageError(f"{asked}there is no profile file '{name}'.", "deploy list profiles")
        known = near_miss(name, profile_names())
        raise UsageError(
            f"{asked}{'there is ' if asked else ''}no target named '{name}'. {known}", "deploy list profiles"
        )
    table = read_toml(path)
    table.setdefault("name", path.stem)
    parent = table.pop("extends", None)
    return _merge(_resolve(str(parent), (*seen, name)), table) if parent else table


def load_profile(name: str, overrides: dict[str, Any] | None = None) -> Profile:
    """A profile by name or by path of a user's own TOML file, with `extends` resolved and overrides applied.

    overrides: nested tables with the same keys as the file, e.g. {"prune": {"solver": "uniform"}}.
    Raises UsageError for an unknown name, key or value.
    """
    table = _merge(_resolve(name, ()), overrides or {})
    if isinstance(table.get("budget"), str):
        table["budget"] = Budget.parse(table["budget"]).model_dump()
    try:
        return Profile.model_validate(table)
    except ValidationError as error:
        where = name if name.endswith(".toml") else f"profiles/{name}.toml"
        if overrides and _holds(overrides, _complaint(error)["loc"]):
            where = "the command line"
        raise explain(error, Profile, where) from None
