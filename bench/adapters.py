"""Adapters of one text encoder: K in one pass beside one, beside the adapters of PEFT, and stored outputs.

The encoder has the size of MiniLM: six layers of 384 features. Its weights are random, which does not change the
time.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.processes import own_peak_mib
from dmtg_core import Arrays, Batch, EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec, Task
from dmtg_core.search.baselines import hard_network, together
from dmtg_core.training.context import LocalContext
from dmtg_core.training.data import ArrayData, with_outputs
from dmtg_core.training.loop import advance
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState
from dmtg_core.training.step import WeighedLoss, prepare_network, step_noise, train_step

MINILM = {
    "model_type": "bert", "vocab_size": 30_522, "hidden_size": 384, "num_hidden_layers": 6,
    "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
TASKS = tuple(Task(f"task_{n}", "binary") for n in range(8))
TOKENS = InputSpec("tokens", (32,), "uint16", vocabulary=30_522)
SAMPLES, STEPS, RANK = 8, 2, 8


def minilm(groups: int, layers: int = 3) -> NetworkSpec:
    """The network with adapters in the last layers."""
    encoder = EncoderSpec("transformers", 7 - layers, {"config": MINILM}, "lora", {"rank": RANK})
    return NetworkSpec(TOKENS, TASKS, encoder, groups)


def _arrays(rows: int, length: int = 32) -> Arrays:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 30_522, (rows, length), generator=generator)
    labels = {
        task.name: torch.randint(0, 2, (rows,), generator=generator).numpy().astype("uint8") for task in TASKS
    }
    return Arrays(ids.numpy().astype("uint16"), labels, {})


def _batch() -> Batch:
    return next(ArrayData({"train": _arrays(SAMPLES)}, TASKS).train(0, SAMPLES))


def _step(groups: int) -> Callable[[], object]:
    settings, context = TrainSettings(), LocalContext(device="cpu")
    state, batch = TrainState.fresh(GroupingNetwork(minilm(groups)), settings), _batch()
    prepare_network(state.network, settings, context)
    module = WeighedLoss(state.network).train()
    noise = step_noise(state.network, settings, 0, 0, SAMPLES)
    return lambda: train_step(module, state.optimizer, batch, noise, 1.0, settings, context)


def _seconds(step: Callable[[], object]) -> Callable[[], float]:
    def measured() -> float:
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        return (time.perf_counter() - started) / STEPS

    return measured


def adapters_k4_over_k1() -> tuple[Any, ...]:
    """Seconds of a training step with four adapters, and with one."""
    return _seconds(_step(4)), _seconds(_step(1))


def _peak(groups: int) -> float:
    step = _step(groups)
    step(), step()
    return own_peak_mib()


def _memory(groups: int) -> Callable[[], float]:
    def measured() -> float:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(_peak, groups).result()

    return measured


def adapters_memory() -> tuple[Any, ...]:
    """Peak memory in MiB of a process that trains four adapters, and of one that trains one."""
    return _memory(4), _memory(1)


class Peft(nn.Module):
    """Four adapters of PEFT on the same encoder, one after the other, with their heads."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        import peft
        import transformers

        base = transformers.BertModel(transformers.BertConfig(**MINILM), add_pooling_layer=False)
        layers = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
        config = peft.LoraConfig(r=RANK, lora_alpha=16, layers_to_transform=[3, 4, 5], target_modules=layers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = peft.get_peft_model(base, config, "0")
            for k in range(1, groups):
                self.model.add_adapter(str(k), config)
        self.heads = nn.ModuleList([nn.Linear(384, len(TASKS)) for _ in range(groups)])

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `(B, L)` to logits of all branches `(K, B, N)`."""
        out = []
        for k, head in enumerate(self.heads):
            self.model.set_adapter(str(k))
            tokens = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            out.append(head(tokens.mean(1)))
        return torch.stack(out)


def _peft_step() -> Callable[[], object]:
    module = Peft(4).train()
    batch = _batch()
    targets = torch.stack([batch.targets[task.name] for task in TASKS], 1)
    # each switch changes which parameters are trained
    learned = [p for name, p in module.named_parameters() if "lora_" in name or name.startswith("heads.")]
    optimizer = torch.optim.Adam(learned, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        logits = module(batch.inputs.long())
        nn.functional.binary_cross_entropy_with_logits(logits, targets.expand_as(logits)).backward()
        optimizer.step()

    return step


def adapters_batched_over_loop() -> tuple[Any, ...]:
    """Seconds of a training step with four adapters in one pass, and with PEFT one after the other."""
    return _seconds(_step(4)), _seconds(_peft_step())


def trunk_cached() -> tuple[Any, ...]:
    """Seconds of an epoch of one adapter in the last two layers, with stored outputs of the stem and without."""
    spec = replace(minilm(1, layers=2), groups=1, sampling="fixed")
    settings = TrainSettings(epochs=1000, batch_size=16, lr_schedule="constant")
    inputs = {"train": _arrays(48), "val": _arrays(16)}
    network = GroupingNetwork(spec)
    stored = {name: with_outputs(arrays, network.eval().stored_output, 16) for name, arrays in inputs.items()}

    def epoch(splits: dict[str, Arrays]) -> Callable[[], float]:
        data, context = ArrayData(splits, TASKS), LocalContext(device="cpu")
        state = TrainState.fresh(hard_network(spec, together(spec)), settings)

        def measured() -> float:
            started = time.perf_counter()
            advance(state, data, settings, context, until=state.epoch + 1)
            return time.perf_counter() - started

        return measured

    return epoch(stored), epoch(inputs)


def _lengths_step(*, by_length: bool) -> Callable[[], object]:
    """A step of four adapters on 32 texts of 4 to 48 tokens, whose mean is that of short comments, 19."""
    settings, context = TrainSettings(), LocalContext(device="cpu")
    spec = replace(minilm(4, layers=2), input=replace(TOKENS, shape=(48,)))
    arrays, rng = _arrays(32, 48), np.random.default_rng(0)
    long = np.clip(rng.gamma(3.0, 5.5, 32) + 2.5, 4, 48).astype(int)
    ids = np.where(np.arange(48) < long[:, None], arrays.inputs, 0).astype("uint16")
    state = TrainState.fresh(GroupingNetwork(spec), settings)
    batch = next(ArrayData({"train": replace(arrays, inputs=ids)}, TASKS).train(0, 32))
    batch = replace(batch, inputs=state.network.stored_output(batch.inputs))
    prepare_network(state.network, settings, context)
    state.network.by_length = by_length
    module = WeighedLoss(state.network).train()
    noise = step_noise(state.network, settings, 0, 0, 32)
    return lambda: train_step(module, state.optimizer, batch, noise, 1.0, settings, context)


def texts_by_length() -> tuple[Any, ...]:
    """Seconds of a step with texts of similar length together, and with all as long as the longest."""
    return _seconds(_lengths_step(by_length=True)), _seconds(_lengths_step(by_length=False))


# name → (bound, value, function that returns numerator and denominator of the ratio)
ROWS: dict[str, tuple[str, float, Callable[[], Any]]] = {
    "adapters_k4_over_k1": ("at_most", 2.2, adapters_k4_over_k1),
    "adapters_memory": ("at_most", 1.3, adapters_memory),
    "adapters_batched_over_loop": ("at_most", 0.7, adapters_batched_over_loop),
    "trunk_cached": ("at_most", 0.5, trunk_cached),
    "texts_by_length": ("at_most", 0.8, texts_by_length),
}
