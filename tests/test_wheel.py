"""What a user gets: wheel and sdist are complete, and the wheel runs with its kernels in an environment without a compiler."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Paths of the sdist, and of the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("distributions")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), cwd=ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """The environment of a process that has the wheel in a virtual environment of its own, and no compiler.

    What the wheel depends on comes from the environment of the tests, through a ``.pth`` file.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "bin/python"),
        "install",
        "--no-deps",
        "--no-index",
        str(distributions[1]),
    )
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "PYTHONPATH", "PIPEOPTIM_KERNELS")}
    return kept | {
        "PATH": str(folder / "bin"),
        "PIPEOPTIM_CACHE": str(folder / "cache"),
        "HOME": str(folder),
        "FOLDER": str(folder),
    }


def files_of_the_packages():
    packages = [ROOT / "src/pipeoptim", ROOT / "src/pipeoptim_zoo"]
    found = {path.relative_to(ROOT / "src").as_posix() for package in packages for path in package.rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


def test_the_wheel_holds_every_file_of_the_packages_and_the_kernels(distributions):
    with zipfile.ZipFile(distributions[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files_of_the_packages() | {"pipeoptim/kernels/optim.so"}


def test_one_wheel_serves_every_version_of_python(distributions):
    assert "-py3-none-linux" in distributions[1].name


def test_the_sdist_holds_what_git_holds(distributions):
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("no checkout")
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {name for name in done.stdout.splitlines() if (ROOT / name).exists()}
    assert tracked - names == set()


def test_kernels_are_active_without_a_compiler(installed):
    pipeoptim = f"{installed['FOLDER']}/bin/pipeoptim"
    findings = {
        one["name"]: one for one in json.loads(run(pipeoptim, "doctor", "--json", env=installed, cwd=installed["FOLDER"]))
    }
    assert findings["pipeoptim"]["reason"].startswith(installed["FOLDER"])
    assert findings["C compiler"]["found"] == "none"
    assert findings["kernels"]["state"] == "ok"
    assert findings["kernels"]["found"].startswith("prebuilt, ")


def test_training_from_the_wheel_finds_all_it_reads(installed):
    pipeoptim = f"{installed['FOLDER']}/bin/pipeoptim"
    options = ("--recipe", "digits", "--tiny", "--steps", "6", "--name", "first")
    run(pipeoptim, "train", *options, env=installed, cwd=installed["FOLDER"])
    assert (Path(installed["FOLDER"]) / "runs/first/result.json").exists()
    code = "import pipeoptim as po; print(po.__file__, sorted(po.METHODS), po.Emulator, po.Schedule)"
    said = run(f"{installed['FOLDER']}/bin/python", "-W", "error", "-c", code, env=installed, cwd=installed["FOLDER"])
    assert said.startswith(installed["FOLDER"])


def test_a_language_model_from_a_folder_of_text_to_from_pretrained(installed, tmp_path):
    transformers = pytest.importorskip("transformers", "5.0", reason="recipe causal_lm needs Transformers 5")
    pytest.importorskip("datasets", reason="recipe causal_lm needs datasets")
    (tmp_path / "books").mkdir()
    (tmp_path / "books/one.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 200)
    options = ("--set", "data.text=books", "--set", "data.context=32", "--steps", "4", "--stages", "2", "--quiet")
    offline = {**installed, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = (f"{installed['FOLDER']}/bin/pipeoptim", "train", "--recipe", "causal_lm", "--tiny", *options)
    run(*command, env=offline, cwd=tmp_path)
    folder = tmp_path / "runs/causal_lm-tiny-pipeoptim/model"
    model, about = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert not any(about.values()) and model.config.model_type == "llama"
    assert model(**tokenizer("It was", return_tensors="pt")).logits.shape == (1, 7, len(tokenizer))
