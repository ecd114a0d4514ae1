"""The last layer: what mixes channels last on the way to the first output."""

from torch import Tensor, fx, nn

from pipeline.last_layer import last_layer


class Outputs(nn.Module):
    """A head, a depthwise convolution behind it, and a second output that is computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.each = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, groups=4)
        self.beside = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.body(x)
        return self.each(self.head(maps)), self.beside(maps.mean((2, 3)))


def test_it_leads_to_the_first_output_and_mixes_channels():
    last = last_layer(fx.symbolic_trace(Outputs()))
    assert last is not None and last.target == "head"


def test_a_network_of_other_operators_has_none():
    assert last_layer(fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))) is None
    assert last_layer(fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()))) is not None
