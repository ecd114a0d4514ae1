"""Random networks over all rules: what is captured is the network, and masked equals cut, always."""

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.nouns import KeepUnits, PruningPlan
from pipeline.outputs import tensors
from pipeline.prune import proof
from pipeline.prune.capture import Network, capture
from pipeline.prune.execute import MaskedRun
from pipeline.prune.groups import find_groups
from pipeline.prune.neutral import describe
from pipeline.prune.plan import kept_units, resolve
from pipeline.prune.rules.base import rules
from pipeline.prune.surgery import carry_out

KINDS = (
    "conv", "depthwise", "grouped", "transposed", "batch", "group", "layer", "instance", "prelu", "gate", "spatial",
    "residual", "concat", "split", "shuffle", "pixel", "pool", "resize", "attention", "crosscov", "window", "scale",
    "pad", "einsum", "embedding", "expand", "glu", "lookup", "product", "repeat", "rms", "select", "slice", "squeeze",
    "stack", "unfold", "shared",
)  # fmt: skip
SIDE = 4


class Step(nn.Module):
    """One operation on a map of `width` channels (a multiple of four) that gives one of the same shape."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        c = width
        if kind in ("conv", "residual"):
            self.conv = nn.Conv2d(c, c, 3, 1, 1)
        elif kind in ("depthwise", "grouped"):
            self.conv = nn.Conv2d(c, c, 3, 1, 1, groups=c if kind == "depthwise" else 2)
        elif kind == "transposed":
            self.conv = nn.ConvTranspose2d(c, c, 3, 1, 1, groups=2)
        elif kind in ("batch", "group", "layer", "instance"):
            self.norm = {
                "batch": lambda: nn.BatchNorm2d(c), "group": lambda: nn.GroupNorm(2, c),
                "layer": lambda: nn.LayerNorm(c), "instance": lambda: nn.InstanceNorm2d(c),
            }[kind]()  # fmt: skip
        elif kind == "prelu":
            self.act = nn.PReLU(c)
        elif kind == "gate":
            self.down, self.up = nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)
        elif kind == "spatial":
            self.conv = nn.Conv2d(2, 1, 3, 1, 1)
        elif kind == "concat":
            self.one, self.two = nn.Conv2d(c, c, 1), nn.Conv2d(2 * c, c, 1)
        elif kind == "split":
            self.part, self.join = nn.Conv2d(c // 2, c // 2, 1), nn.Conv2d(c, c, 1)
        elif kind == "pixel":
            self.up, self.down = nn.Conv2d(c, 4 * c, 1), nn.Conv2d(c, c, 2, 2)
        elif kind in ("attention", "crosscov", "window"):
            self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
        elif kind == "scale":
            self.gamma = nn.Parameter(torch.ones(1, c, 1, 1))
        else:
            self.more(kind, c)

    def more(self, kind: str, c: int) -> None:
        if kind in ("stack", "shared"):
            self.conv = nn.Conv2d(c, c, 3, 1, 1)
        elif kind == "pad":
            self.conv = nn.Conv2d(c, c // 2, 1)
        elif kind == "glu":
            self.conv = nn.Conv2d(c, 2 * c, 1)
        elif kind in ("repeat", "unfold", "expand"):
            self.conv = nn.Conv2d((9 if kind == "unfold" else 2) * c, c, 1)
            self.token = nn.Parameter(torch.randn(1, c, 1, 1))
        elif kind == "embedding":
            self.table = nn.Embedding(SIDE, c)
        elif kind == "lookup":
            self.table = nn.Parameter(torch.randn(3, c))
            self.register_buffer("index", torch.arange(SIDE * SIDE) % 3)
        elif kind == "product":
            self.weight, self.bias = nn.Parameter(torch.randn(c, c)), nn.Parameter(torch.randn(c))
        elif kind == "rms":
            self.norm = nn.RMSNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        kind, (n, c, h, w) = self.kind, x.shape
        if kind in ("conv", "depthwise", "grouped", "transposed"):
            return F.relu(self.conv(x))
        if kind in ("batch", "group", "instance"):
            return self.norm(x)
        if kind in ("layer", "rms"):
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if kind == "prelu":
            return self.act(x)
        if kind == "gate":
            return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        if kind == "spatial":
            return x * torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))
        if kind == "residual":
            return x + self.conv(x)
        if kind == "concat":
            return self.two(torch.cat([x, self.one(x)], 1))
        if kind == "split":
            left, right = x.chunk(2, 1)
            return self.join(torch.cat([right, self.part(left)], 1))
        if kind == "shuffle":
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if kind == "pixel":
            return self.down(F.pixel_shuffle(self.up(x), 2))
        if kind == "pool":
            return F.max_pool2d(x, 3, 1, 1)
        if kind == "resize":
            return F.interpolate(F.avg_pool2d(x, 2), size=(h, w), mode="nearest")
        if kind in ("attention", "crosscov", "window"):
            return self.mix(x)
        return x * self.gamma if kind == "scale" else self.moved(x)

    def moved(self, x: Tensor) -> Tensor:
        kind, (n, c, h, w) = self.kind, x.shape
        if kind == "pad":
            return x + F.pad(self.conv(x), (0, 0, 0, 0, c // 4, c // 4))
        if kind == "einsum":
            return x * torch.einsum("nchw,nchw->nhw", x, x).sigmoid().unsqueeze(1)
        if kind == "embedding":
            return x + self.table(torch.arange(w)).transpose(0, 1).unsqueeze(1)
        if kind == "expand":
            return self.conv(torch.cat([x, self.token.expand(n, -1, h, w)], 1))
        if kind == "glu":
            return F.glu(self.conv(x), 1)
        if kind == "lookup":
            return x + self.table[self.index].transpose(0, 1).reshape(c, h, w)
        if kind == "product":
            return F.linear(x.permute(0, 2, 3, 1), self.weight * 0.5, self.bias).permute(0, 3, 1, 2)
        if kind == "repeat":
            return self.conv(x.repeat(1, 2, 1, 1))
        if kind == "select":
            return x + x[:, :, 0].unsqueeze(2)
        if kind == "slice":
            return torch.cat([x[:, c // 2 :], x[:, : c // 2]], 1)
        if kind == "squeeze":
            return x * x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1).sigmoid().unsqueeze(-1).unsqueeze(-1)
        if kind == "stack":
            return torch.stack([x, self.conv(x)], 2).sum(2)
        if kind == "unfold":
            return self.conv(F.unfold(x, 3, padding=1).view(n, 9 * c, h, w))
        return self.conv(F.relu(self.conv(x)))

    def mix(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        if self.kind == "window":
            tokens = x.permute(0, 2, 3, 1).view(n, 2, h // 2, 2, w // 2, c).transpose(2, 3).reshape(-1, h * w // 4, c)
        q, k, v = self.qkv(tokens).reshape(tokens.shape[0], tokens.shape[1], 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        if self.kind == "crosscov":
            y = v @ (F.normalize(q, dim=-2).transpose(-2, -1) @ F.normalize(k, dim=-2)).softmax(-1).transpose(-2, -1)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(y.transpose(1, 2).reshape(tokens.shape))
        if self.kind == "window":
            y = y.view(n, 2, 2, h // 2, w // 2, c).transpose(2, 3).reshape(n, h * w, c)
        return x + y.transpose(1, 2).reshape(n, c, h, w)


class Drawn(nn.Module):
    """A stem, steps in a row with skips over some of them, a classifier; several: maps of every step as outputs too."""

    def __init__(self, width: int, kinds: list[str], skips: list[bool], *, several: bool = False) -> None:
        super().__init__()
        self.aux = nn.Conv2d(width, 2, 1) if several else None
        self.stem, self.head, self.skips = nn.Conv2d(3, width, 3, 1, 1), nn.Linear(width, 3), skips
        self.steps = nn.ModuleList(Step(kind, width) for kind in kinds)

    def forward(self, x: Tensor) -> object:
        x, maps = self.stem(x), []
        for step, skip in zip(self.steps, self.skips, strict=True):
            x = x + step(x) if skip else step(x)
            maps.append(x)
        logits = self.head(x.mean((2, 3)))
        return logits if self.aux is None else {"logits": logits, "maps": [self.aux(each) for each in maps]}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([4, 8]),
    st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_network_of_these_operations_is_captured_proved_and_cut_right(width, steps, several):
    torch.manual_seed(0)
    model = Drawn(width, [kind for kind, _ in steps], [skip for _, skip in steps], several=several).eval()
    example = (torch.randn(1, 3, SIDE, SIDE),)
    network = find_groups(capture(model, example), prove=False)
    x = torch.randn(2, 3, SIDE, SIDE)
    for given_one, found in zip(tensors(model(x)), tensors(network.graph(x)), strict=True):
        assert torch.allclose(found, given_one, atol=1e-3, rtol=1e-3)
    reasons = proof.refute(network)
    names = {group.id: group.name for group in network.topology.groups}
    assert {names.get(id, id): why for id, why in reasons.items() if why != "the outputs do not react to it"} == {}
    edits = [
        KeepUnits(group.id, tuple(range(group.size // 2, group.size)))
        for group in network.topology.offered
        if group.size > 1
    ]
    plan = PruningPlan(tuple(edits))
    random = proof.randomised(network.graph, 1)
    keep = torch.from_numpy(kept_units(network.topology, plan))
    with torch.no_grad():
        masked = tensors(MaskedRun(random, network.readers, keep).run(x.double()))
        got = tensors(carry_out(random, resolve(network.topology, plan))(x.double()))
    for a, b in zip(masked, got, strict=True):
        assert float((a - b).abs().max() / (1 + a.abs().max())) < 1e-8


@cache
def alone(kind: str) -> Network:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Step(kind, 8), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 2))
    return capture(model.eval(), (torch.randn(1, 3, SIDE, SIDE),))


def test_the_steps_make_every_kind_of_operator_that_has_a_rule():
    assert set(rules()) - {op.kind for kind in KINDS for op in describe(alone(kind))} == set()


def test_every_kind_of_step_leaves_something_to_prune():
    for kind in KINDS:
        network = find_groups(alone(kind))
        frozen = [(g.name, g.frozen) for g in network.topology.groups if g.frozen]
        assert any("0.weight[0]" in g.members for g in network.topology.offered), (kind, frozen)
