"""What a user gets is complete, and takes a user where the documentation leads: five journeys, each from an empty folder."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import pipeoptim as po
from browser import needs_browser, open_browser
from stage_processes import free_port

ROOT = Path(__file__).parents[1]
Archives = tuple[Path, Path]


def run(*command: object, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """A virtual environment in ``folder``, and the variables of a process that uses it."""

    folder: Path
    variables: dict[str, str]

    def run(self, program: str, *arguments: object, cwd: Path, **variables: str) -> str:
        """What one of its programs prints."""
        return run(self.folder / "bin" / program, *arguments, cwd=cwd, env=self.variables | variables)

    def start(self, program: str, *arguments: object, cwd: Path, **variables: str) -> subprocess.Popen[str]:
        command = [str(self.folder / "bin" / program), *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=cwd, env=self.variables | variables, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """Paths of the sdist, and of the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("distributions")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions: Archives, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """What the wheel depends on comes from the environment of the tests, through a ``.pth`` file."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python"]
    run(*pip, "install", "--no-deps", "--no-index", distributions[1])
    site = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "PYTHONPATH", "PIPEOPTIM_KERNELS")}
    own = {"PATH": str(folder / "bin"), "PIPEOPTIM_CACHE": str(folder / "cache"), "HOME": str(folder)}
    return Installed(folder, kept | own | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})


def files_of_the_packages() -> set[str]:
    packages = [ROOT / "src/pipeoptim", ROOT / "src/pipeoptim_zoo"]
    found = {path.relative_to(ROOT / "src").as_posix() for package in packages for path in package.rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


def test_the_wheel_holds_every_file_of_the_packages_and_the_kernels(distributions: Archives) -> None:
    assert "-py3-none-linux" in distributions[1].name, "one for every version of Python"
    with zipfile.ZipFile(distributions[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files_of_the_packages() | {"pipeoptim/kernels/optim.so"}


def test_the_sdist_holds_what_git_holds(distributions: Archives) -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("no checkout")
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {name for name in done.stdout.splitlines() if (ROOT / name).exists()}
    assert tracked - names == set()


def test_journey_of_the_readmes_commands(installed: Installed, tmp_path: Path) -> None:
    """``pipeoptim doctor``, and what ``make train`` runs, with its report. The other command, ``make test``, runs this."""
    findings = {one["name"]: one for one in json.loads(installed.run("pipeoptim", "doctor", "--json", cwd=tmp_path))}
    assert findings["pipeoptim"]["reason"].startswith(str(installed.folder))
    assert findings["C compiler"]["found"] == "none"
    assert findings["kernels"]["state"] == "ok" and findings["kernels"]["found"].startswith("prebuilt, ")
    train = re.search(r"^train:.*\n\t\$\(RUN\)/pipeoptim (.*) \$\(ARGS\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert train is not None
    told = installed.run("pipeoptim", *train[1].split(), "--tiny", "--steps", "6", "--stages", "2", cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "loss.png").stat().st_size > 1000 and f"runs/{run.name}/loss.png" in told
    installed.run("pipeoptim", "report", run, cwd=tmp_path)
    assert "</html>" in (run / "report.html").read_text()


PORTED = """
import copy, sys
from huggingface_causal_lm import *  # the example: its model, cut, loss and text

torch.set_num_threads(1)
model = build_model()


def emulator(model, method):
    made = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)
    return po.Emulator(cut(model, 2), made, loss_fn, method=method, microbatches=2, clip=po.Clip(1.0, "global"))


plain = copy.deepcopy(model)
for module in plain.modules():
    if isinstance(module, nn.Dropout):
        module.p = 0.0  # it draws for each micro-batch
flushed = emulator(copy.deepcopy(plain), "1f1b")
optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3)
for ids in batches(1, 5):
    loss = loss_fn(plain(ids), ids)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print("plain", loss.item(), "ported", flushed.step(ids, target=ids).item())

pipe = emulator(model, "pipeoptim")
for ids in batches(1, STEPS):
    pipe.step(ids, target=ids)
po.save_weights(pipe, sys.argv[1])
ids = next(batches(2, 1))
exported = GPT2LMHeadModel.from_pretrained(sys.argv[1]).eval()
print("emulator", pipe.eval_step(ids, target=ids).item(), "exported", loss_fn(exported(ids), ids).item())
"""


def numbers(told: str) -> list[float]:
    return [float(number) for number in re.findall(r"\b\d+\.\d+\b", told)]


def test_journey_of_a_gpt2_loop(installed: Installed, tmp_path: Path) -> None:
    """``1f1b`` is the plain loop; emulator and two processes export the same bits, whose loss is what evaluation said."""
    pytest.importorskip("transformers")
    script = tmp_path / "huggingface_causal_lm.py"
    script.write_text((ROOT / "examples" / script.name).read_text())
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    told = installed.run("python", *torchrun, script, "processes", cwd=tmp_path, STEPS="60")
    *losses, last = re.findall(r"validation loss [0-9.]+|exported: .*", told)
    losses = [number for one in losses for number in numbers(one)]
    assert len(losses) == 3 and losses[-1] < 1.3 and losses == sorted(losses, reverse=True)
    assert numbers(last)[0] == pytest.approx(numbers(last)[1], abs=2e-4) and numbers(last)[0] < 1.3
    *pairs, (evaluated, exported) = map(numbers, installed.run("python", "-c", PORTED, "emulator", cwd=tmp_path).splitlines())
    assert [ported for _, ported in pairs] == pytest.approx([plain for plain, _ in pairs], abs=2e-6) and len(pairs) == 5
    assert evaluated == pytest.approx(exported, abs=1e-5) and evaluated == pytest.approx(numbers(last)[0], abs=1e-4)
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert (tmp_path / "emulator" / file).read_bytes() == (tmp_path / "processes" / file).read_bytes()


def test_journey_of_a_folder_of_text_to_from_pretrained(installed: Installed, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", "5.0", reason="recipe causal_lm needs Transformers 5")
    pytest.importorskip("datasets", reason="recipe causal_lm needs datasets")
    (tmp_path / "books").mkdir()
    (tmp_path / "books/one.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 200)
    options = ("--set", "data.text=books", "--set", "data.context=32", "--steps", "4", "--stages", "2", "--quiet")
    installed.run("pipeoptim", "train", "--recipe", "causal_lm", "--tiny", *options, cwd=tmp_path)
    folder = tmp_path / "runs/causal_lm-tiny-pipeoptim/model"
    model, about = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert not any(about.values()) and model.config.model_type == "llama"
    prompt = tokenizer("It was", add_special_tokens=False, return_tensors="pt")
    assert tokenizer.decode(model.generate(**prompt, max_new_tokens=4)[0]).startswith("It was")


@needs_browser
def test_journey_of_a_comparison_to_its_report_in_a_browser(installed: Installed, tmp_path: Path) -> None:
    """At two widths, light and dark; a picture of each stays in the folder of the test."""
    options = ("--recipe", "digits", "--tiny", "--steps", "12", "--methods", "1f1b,pipeoptim", "--out", "compared")
    installed.run("pipeoptim", "compare", *options, cwd=tmp_path)
    with open_browser() as browser:
        for width, height in ((1280, 900), (390, 844)):
            for scheme in ("light", "dark"):
                shown = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shown)
                features = [{"name": "prefers-color-scheme", "value": scheme}]
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
                browser.get((tmp_path / "compared/report.html").as_uri())
                assert browser.execute_script("return document.documentElement.scrollWidth") <= width
                lines = "return [...document.querySelectorAll('#train path.line')].filter(p => p.getTotalLength() > 10).length"
                assert browser.execute_script(lines) == 2
                picture(browser, tmp_path / f"report-{width}-{scheme}.png", scheme)
        assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def picture(browser: Any, path: Path, scheme: str) -> None:
    """The top of the page, as it is seen: mostly paper, of the scheme's colour, with something on it."""
    from matplotlib.image import imread

    browser.save_screenshot(str(path))
    grey = imread(path)[..., :3].mean(-1)
    paper, ink = (grey > 0.8, grey < 0.5) if scheme == "light" else (grey < 0.3, grey > 0.5)
    assert paper.mean() > 0.6 and 0.005 < ink.mean() < 0.3


def test_journey_of_two_machines_that_go_on_from_a_checkpoint(installed: Installed, tmp_path: Path) -> None:
    """Two agents of torchrun with a node each, by the script of docs/multi_node.md; the bits are those of one process."""
    script = tmp_path / "several_machines.py"
    script.write_text((ROOT / "examples" / script.name).read_text())
    example = imported(script)
    pipe = emulated(example, 6)
    po.save_sharded(pipe, tmp_path / "step-6")
    address = ("--master-addr", "127.0.0.1", "--master-port", free_port())
    agent = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *address, "--node-rank")
    variables = {"STEPS": "12", "GLOO_SOCKET_IFNAME": "lo"}
    agents = [installed.start("python", *agent, n, script, tmp_path, cwd=tmp_path, **variables) for n in range(2)]
    try:
        ended = [one.communicate(timeout=150) for one in agents]
    finally:
        for one in agents:
            one.kill()
    assert [one.returncode for one in agents] == [0, 0], ended
    assert "step 12: loss" in ended[1][0] and "step" not in ended[0][0]
    other = emulated(example, 1)
    po.load_sharded(other, tmp_path / "step-12")
    go_on(pipe, example, range(6, 12))
    for k in range(2):
        pairs = zip(pipe.stage_module(k).parameters(), other.stage_module(k).parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


def imported(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulated(example: ModuleType, steps: int) -> po.Emulator:
    stages = [example.build_stage(k, 2) for k in range(2)]
    pipe = po.Emulator(stages, lambda p: torch.optim.AdamW(p, lr=1e-3), torch.nn.functional.mse_loss, microbatches=2)
    go_on(pipe, example, range(steps))
    return pipe


def go_on(pipe: po.Emulator, example: ModuleType, steps: range) -> None:
    for step in steps:
        x, y = example.batch(step)
        pipe.step(x, target=y)
    pipe.drain()
