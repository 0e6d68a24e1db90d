"""The metrics that training and nightly runs emit. All of them are gauges.

The names follow Prometheus: base units, with the unit at the end. Ray's endpoint has them with `ray_` in front.
`cluster/monitoring/` reads them, and a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

RUN, STAGE, TASK, PART, MODEL = "run", "stage", "task", "part", "model"


@dataclass(frozen=True)
class Metric:
    """A metric.

    Args:
        name: Its name in Prometheus.
        unit: Its unit as OpenTelemetry writes it: `s`, `By`, `%`, or `1` for a number without one.
        description: One sentence.
        labels: The labels of its series.
    """

    name: str
    unit: str
    description: str
    labels: tuple[str, ...]


EPOCH = Metric("dmtg_epoch", "1", "Epochs of the stage that have ended.", (RUN, STAGE))
TRAIN_LOSS = Metric(
    "dmtg_train_loss", "1", "Mean training loss of the task in the last epoch.", (RUN, STAGE, TASK)
)
VALIDATION_LOSS = Metric(
    "dmtg_validation_loss", "1", "Validation loss of the task after the last epoch.", (RUN, STAGE, TASK)
)
SCORE = Metric(
    "dmtg_validation_score", "1", "Validation score after the last epoch; lower is better.", (RUN, STAGE)
)
GAIN = Metric(
    "dmtg_gain_percent", "%", "Gain of the last epoch over naive MTL on validation data in per cent; positive is "
    "better.", (RUN, STAGE),
)  # fmt: skip
ENTROPY = Metric(
    "dmtg_gate_entropy_ratio", "1", "Entropy of the gate as a share of the largest: 1 uniform, 0 converged.",
    (RUN, STAGE),
)  # fmt: skip
GROUPS = Metric("dmtg_groups", "1", "Groups of the likeliest branches of the tasks.", (RUN, STAGE))
SAMPLES = Metric(
    "dmtg_samples_per_second", "1/s", "Training samples per second of all workers in the last epoch.", (RUN, STAGE)
)
WAITING = Metric(
    "dmtg_data_wait_ratio", "1", "Share of the last epoch that worker 0 waited for data.", (RUN, STAGE)
)
STEP = Metric(
    "dmtg_step_seconds", "s", "Time of a part of a training step, from the profile of the run (dmtg train "
    "--profile).", (RUN, PART),
)  # fmt: skip
CHECKPOINT = Metric(
    "dmtg_checkpoint_seconds", "s", "Time of the last checkpoint, from its start until it is in the run folder.",
    (RUN,),
)  # fmt: skip
LOST_WORKERS = Metric(
    "dmtg_lost_workers", "1", "Losses of workers since the run began, also of earlier commands.", (RUN,)
)
GPU_MEMORY = Metric(
    "dmtg_gpu_memory_bytes", "By", "Largest GPU memory of worker 0 since it started; 0 on a CPU.", (RUN,)
)
TRAINING = (
    EPOCH, TRAIN_LOSS, VALIDATION_LOSS, SCORE, GAIN, ENTROPY, GROUPS, SAMPLES, WAITING, STEP, CHECKPOINT,
    LOST_WORKERS, GPU_MEMORY,
)  # fmt: skip

FINISHED = Metric(
    "dmtg_nightly_finished_timestamp_seconds", "s", "Time at which the last nightly run had its verdict.",
    (MODEL,),
)  # fmt: skip
KEPT = Metric(
    "dmtg_nightly_kept_runs", "1", "Nightly runs in a row, the last one included, that kept the champion.",
    (MODEL,),
)  # fmt: skip
CHAMPION = Metric(
    "dmtg_champion_timestamp_seconds", "s", "Time at which the serving champion was registered, in the nightly "
    "run that promoted it.", (MODEL,),
)  # fmt: skip
NIGHTLY = (FINISHED, KEPT, CHAMPION)
