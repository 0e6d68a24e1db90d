"""The start and the end of a command: its first line, the names of slow imports, and what it does not import."""

import json
import os
import subprocess
import sys

import pytest

from pipelines.cli.__main__ import MEMORY
from pipelines.cli.stages import SLOW, naming_imports
from tests.paths import ROOT

# forks for each command, as the start of Python takes longer than most of them; a command ends when it first
# imports a slow package, or with its own error
FIRST_IMPORT = f"""
import json, os, sys, traceback

class Watch:
    def find_spec(self, name, *_):
        if name in {tuple(SLOW)!r} and sys._getframe(1).f_code.co_name == "_find_spec":
            print("IMPORT", name, file=sys.stderr, flush=True)
            os._exit(77)

import pipelines.config.loading  # as every command does
from pipelines.cli.app import main
assert not {set(SLOW)!r} & set(sys.modules)
sys.meta_path.insert(0, Watch())
for number, command in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        os.mkdir(str(number))
        os.chdir(str(number))
        for name in ("t.yaml", "t.csv"):
            os.link(f"../{{name}}", name)
        os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["-c", *command]
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
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


def run(script, folder, *arguments, given=None):
    kept = {
        name: value for name, value in os.environ.items() if not name.endswith(("TRACKING_URI", "REGISTRY_URI"))
    }
    environment = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "_TYPER_STANDARD_TRACEBACK": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False, input=given,
    )  # fmt: skip


WAITING = """
import os, sys

from pipelines.cli.__main__ import main

sys.argv = ["dmtg", "--version"]
main()
print([os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")])
"""


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, ["10000", None]),
        ({"GOMP_SPINCOUNT": "7"}, ["7", None]),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, [None, "PASSIVE"]),
    ],
)
def test_threads_wait_briefly_unless_the_environment_says_otherwise(tmp_path, monkeypatch, given, used):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run(WAITING, tmp_path).stdout.splitlines()[-1] == str(used)


KEEPING = """
import resource, sys

from pipelines.cli.__main__ import main

sys.argv = ["dmtg", "--version"]
main()
for warm in (True, False):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        bytearray(20 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_that_is_freed_is_used_again_unless_the_environment_says_otherwise(tmp_path, monkeypatch):
    def faults():
        return int(run(KEEPING, tmp_path).stdout.splitlines()[-1])

    for name in MEMORY:
        monkeypatch.delenv(name, raising=False)
    assert faults() < 1_000
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    assert faults() > 200_000  # 5,120 pages, 50 times


def test_the_image_and_the_cluster_keep_memory_as_the_command_does():
    for file in ("Dockerfile", "ray-up.yaml"):
        text = (ROOT / "cluster" / file).read_text()
        for name, (_, value) in MEMORY.items():
            assert f"{name}={value}" in text


COMMANDS = [
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
]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Command → its exit code and what it wrote to stderr."""
    folder = tmp_path_factory.mktemp("started")
    (folder / "t.yaml").write_text("name: t\ndata: {shards: shards}\n")
    (folder / "t.csv").write_text("x,y\n1,0\n2,1\n")
    done = run(FIRST_IMPORT, folder, given=json.dumps([command for command, _ in COMMANDS]))
    codes = map(int, done.stdout.split())
    return {
        command: (code, (folder / str(number) / "stderr").read_text())
        for number, ((command, _), code) in enumerate(zip(COMMANDS, codes, strict=True))
    }


@pytest.mark.parametrize(("command", "first"), COMMANDS, ids=[first for _, first in COMMANDS])
def test_the_first_line_is_printed_before_a_slow_import(command, first, started):
    code, stderr = started[command]
    lines = stderr.splitlines()
    assert lines[0] == first
    assert code in (0, 1, 77), stderr  # the checks of doctor run in processes of their own
    if code == 77:
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
