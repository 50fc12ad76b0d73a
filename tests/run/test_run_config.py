"""A configuration survives JSON; a recipe is complete and can run; names are found without being listed anywhere."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import Field, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from pipeoptim.config import NOT_COMPUTED, SETTINGS, Component, TrainConfig, recipe
from pipeoptim.errors import ConfigError
from pipeoptim.options import PipelineOptions, about, options_of_run, settings_of
from pipeoptim.train.checks import check
from pipeoptim.train.engines import make_emulator
from pipeoptim.train.recipes import get_recipe, recipes
from pipeoptim.train.setup import build_setup, probe_setup

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=6,
)
components = st.builds(Component, st.text(), st.dictionaries(st.text(), plain, max_size=3))
configs = st.builds(
    TrainConfig, st.text(), components, components, components, components, steps=st.integers(), engine=st.text()
)


@given(configs)
def test_json_round_trip(config: TrainConfig) -> None:
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", [f.name for f in fields(TrainConfig)])
def test_fingerprint_tells_runs_apart(name: str) -> None:
    config = tiny.recipe()
    value = getattr(config, name)
    other = value.with_options(x=1) if isinstance(value, Component) else value + (1 if isinstance(value, int | float) else "x")
    changed = replace(config, **{name: other})
    assert (changed.fingerprint() == config.fingerprint()) == (name in NOT_COMPUTED)


def another(name: str) -> object:
    """A value of a setting that is not the default."""
    known = SETTINGS[name]
    by_type = {
        "bool": [not known.default],
        "int": [(known.default or 0) + 1] if known.type_name != "str" else [],
        "float": [1.5],
    }
    candidates = by_type.get(known.type_name.split(" | ")[0], ["paper", "1", "0.5", "skip", *reversed(known.choices)])
    for value in candidates:
        with suppress(ConfigError):
            known.check(name, value)
            if value != known.default:
                return value
    raise AssertionError(f"no value is tried that {name} takes; add one to the candidates")


@pytest.mark.parametrize("entry", [f for f in fields(PipelineOptions) if settings_of(f)], ids=lambda f: f.name)
def test_an_option_of_pipelines_that_a_run_has_reaches_the_pipeline(entry: Field[object]) -> None:
    settings = settings_of(entry)
    needed = [known.only_with.split("=") for known in settings.values() if "=" in known.only_with]
    config = replace(tiny.recipe(), **{name: another(name) for name in settings}, **dict(needed))
    if about(entry).between_processes:
        with pytest.raises(ConfigError, match=f"{entry.name} is .*, but engine is 'emulator'"):
            check(config)
        config = replace(config, engine="processes")
    check(config)
    assert TrainConfig.from_json(config.to_json()) == config
    setup = build_setup(config)
    options = make_emulator(setup, setup.task.loss)[0].options
    if about(entry).between_processes:  # the emulator has none of them
        assert entry.name not in options.keywords()
        options = PipelineOptions(**options_of_run(config))
    assert set(options.keywords()) - {"seed", "tied"} == {entry.name, *(name for name, _ in needed)}


def edited(**changes: object) -> str:
    return json.dumps({**json.loads(tiny.recipe().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "missing fields: data, model, optimizer, recipe"),
        (edited(depth=3), "unknown fields: depth"),
        (edited(steps="many"), "steps is 'many'"),
        (edited(steps=True), "steps is True"),
        (edited(steps=1.5), "steps is 1.5"),
        (edited(model="gpt"), "model is 'gpt'"),
        (edited(model={"target": "m:f", "option": {}}), "model is"),
    ],
)
def test_json_that_is_no_configuration(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_json(text)


def test_options_must_fit_into_json() -> None:
    for value in (float("nan"), object()):
        with pytest.raises(ConfigError, match="does not fit into JSON"):
            replace(tiny.recipe(), data=Component("tiny:Task", {"x": value})).to_json()


def test_every_recipe_is_complete() -> None:
    assert {"chars", "digits"} <= set(recipes())
    for name, function in recipes().items():
        config = get_recipe(name)
        assert config.recipe == name
        assert function.__doc__
        assert TrainConfig.from_json(config.to_json()) == config
        check(config)
    for name in ("chars", "digits"):  # need no data of their own
        probe_setup(build_setup(get_recipe(name)))


def test_recipe_needs_a_docstring() -> None:
    def silent() -> TrainConfig:
        return tiny.recipe()

    with pytest.raises(ConfigError, match="silent has no docstring"):
        recipe(silent)


@pytest.mark.parametrize("name", [f.name for f in fields(TrainConfig) if f.type == "int"])
def test_numbers_have_bounds(name: str) -> None:
    least = SETTINGS[name].least
    assert least is not None
    for value in (least - 1, 2.5, True):
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            check(replace(tiny.recipe(), **{name: value}))


def test_validation_batches_are_full_and_spread() -> None:
    config = replace(tiny.recipe(), batch_size=4, eval_batches=3)  # 16 batches
    chosen = build_setup(config).validation
    everything = list(tiny.Task(0).validation_batches(4))
    assert [[x.equal(x2) for x2, _ in everything].index(True) for x, _ in chosen] == [0, 5, 10]
    assert len(build_setup(replace(config, eval_batches=99)).validation) == 16
