"""Train with your own encoder.

    python examples/own_encoder.py

An encoder is a function that returns a list of stages. One line in `ENCODERS` registers it. The problem is
planted: the true groups are known, and the script compares the result with them. The labels are waves. The first
stage of the encoder therefore computes sines of the features with learned frequencies.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dmtg_core import ENCODERS, ArrayData, EncoderSpec, GroupingNetwork, NetworkSpec, TrainSettings, evaluate, fit
from dmtg_core.evaluation.planted import planted


class Waves(nn.Module):
    """Concatenate the features with sines of weighted sums of the features: `(B, F)` to `(B, F + W)`."""

    def __init__(self, features: int, waves: int) -> None:
        super().__init__()
        self.phase = nn.Linear(features, waves)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features and their waves."""
        return torch.cat([x, torch.sin(self.phase(x))], dim=1)


def wavy_mlp(spec, *, waves: int = 16, widths: Sequence[int] = (16, 4)) -> list[nn.Module]:
    """Return one stage for the waves, which a stem can share, and one stage for each width."""
    sizes = [spec.shape[0] + waves, *widths]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
    return [Waves(spec.shape[0], waves), *layers]


def main(rows: int = 4000, epochs: int = 40) -> None:
    """Train both encoders on the same problem and print their accuracy."""
    torch.set_num_threads(1)  # more threads slow down operations on tensors this small
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
