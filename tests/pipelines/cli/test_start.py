"""The start and the end of a command: its first line, the names of slow imports, and what it does not import."""

import os
import subprocess
import sys

import pytest

from pipelines.cli.stages import SLOW, naming_imports
from tests.paths import ROOT

# the command ends when it first imports a slow package, or with its own error
FIRST_IMPORT = f"""
import os, sys

class Watch:
    def find_spec(self, name, *_):
        if name in {tuple(SLOW)!r} and sys._getframe(1).f_code.co_name == "_find_spec":
            print("IMPORT", name, file=sys.stderr, flush=True)
            os._exit(77)

from pipelines.cli.app import main
sys.meta_path.insert(0, Watch())
main()
"""
# importing a blocked package is an error
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "ray", "torchvision"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def run(script, folder, *arguments):
    kept = {
        name: value for name, value in os.environ.items() if not name.endswith(("TRACKING_URI", "REGISTRY_URI"))
    }
    environment = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "_TYPER_STANDARD_TRACEBACK": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "first"),
    [
        (("demo",), "dmtg demo: reading the recipe hall"),
        (("doctor", "-c", "t.yaml"), "dmtg doctor: reading t.yaml"),
        (("doctor",), "dmtg doctor"),
        (("config", "new", "t.csv", "--targets", "y"), "dmtg config new: reading t.csv"),
        (("config", "show", "-c", "t.yaml"), "dmtg config show: reading t.yaml"),
        (("config", "schema"), "dmtg config schema"),
        (("shard", "-c", "t.yaml"), "dmtg shard: reading t.yaml"),
        (("inspect", "-c", "t.yaml"), "dmtg inspect: reading t.yaml"),
        (("signal", "-c", "t.yaml"), "dmtg signal: reading t.yaml"),
        (("train", "-c", "t.yaml"), "dmtg train: reading t.yaml"),
        (("compare", "-c", "t.yaml"), "dmtg compare: reading t.yaml"),
        (("sweep", "-c", "t.yaml"), "dmtg sweep: reading t.yaml"),
        (("evaluate", "models:/t/1", "-c", "t.yaml"), "dmtg evaluate: reading t.yaml"),
        (("predict", "models:/t/1", "-c", "t.yaml", "--out", "p"), "dmtg predict: reading t.yaml"),
        (("regroup", "-c", "t.yaml"), "dmtg regroup: reading t.yaml"),
        (("report", "runs/t"), "dmtg report: reading runs/t"),
        (("models", "list"), "dmtg models list"),
        (("models", "register", "runs/t"), "dmtg models register: reading runs/t"),
    ],
)
def test_the_first_line_is_printed_before_a_slow_import(command, first, tmp_path):
    (tmp_path / "t.yaml").write_text("name: t\ndata: {shards: shards}\n")
    (tmp_path / "t.csv").write_text("x,y\n1,0\n2,1\n")
    done = run(FIRST_IMPORT, tmp_path, *command)
    lines = done.stderr.splitlines()
    assert lines[0] == first
    assert done.returncode in (0, 1, 77), done.stderr  # the checks of doctor run in processes of their own
    if done.returncode == 77:
        assert lines[-1] == f"IMPORT {lines[-1].split()[1]}"
        assert lines[-2] == f"importing {SLOW[lines[-1].split()[1]]}"


def test_help_and_the_registry_import_no_torch_and_no_ray(tmp_path):
    start = BLOCKED + "from pipelines.cli.app import main; main()"
    assert "Nightly runs" in run(start, tmp_path, "--help").stdout
    listed = run(start, tmp_path, "models", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert '"models": []' in listed.stdout
    assert listed.stdout.count("\n") == 1
    completed = run(BLOCKED + "from pipelines.cli.completion import complete_model as c; print(c(''))", tmp_path)
    assert completed.stdout == "[]\n", completed.stderr
    assert not completed.stderr


def test_the_log_names_each_slow_import_once(monkeypatch):
    monkeypatch.setitem(SLOW, "no_such_package", "a package")
    logged = []
    before = list(sys.meta_path)
    with naming_imports(logged.append):
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError):
                __import__("no_such_package")
    assert logged == ["importing a package"]
    assert sys.meta_path == before


@pytest.mark.parametrize(
    ("arguments", "code"), [(("--help",), 0), (("no-such-command",), 2), (("report", "x"), 1)]
)
def test_a_command_ends_with_its_code_after_what_libraries_do_at_exit(arguments, code, tmp_path):
    script = "import atexit; from pipelines.cli.app import main\n"
    script += "class Late:\n    def __del__(self): print('freed')\n"
    script += "late = Late(); atexit.register(print, 'at exit was early')\n"
    script += "import pipelines.cli.app as a; ended = a.app\n"
    script += "def app(): atexit.register(print, 'at exit'); ended()\n"
    script += "a.app = app; main()\n"
    done = run(script, tmp_path, *arguments)
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] == "at exit"  # the objects of the interpreter are not freed after it
