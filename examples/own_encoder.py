"""Train with an encoder of your own: a function that gives stages, and one line in `ENCODERS`.

    python examples/own_encoder.py

The problem is planted, so the true groups are known and can be compared with. Features pass through sines of
learned frequencies first, since the labels are waves.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dmtg_core import ENCODERS, ArrayData, EncoderSpec, GroupingNetwork, NetworkSpec, TrainSettings, evaluate, fit
from dmtg_core.evaluation.planted import planted


class Waves(nn.Module):
    """Features beside sines of weighted sums of them: `(B, F)` to `(B, F + W)`."""

    def __init__(self, features: int, waves: int) -> None:
        super().__init__()
        self.phase = nn.Linear(features, waves)

    def forward(self, x: Tensor) -> Tensor:
        """The features and their waves."""
        return torch.cat([x, torch.sin(self.phase(x))], dim=1)


def wavy_mlp(spec, *, waves: int = 16, widths: Sequence[int] = (16, 4)) -> list[nn.Module]:
    """The waves are one stage, which a stem can share; then a stage for each width."""
    sizes = [spec.shape[0] + waves, *widths]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
    return [Waves(spec.shape[0], waves), *layers]


def main(rows: int = 4000, epochs: int = 40) -> None:
    """Both encoders on the same problem."""
    torch.set_num_threads(1)  # tensors this small only wait for each other's threads
    ENCODERS["wavy_mlp"] = (wavy_mlp, "features")
    spec, tasks, splits, truth = planted(0, rows=rows)
    data = ArrayData(splits, tasks)
    settings = TrainSettings(epochs=epochs, batch_size=128, learning_rate=0.01, search_share=0.25)
    for encoder in (
        EncoderSpec("mlp", options={"widths": [16, 4]}),
        EncoderSpec("wavy_mlp", stem=1, options={"waves": 16, "widths": [16, 4]}),
    ):
        state = fit(GroupingNetwork(NetworkSpec(spec, tasks, encoder, groups=3)), data, settings)
        metrics = evaluate(state.network, data, "test")
        accuracy = sum(values["accuracy"] for values in metrics.values()) / len(metrics)
        agreement = state.network.grouping().adjusted_rand_index(truth)
        print(f"{encoder.name}: accuracy {accuracy:.3f}, agreement with the true groups {agreement:.2f}")


if __name__ == "__main__":
    main()
