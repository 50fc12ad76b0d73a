"""A library that somebody else could have put into the cache is not loaded; one is built in a private folder instead."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeoptim.kernels import build, compiler, library

pytestmark = pytest.mark.skipif(not library.available(), reason="no C compiler")
STRANGER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the compiler makes, once for all tests: where it is put is what they are about."""
    path = tmp_path_factory.mktemp("compiled") / "optim.so"
    compiler.compile_native(compiler.find_compiler(), path)
    return path


@pytest.fixture
def place(tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder that is ours alone, a private temporary directory, and a process that has not asked for kernels yet."""

    def compile_native(_: str, path: Path) -> None:
        path.write_bytes(compiled.read_bytes())
        path.chmod(0o600)

    monkeypatch.setattr(build, "compile_native", compile_native)
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    cache.mkdir(mode=0o700)
    temporary.mkdir(mode=0o700)
    monkeypatch.setenv("PIPEOPTIM_CACHE", str(cache))
    monkeypatch.setenv("PIPEOPTIM_KERNELS", "native")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    library.loaded_library.cache_clear()
    yield cache
    monkeypatch.undo()
    library.loaded_library.cache_clear()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that leaves a trace when it is loaded."""
    folder = tmp_path_factory.mktemp("planted")
    code = folder / "planted.c"
    code.write_text(
        "#include <stdio.h>\n#include <stdlib.h>\n"
        '__attribute__((constructor)) static void run(void) { fclose(fopen(getenv("PLANTED"), "w")); }\n'
    )
    subprocess.run([compiler.find_compiler(), "-shared", "-fPIC", str(code), "-o", str(folder / "planted.so")], check=True)
    return folder / "planted.so"


def plant(planted: Path, folder: Path) -> Path:
    """Put it where the library would be taken from."""
    path = folder / f"optim-{build._key(compiler.find_compiler())}.so"
    path.write_bytes(planted.read_bytes())
    path.chmod(0o755)
    return path


def give_folder_away(file: Path) -> None:
    os.chown(file.parent, STRANGER, STRANGER)


def give_file_away(file: Path) -> None:
    os.chown(file, STRANGER, STRANGER)


def open_folder_to_group(file: Path) -> None:
    file.parent.chmod(0o770)


def open_folder_to_all(file: Path) -> None:
    file.parent.chmod(0o707)


def open_file(file: Path) -> None:
    file.chmod(0o777)


def replace_file_by_link(file: Path) -> None:
    elsewhere = file.parent.parent / "elsewhere.so"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def replace_folder_by_link_of_a_stranger(file: Path) -> None:
    elsewhere = file.parent.parent / "elsewhere"
    file.parent.rename(elsewhere)
    file.parent.symlink_to(elsewhere)
    os.chown(file.parent, STRANGER, STRANGER, follow_symlinks=False)


def open_parent_to_all(file: Path) -> None:
    file.parent.parent.chmod(0o777)


def open_parent_to_group(file: Path) -> None:
    os.chown(file.parent.parent, -1, STRANGER)
    file.parent.parent.chmod(0o770)


def give_parent_away(file: Path) -> None:
    os.chown(file.parent.parent, STRANGER, -1)


HARMLESS_WITHOUT_ROOT = [open_folder_to_group, open_folder_to_all, open_file, replace_file_by_link, open_parent_to_all]
BY_ROOT = [give_folder_away, give_file_away, replace_folder_by_link_of_a_stranger, open_parent_to_group, give_parent_away]


@pytest.mark.parametrize(
    "spoil", [*HARMLESS_WITHOUT_ROOT, *(pytest.param(spoil, marks=as_root) for spoil in BY_ROOT)], ids=lambda f: f.__name__
)
def test_a_planted_library_is_not_loaded(
    spoil: Callable[[Path], None], place: Path, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = place.parent / "was-loaded"
    monkeypatch.setenv("PLANTED", str(trace))
    spoil(plant(planted, place))
    found = library.loaded_library()
    assert not trace.exists()
    assert found.entries is not None and found.origin == "built", "kernels work all the same, from a private folder"
    assert not list((place.parent / "tmp").iterdir()), "which is gone when they are loaded"


def test_the_trap_of_these_tests_is_sprung_by_loading(place: Path, planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", str(place.parent / "was-loaded"))
    plant(planted, place)
    with pytest.warns(UserWarning, match="the library cannot be loaded"):
        assert not library.available()
    assert (place.parent / "was-loaded").exists()


@as_root
def test_the_folder_in_the_temporary_directory_is_checked_before_anything_in_it(
    place: Path, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictable = place.parent / "tmp" / f"pipeoptim-{os.geteuid()}"
    predictable.mkdir()
    monkeypatch.delenv("PIPEOPTIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setenv("PLANTED", str(place.parent / "was-loaded"))
    give_folder_away(plant(planted, predictable))
    assert library.available()
    assert not (place.parent / "was-loaded").exists()


def test_a_folder_of_our_own_elsewhere_may_be_linked_to(place: Path) -> None:
    real = place.parent / "scratch"
    real.mkdir(mode=0o700)
    place.rmdir()
    place.symlink_to(real)
    assert library.available()
    assert len(list(real.glob("optim-*.so"))) == 1


def test_a_parent_that_only_the_users_own_group_may_write_to_is_as_safe_as_one_of_the_user(place: Path) -> None:
    if not build._only_ours(os.getegid()):
        pytest.skip("this user has no group of its own")
    os.chown(place.parent, -1, os.getegid())
    place.parent.chmod(0o770)
    assert library.available()
    assert list(place.glob("optim-*.so"))


def test_what_was_built_is_used_again_whatever_the_umask(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compile_native", compiler.compile_native)
    before = os.umask(0)
    try:
        assert library.available()
    finally:
        os.umask(before)
    (built,) = place.glob("*.so")
    at = built.stat().st_mtime_ns
    library.loaded_library.cache_clear()
    assert library.available()
    assert built.stat().st_mtime_ns == at
    assert not list((place.parent / "tmp").iterdir())


def test_where_not_even_a_private_folder_can_be_made_it_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPEOPTIM_CACHE", "/dev/null")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    with pytest.warns(UserWarning, match="because there is nowhere to keep them .*; let PIPEOPTIM_CACHE name a directory"):
        assert not library.available()
