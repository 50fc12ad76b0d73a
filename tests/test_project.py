"""The project as a whole: its documents run, its tables are current, its wheel works."""

import ast
import doctest
import importlib
import json
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

import pipeoptim
import pipeoptim_zoo
from pipeoptim.cli.app import build

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run(*command, cwd=ROOT, timeout=240):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_in_documents_runs(path):
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, str(path), "exec"), {})


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_run(path):
    """Cell after cell; what they printed and drew is kept in them (benchmarks/run_notebooks.py)."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    exec(compile(code, str(path), "exec"), {})
    drawn, kept = len(pyplot.get_fignums()), [output for cell in cells for output in cell["outputs"]]
    pyplot.close("all")
    assert drawn == len([one for one in kept if "image/png" in one.get("data", {})]) >= 2
    assert len([one for one in kept if one["output_type"] == "stream"]) >= 3


def test_the_readme_names_what_an_install_brings():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (told,) = re.findall(r"A plain install brings.*?\n\n", DOCUMENTS[0].read_text(), re.DOTALL)
    names = {re.match(r"[\w-]+", one)[0].lower() for one in needed}
    assert names and {name for name in names if name not in told.lower()} == set()
    assert re.search(r"\d+ packages of [\d.]+ GB", told)


def anchors(path):
    """What a link to a heading of this page may name, as GitHub makes it from the heading."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_in_documents_lead_somewhere():
    for path in [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]:
        prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)  # code may index and call: blocks[0](x)
        for link, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([^)]*))?\)", prose):
            target = path.parent / link if link else path
            assert target.exists(), f"{path.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{path.name} links to {anchor} in {target.name}"


def test_rendered_tables_and_drawings_are_current():
    done = run(sys.executable, "benchmarks/render.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def modules():
    for package in (pipeoptim, pipeoptim_zoo):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not info.name.endswith(("__main__", "bench.worker", "train.worker")):
                yield info.name


@pytest.mark.parametrize("name", sorted(modules()))
def test_docstrings_are_there_and_their_examples_run(name):
    if name.endswith(".triton_source"):
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} does not say why it exists"
    result = doctest.testmod(module)
    assert result.failed == 0


def test_import_is_silent_and_help_needs_no_torch():
    done = run(sys.executable, "-c", "import pipeoptim; pipeoptim.Emulator")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    code = (
        "import sys; sys.argv = ['pipeoptim', '--help']\nimport atexit; atexit.register(lambda: print('torch' in sys.modules))"
    )
    done = run(sys.executable, "-c", code + "\nfrom pipeoptim.cli import main; main()")
    assert done.stdout.strip().endswith("False")
    assert "train" in done.stdout


def test_only_one_module_imports_torchs_pipelining():
    source = Path(pipeoptim.__path__[0])
    users = [
        p.relative_to(source).as_posix() for p in source.rglob("*.py") if "torch.distributed.pipelining import" in p.read_text()
    ]
    assert users
    outside = {name for name in users if not name.startswith("bench/")}  # benchmarks run torch's own schedules
    engine = {"engine/torch_stage.py", "engine/process_pipeline.py", "engine/distributed.py", "engine/interleaved.py"}
    assert outside == engine | {"partitioning/trace_splitter.py", "train/engines.py"}


UNPICKLES = re.compile(
    r"\bpickle\b|\bdill\b|\bcloudpickle\b|torch\.load\b|gather_object\b|_object_list\b|distributed\.checkpoint|multiprocessing\.(Pipe|Queue|connection)|\bmarshal\b"
)


def test_nothing_is_unpickled():
    source = Path(pipeoptim.__path__[0]).parent
    code = {p.relative_to(source).as_posix(): ast.unparse(without_docstrings(p)) for p in source.rglob("*.py")}
    assert not [name for name, text in code.items() if UNPICKLES.search(text)]


def without_docstrings(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return tree


def commands_in(path):
    """Lines of shell blocks that call the library's command."""
    for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r";|&&|\|", line.partition("#")[0]):
                if part.strip().startswith("pipeoptim "):
                    yield shlex.split(part.partition(">")[0])


def test_commands_in_documents_have_options_that_exist():
    root = typer.main.get_command(build())
    found = 0
    for path in DOCUMENTS:
        for _, *words in commands_in(path):
            command = root
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
            own = words[: words.index("--")] if "--" in words else words  # behind it stands another command
            used = {word.partition("=")[0] for word in own if word.startswith("--")}
            assert command is not root or words[0].startswith("-"), f"{path.name} has a command that does not exist: {words}"
            assert used <= known, f"{path.name}: {command.name} has no {used - known}"
            found += 1
    assert found > 30
