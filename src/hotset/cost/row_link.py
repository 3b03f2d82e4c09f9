"""When missed rows of hot requests come over the link in a step, layer by layer. Imports no torch.

One row after another comes, in the order in which layers ask for them. A layer waits for its own
rows, and other layers compute meanwhile: those with experts for long, dense ones hardly at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GroupRows:
    """What the layers that share a selection ask of the link, in seconds.

    Attributes:
        layers_s: that each layer computes.
        selected_s: rows of the layer that selects, which waits for them.
        behind_s: by a later layer, rows of it and of layers after it, for which it waits.
        scoring_s: that the first layer computes for a guess, while its own rows come.
        guessed_s: rows of the next layer that selects, as it is guessed to.
    """

    layers_s: Sequence[float]
    selected_s: float
    behind_s: Mapping[int, float] = field(default_factory=dict)
    scoring_s: float = 0.0
    guessed_s: float = 0.0

    @property
    def link_s(self) -> float:
        """All rows."""
        return self.selected_s + sum(self.behind_s.values()) + self.guessed_s


def waiting_s(groups: Sequence[GroupRows]) -> float:
    """Seconds of a step in which layers wait for rows and nothing is computed."""
    now_s = link_s = computed_s = 0.0
    for group in groups:
        link_s = max(link_s, now_s) + group.selected_s
        rows_at_s = {0: link_s}
        for layer, behind_s in group.behind_s.items():
            link_s += behind_s
            rows_at_s[layer] = link_s
        now_s += group.scoring_s
        for layer, layer_s in enumerate(group.layers_s):
            now_s = max(now_s, rows_at_s.get(layer, 0.0))
            if layer == 0 and group.guessed_s:
                link_s = max(link_s, now_s) + group.guessed_s
            now_s += layer_s
        computed_s += group.scoring_s + sum(group.layers_s)
    return now_s - computed_s
