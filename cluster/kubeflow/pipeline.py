"""The nightly run as a Kubeflow pipeline: shard → sweep → regroup, each a `dmtg` command.

A step runs its command in its own pod. If it gets the address of a Ray cluster's dashboard, it submits the command
there. Steps pass on addresses, so all of them must reach the same storage. The script needs kfp in an environment
of its own, because kfp needs an older protobuf than the lock file has:

    python cluster/kubeflow/pipeline.py                                      # writes pipeline.yaml beside it
    python cluster/kubeflow/pipeline.py --host https://kubeflow.example.org  # and schedules it every night
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from kfp import Client, compiler, dsl

IMAGE = "dmtg-kubeflow:0.1.0"
COMPILED = Path(__file__).with_name("pipeline.yaml")
EVERY_NIGHT = "0 15 2 * * *"  # six fields: Kubeflow's begin with the seconds


# kfp takes the source of this function into the compiled pipeline, so everything that it needs stands within it.
@dsl.component(base_image=IMAGE, install_kfp_package=False)
def dmtg(
    command: str,
    config: str,
    words: list,
    gives: str,
    cluster: str,
    date: str = "",
    given: str = "",
    word: str = "",
) -> NamedTuple("Outputs", [("found", dict), ("address", str), ("night", str)]):  # type: ignore[valid-type]
    """Run one `dmtg` command.

    Args:
        command: Such as `train`.
        config: What -c names; empty for what is `given`.
        words: section.key=value, and options.
        gives: Key of the command's JSON object whose value is the `address` that this step gives.
        cluster: Address of a Ray cluster's dashboard that runs the command; empty to run it here.
        date: Date of the data set; empty for a command that has none.
        given: Address from a step before.
        word: Key of the configuration that takes what is given; empty if it is the configuration.

    Returns:
        `found`, the command's JSON object, `address`, and `night`, the date of a command that has one.
    """
    import json
    import subprocess
    import sys
    from collections import namedtuple

    line = ["dmtg", command, "-c", config or given, *words, *([f"{word}={given}"] if word else [])]
    line += [*(["--night", date] if date else []), "--json"]
    if cluster:
        line = ["ray", "job", "submit", "--address", cluster, "--", *line]
    found = {}
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - no shell
        for text in process.stdout or ():
            sys.stdout.write(text)
            if text.startswith("{"):  # a job's last lines are about the job
                found = json.loads(text)
    if process.returncode or not found:
        raise SystemExit(f"{' '.join(line)} ended with exit code {process.returncode}")
    outputs = namedtuple("Outputs", ["found", "address", "night"])  # noqa: PYI024 - by name, as kfp reads it
    return outputs(found, str(found[gives]), found.get("night", ""))


@dsl.pipeline(
    name="dmtg",
    description="Write tonight's data set, sweep over groupings, regroup with the best setting.",
)
def night(
    config: str = "/etc/dmtg/nightly.yaml",
    date: str = "today",
    shard_words: list = ["--ray-config", "/etc/dmtg/ray_config.yaml"],  # noqa: B006 - kfp reads the defaults
    sweep_words: list = [  # noqa: B006
        "sweep.groups=[2, 3, 4, 5]",
        "ray.workers=1",
        "--ray-config",
        "/etc/dmtg/ray_config.yaml",
    ],
    regroup_words: list = [  # noqa: B006
        "ray.workers=8",
        "--wait",
        "3600",
        "--kept-ok",
        "--ray-config",
        "/etc/dmtg/ray_config.yaml",
    ],
    cluster: str = "http://dmtg-head-svc.dmtg.svc.cluster.local:8265",
) -> None:
    """Write the data set of the date, sweep on it, and evaluate a challenger with the best setting.

    The regrouping trains the challenger: a training step before it would train the same networks twice.

    Args:
        config: File or recipe, as the machines that run the commands know it, with source and regroup.shards.
        date: Date of the nightly run, YYYY-MM-DD, or today (UTC).
        shard_words: Arguments of the sharding.
        sweep_words: What is varied.
        regroup_words: How the regrouping runs.
        cluster: Address of a Ray cluster's dashboard that runs the commands; empty to run them in the steps' pods.
    """
    sharding = dmtg(command="shard", config=config, words=shard_words, gives="shards", cluster=cluster, date=date)
    sweep = dmtg(
        command="sweep", config=config, words=sweep_words, gives="best_config", cluster=cluster,
        given=sharding.outputs["address"], word="data.shards",
    )  # fmt: skip
    regrouping = dmtg(
        command="regroup", config="", words=regroup_words, gives="verdict", cluster=cluster,
        date=sharding.outputs["night"], given=sweep.outputs["address"],
    )  # fmt: skip
    for step, name in ((sharding, "shard"), (sweep, "sweep"), (regrouping, "regroup")):
        # a command that runs again finds its results: caching would only skip a nightly run
        step.set_display_name(name).set_caching_options(False).set_retry(2)


def compile_to(path: Path = COMPILED) -> None:
    """Write the compiled pipeline."""
    compiler.Compiler().compile(night, package_path=str(path))


def every_night(host: str, experiment: str = "dmtg") -> str:
    """Schedule the compiled pipeline every night, one run at a time.

    Args:
        host: Address of Kubeflow Pipelines; credentials as kfp's client finds them.

    Returns:
        The id of the recurring run.
    """
    client = Client(host=host)
    run = client.create_recurring_run(
        experiment_id=client.create_experiment(experiment).experiment_id,
        job_name="dmtg-nightly",
        cron_expression=EVERY_NIGHT,
        max_concurrency=1,
        no_catchup=True,  # missed runs are not repeated: only the newest data counts
        pipeline_package_path=str(COMPILED),
    )
    return str(run.recurring_run_id)


def main() -> None:
    """Compile, and on request schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="", help="have it run every night on this Kubeflow Pipelines")
    host = parser.parse_args().host
    compile_to()
    print(every_night(host) if host else COMPILED)


if __name__ == "__main__":
    main()
