"""The core trains, specialises, saves and loads without the dependencies of the drivers."""

import os
import subprocess
import sys

from tests.paths import ROOT

BLOCKED = ("ray", "mlflow", "pyarrow", "pydantic", "typer", "boto3")

SCRIPT = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is out of reach")

sys.meta_path.insert(0, Blocked())
try:
    import pydantic
except ImportError:
    pass
else:
    raise SystemExit("the block does not hold")

import tempfile
from pathlib import Path
import torch
torch.set_num_threads(1)
from dmtg_core import EncoderSpec, GroupingNetwork, LocalContext, NetworkSpec, TrainSettings, evaluate, fit
from dmtg_core.training.checkpoint import load_model, save_model
from tests.dmtg_core.planted import planted_data

spec, tasks, data, _ = planted_data(0, rows=400)
network = GroupingNetwork(NetworkSpec(spec, tasks, EncoderSpec("mlp", options={{"widths": [8, 4]}}), groups=3))
state = fit(network, data, TrainSettings(epochs=2), LocalContext(device="cpu"))
metrics = evaluate(state.network, data, "test", context=LocalContext(device="cpu"))
assert set(metrics) == {{task.name for task in tasks}}
x = torch.from_numpy(data.splits["test"].inputs)
served = set()
with tempfile.TemporaryDirectory() as folder:
    for name, model in state.network.specialise().items():
        save_model(Path(folder, name), model)
        loaded = load_model(Path(folder, name))
        expected = model.predict(x)
        assert all(torch.equal(value, expected[task]) for task, value in loaded.predict(x).items())
        served |= set(expected)
assert served == set(metrics)
# the compiler takes longer to import than torch; only compiled networks need it
loaded = [name for name in (*{BLOCKED!r}, "torch._dynamo", "torchvision") if name in sys.modules]
assert not loaded, loaded
print("done")
"""


def test_the_core_trains_and_serves_without_what_the_drivers_need():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"


def test_everything_that_is_exported_exists_and_has_a_docstring():
    import dmtg_core

    assert sorted(dmtg_core.__all__) == sorted(set(dmtg_core.__all__))
    for name in dmtg_core.__all__:
        exported = getattr(dmtg_core, name)
        if callable(exported) and hasattr(exported, "__name__"):
            assert exported.__doc__, name


def test_search_is_the_function_also_after_an_import_of_its_package():
    code = (
        "import dmtg_core.search.options, dmtg_core\n"
        "from dmtg_core import search\n"
        "from dmtg_core.search.search import search as own\n"
        "import dmtg_core.search.selection\n"
        "assert search is own is dmtg_core.search, search"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
