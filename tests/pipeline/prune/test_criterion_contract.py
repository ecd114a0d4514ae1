import pytest
import torch
from prune_nets import NETS, example

from pipeline.prune.capture import capture
from pipeline.prune.criteria.base import PACKAGE
from pipeline.prune.evidence import Evidence, Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.ranking import rank
from profiles import plugins
from profiles.errors import UsageError


@pytest.mark.parametrize("name", plugins.names(PACKAGE))
def test_a_criterion_ranks_every_unit_of_every_offered_group_once(name):
    torch.manual_seed(0)
    network = find_groups(capture(NETS["residual pad"](), example()))
    inputs = torch.randn(8, 3, 8, 8)
    evidence = Evidence(network, Samples([(inputs,)], torch.arange(8) % 5))
    rankings = rank(evidence, name)
    assert set(rankings) == {group.id for group in network.topology.offered}
    for group in network.topology.offered:
        ranking = rankings[group.id]
        assert sorted(ranking.removal_order) == list(range(group.size))
        assert len(ranking.marginal_loss) == group.size and min(ranking.marginal_loss) >= 0
        assert ranking.keep(group.size) == tuple(range(group.size))
    assert rank(evidence, name) == rankings


def test_an_unknown_criterion_names_its_near_miss():
    network = find_groups(capture(NETS["chain"](), example()))
    with pytest.raises(UsageError, match=r"^no criterion named 'fischer'\. Did you mean 'fisher'\?"):
        rank(Evidence(network, Samples([(torch.zeros(2, 3, 8, 8),)])), "fischer")
