"""An encoder: a plain module class."""

from itertools import pairwise

from torch import nn


class GatedLayers(nn.Sequential):
    """Linear layers whose output is multiplied by a gate of their own.

    Its children are the stages of the encoder: `network.stem` of them are shared. The other arguments are the keys
    of `network.options`.

    Args:
        spec: The input, a `dmtg_core.InputSpec`. An argument of this name is passed if there is one.
        width: Features of each layer.
        depth: Number of layers.
    """

    def __init__(self, spec, width: int = 16, depth: int = 2) -> None:
        sizes = [spec.shape[0]] + [width] * depth
        super().__init__(*(nn.Sequential(nn.Linear(a, 2 * b), nn.GLU(dim=1)) for a, b in pairwise(sizes)))
