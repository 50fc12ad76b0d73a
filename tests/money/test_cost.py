"""What a run costs: by hand, by Daly's formula, in units that can be trusted; and what is refused."""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from datetime import date
from math import exp, inf, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeoptim.cli.app import _run
from pipeoptim.cli.cost_table import sentences, tornado
from pipeoptim.compare import api as compare_api
from pipeoptim.compare.report.plan_sections import known_totals
from pipeoptim.compare.worker import OUTCOME, carry_out
from pipeoptim.errors import ConfigError
from pipeoptim.failures import Failures, best_checkpoint_interval, seconds_with_failures, useful_shares
from pipeoptim.money import PricedRun, Terms, estimate, read_plan, read_prices
from pipeoptim.money.places import LINES, ON_DEMAND, OWN, PLACES, Known, bill, break_even, mixed
from pipeoptim.money.price_book import ACCELERATOR, GENERAL, PriceBook
from pipeoptim.money.triangular import Triangular


def point(value):
    return Triangular(value, value, value)


#: 4 stages x 2 replicas, 1,000 mini-batches of 64 rows and 3.6 s: one hour on 8 devices, a quarter of it idle.
WORK = PricedRun("m", "pipeoptim", 4, 2, point(64_000.0), 64, point(3.6), 0.25, 30e9, (4e9, 2e9, 6e9))
TERMS = Terms(life=5.0, utilisation=0.5, people=0.5, recovery=point(0.0))
PRICES = {
    "on_demand": 4.0,
    "spot": 2.0,
    "server": 262_980.0,
    "power": 8.0,
    "cloud.reserved_discount": 0.25,
    "cloud.storage": 0.0243,
    "cloud.egress": 0.1,
    "cloud.pue": 1.2,
    "cloud.preemption": 1e9,
    "own.server_over_accelerators": 1.5,
    "own.interconnect": 0.2,
    "own.pue": 1.5,
    "own.electricity": 0.1,
    "own.storage": 0.01461,
    "staff.salary": 175_320.0,
    "grid.carbon": 0.4,
    "failures.mtbf": 1e9,
}
ONLY_ON_DEMAND = """
[mi300x.on_demand]
unit = "USD/accelerator/hour"
quotes = [{value = 1.99}, {value = 3.45}]
"""
X = Known(PRICES | {"life": 5.0, "per_server": 8, "people": 0.5})


def test_the_bill_of_an_hour_by_hand():
    """A server of 262,980 USD over 5 x 8,766 h is 6 USD/h: 4 of its 8 accelerators, 2 of the rest, and 1.2 of switches. Two hours are paid
    for one of work."""
    cloud = bill(ON_DEMAND, WORK, TERMS, X, hours=1.0, paid=2.0)
    by_hand = {
        "accelerators": 8 * 4 * 0.75,
        "hosts": 0.0,
        "storage": 60 * 0.0243 * 2 / 730.5,  # two checkpoints of 30 GB
        "network and egress": 30 * 0.1,
        "power and cooling": 0.0,
        "staff": 0.5 * 20 * 2,  # 175,320 USD a year are 20 USD/h
        "failures and lost work": 8 * 4 * 1,
        "idle time": 8 * 4 * 0.25,
    }
    assert cloud.lines == pytest.approx(by_hand)
    assert cloud.total == pytest.approx(sum(by_hand.values()))
    assert (cloud.energy, cloud.carbon) == pytest.approx((8 * 1.2 * 2, 8 * 1.2 * 2 * 0.4))
    own = bill(OWN, WORK, TERMS, X, hours=1.0, paid=2.0)
    assert own.lines == pytest.approx(
        {
            "accelerators": 4 * 0.75,
            "hosts": 2.0,
            "storage": 60 * 0.01461 * 2 / 730.5,
            "network and egress": 1.2,
            "power and cooling": 8 * 1.5 * 0.1,
            "staff": 20.0,
            "failures and lost work": 7.2 / 0.5 + 1.2,  # hardware at half its use, and power
            "idle time": 4 * 0.25 + 7.2,  # in the pipeline, and as long again unused
        }
    )
    assert break_even(X, ON_DEMAND) == pytest.approx((7.2 / 8) / (4 - 1.2 / 8))
    reserved = next(place for place in PLACES if place.name == "reserved")
    assert bill(reserved, WORK, TERMS, X, 1.0, 1.0).lines["idle time"] == pytest.approx(8 * 3 * 0.25 + 8 * 3)


def test_a_mix_has_both_bills_and_the_traffic_between_them():
    both = mixed(WORK, TERMS, X, 1.0, 1.0, 1000.0)
    here, there = bill(OWN, WORK, TERMS, X, 1.0, 1.0, 4), bill(ON_DEMAND, WORK, TERMS, X, 1.0, 1.0, 4)
    # The second boundary carries 2 GB per mini-batch, of which the gradients leave the cloud.
    expected = {name: here.lines[name] + there.lines[name] for name in LINES} | {"storage": there.lines["storage"]}
    expected["network and egress"] += 1000 * 1.0 * 0.1
    assert both.lines == pytest.approx(expected)
    with pytest.raises(ConfigError, match="own stages is 4, must be 1 to 3"):
        mixed(WORK, replace(TERMS, own_stages=4), X, 1.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match="own stages is 1, but the plan has one stage"):
        estimate(replace(WORK, stages=1, sent_bytes=()), read_prices(), replace(TERMS, own_stages=1))


def test_what_is_unknown_is_never_nothing():
    less = Known({k: v for k, v in X.items() if k not in ("cloud.egress", "own.storage", "people")})
    found = bill(ON_DEMAND, WORK, TERMS, less, 1.0, 1.0)
    assert (found.lines["network and egress"], found.lines["staff"]) == (None, None)
    assert found.unknown == ("cloud.egress", "people")
    assert mixed(WORK, TERMS, less, 1.0, 1.0, 1.0).lines["network and egress"] is None
    told = estimate(WORK, read_prices(), TERMS, draws=20)
    own = next(one for one in told.places if one.name == "own")
    assert own.lines["storage"] is None and own.unknown == ("own.storage",)
    assert "* without own.storage, which is unknown (own): give own.storage with --prices" in sentences(told)


def test_a_total_without_the_price_of_accelerators_is_unknown_and_no_place_beats_another_by_it(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(ONLY_ON_DEMAND)
    told = estimate(WORK, read_prices(mine), replace(TERMS, accelerator="mi300x"), draws=20)
    totals = {one.name: one.total for one in told.places}
    known = {"on demand", "reserved"}  # which follows from it by a discount
    assert {name for name, total in totals.items() if total is not None} == known
    data = told.to_dict()
    assert {name for name, place in data["places"].items() if place["total USD"] is not None} == known
    assert told.swung in known and {*known_totals(data)} == known


@settings(max_examples=50, deadline=None)
@given(factor=st.floats(0.01, 100), place=st.sampled_from(PLACES), hours=st.floats(0.1, 1e4), more=st.floats(1, 3))
def test_units(factor, place, hours, more):
    """Dollars scale with dollars, hours with hours, devices with devices; energy with power and not with prices."""
    paid = hours * more
    plain = bill(place, WORK, TERMS, X, hours, paid)
    dollars = [
        name for name, unit in {**ACCELERATOR, **GENERAL}.items() if unit.startswith("USD/") and "of servers" not in unit
    ]
    dearer = bill(place, WORK, TERMS, Known(X | {name: X[name] * factor for name in dollars}), hours, paid)
    assert dearer.total == pytest.approx(plain.total * factor)
    assert (dearer.energy, dearer.carbon) == pytest.approx((plain.energy, plain.carbon))
    longer = bill(place, WORK, TERMS, X, hours * factor, paid * factor)
    fixed = 0.0 if place.own else plain.lines["network and egress"]
    assert longer.total - fixed == pytest.approx((plain.total - fixed) * factor)
    half = bill(place, WORK, TERMS, X, hours, paid, WORK.devices // 2)
    for name in ("accelerators", "hosts", "power and cooling", "failures and lost work", "idle time", "staff"):
        assert half.lines[name] == pytest.approx(plain.lines[name] / 2)
    stronger = bill(place, WORK, TERMS, Known(X | {"power": X["power"] * factor}), hours, paid)
    assert stronger.energy == pytest.approx(plain.energy * factor)


def test_failures_cost_what_daly_and_young_say():
    """The mean of the drawn runs is Daly's; with a checkpoint interval far below the MTBF it is Young's, and his optimum is one."""
    random = np.random.default_rng(0)
    failures = Failures(mtbf=1.0, recovery=100.0, checkpoint_every=900.0, checkpoint=30.0)
    rate, work = 1 / 20_000, 9e6
    daly = 10_000 * (20_000 + 100) * (exp(930 / 20_000) - 1)
    assert seconds_with_failures(failures, rate, work) == pytest.approx(daly)
    drawn = [seconds_with_failures(failures, rate, work, random) for _ in range(300)]
    assert np.mean(drawn) == pytest.approx(daly, rel=1e-3)
    young = work * (1 + 30 / 900 + 930 / 2 / 20_000 + 100 / 20_000)
    assert daly == pytest.approx(young, rel=2e-3)

    def at(every):
        return seconds_with_failures(replace(failures, checkpoint_every=every, recovery=0.0), rate, work)

    best = best_checkpoint_interval(20_000, 1, 30.0)
    assert at(best) == pytest.approx(work * (1 + sqrt(2 * 30 / 20_000)), rel=3e-3)
    assert at(best) < min(at(best / 2), at(best * 2))
    assert np.mean(useful_shares(replace(failures, mtbf=160_000.0), 8, work, 50)) == pytest.approx(work / daly, rel=1e-3)
    # More failures than are drawn one by one: the same mean and deviation as those that are.
    often = [work / seconds_with_failures(failures, 1 / 600, work, random) for _ in range(100)]
    assert np.mean(often) == pytest.approx(work / (10_000 * 700 * (exp(930 / 600) - 1)), rel=2e-3)
    assert seconds_with_failures(failures, 1.0, work) == inf


def test_an_estimate_has_its_certain_part_exactly_and_its_intervals_in_order():
    book = PriceBook(
        {
            name: SimpleNamespace(name=name, span=point(PRICES[name.removeprefix("h100.")]), quotes=())
            for name in [*GENERAL, *(f"h100.{n}" for n in ACCELERATOR)]
        },
        {"h100": 8},
    )
    found = estimate(WORK, book, TERMS, draws=50)
    certain = bill(ON_DEMAND, WORK, TERMS, X, 1.0, 1.0)
    first = found.places[0]
    assert (first.total.p10, first.total.p50, first.total.p90) == pytest.approx((certain.total,) * 3, rel=1e-4)
    assert found.swings == ()
    wide = estimate(WORK, read_prices(), replace(TERMS, recovery=Triangular(60.0, 300.0, 1800.0)), draws=400)
    for place in wide.places:
        assert place.total.p10 < place.total.p50 < place.total.p90
    assert wide == estimate(WORK, read_prices(), replace(TERMS, recovery=Triangular(60.0, 300.0, 1800.0)), draws=400)
    assert abs(wide.swings[0].high - wide.swings[0].low) >= abs(wide.swings[-1].high - wide.swings[-1].low)
    spans = read_prices().spans("h100")
    assert np.mean(spans["on_demand"].quantile(np.linspace(0, 1, 100_001))) == pytest.approx(
        (2.69 + 3.99 + 12.29) / 3, rel=1e-3
    )
    assert len(tornado(wide.swings)) == len(wide.swings)


def test_every_price_has_a_source_a_day_and_a_unit(tmp_path):
    book = read_prices()
    for name, price in book.prices.items():
        for quote in price.quotes:
            assert quote.day is not None and quote.day <= date.today(), name
            assert re.match(r"https?://[\w.-]+/", quote.url or ""), name
    assert set(GENERAL) - set(book.prices) == {"own.storage"}, "the one price that was not found"
    assert book.warnings("h100", date(2020, 1, 1)) == []
    old = book.warnings("h100", date(2027, 6, 1))
    assert len(old) == 1 and "older than 90 days (the oldest, of cloud.preemption, is of 2020-01-01)" in old[0]
    own = tmp_path / "own.toml"
    own.write_text(
        '[mi300.on_demand]\nunit = "USD/accelerator/hour"\nquotes = [{value = 2}]\n'
        '[own.electricity]\nunit = "USD/kWh"\nquotes = [{value = 0}]\n'
    )
    mine = read_prices(own)
    assert (mine.per_server["mi300"], mine.prices["own.electricity"].span.high) == (8, 0.0)
    assert mine.prices["cloud.egress"] == book.prices["cloud.egress"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    arguments = ["--objective", "time", "--synthetic", "--sizes", "layers=4,rows=8", "--devices", "2", "--stages", "2"]
    assert _run(["plan", *arguments, "--microbatches", "2", "--out", str(path)]) == 0
    return path


def test_the_command_prints_and_writes_the_same(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "cost.json"
    assert _run(["cost", "--plan", str(plan), "--samples", "1e6", "--draws", "100", "--people", "1", "--out", str(out)]) == 0
    told, data = capsys.readouterr().out, json.loads(out.read_text())
    work = read_plan(plan, point(1e6))
    assert (work.devices, len(work.sent_bytes), work.minibatches.low) == (2, 1, 125_000.0)
    assert set(data["places"]) == {"on demand", "reserved", "spot", "own", "own + cloud"}
    for name in LINES:
        assert name in told
    place = data["places"]["on demand"]
    assert place["unknown"] == [] and all(len(one) == 3 for one in place["USD"].values())
    assert sum(one[1] for one in place["USD"].values()) == pytest.approx(place["total USD"][1], rel=0.1)
    assert data["prices"]["own.electricity"]["quotes"][0]["url"].startswith("https://")
    assert "█" in told and "own hardware costs as much as on demand where it is used" in told


def test_it_answers_without_torch(plan):
    code = "import sys; from pipeoptim.cli.app import _run; _run(sys.argv[1:]); print('torch' in sys.modules)"
    words = ["cost", "--plan", str(plan), "--samples", "1e6", "--draws", "5"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False"


BAD = {
    "negative price": (
        ["--prices", "negative.toml"],
        "own.electricity in negative.toml is -0.1 USD/kWh, must be a number from 0",
    ),
    "other unit": (["--prices", "unit.toml"], "own.electricity in unit.toml is in 'EUR/kWh', must be in 'USD/kWh'"),
    "no price": (["--prices", "name.toml"], "'own.electricty', which means nothing; did you mean 'own.electricity'?"),
    "time of day": (["--prices", "hour.toml"], "own.electricity in hour.toml has a quote"),
    "no file": (["--prices", "nowhere.toml"], "nowhere.toml cannot be read (no such file or directory: nowhere.toml)"),
    "no toml": (["--prices", "cut.json"], "the prices cut.json are no TOML"),
    "zero utilisation": (["--utilisation", "0"], "utilisation is 0, must be above 0"),
    "no life": (["--life", "-1"], "life is -1, must be above 0"),
    "recovery": (["--recovery", "9,1"], "recovery is 9,1, must be the least and the most"),
    "accelerator": (["--accelerator", "h1000"], "unknown accelerator 'h1000'; did you mean 'h100'?"),
    "cut file": (["--plan", "cut.json"], "cut.json is damaged"),
    "other version": (["--plan", "other.json"], "other.json is no plan of format 1 (it says 2)"),
    "other sort": (["--plan", "profile.json"], "profile.json is no plan of format 1"),
    "an estimate": (["--plan", "estimate.json"], "estimate.json is an estimate of the plan plan.json, and no plan"),
    "no bytes": (["--plan", "older.json"], "older.json is damaged or of another version"),
    "no samples": (["--samples", "0"], "samples is 0, must be at least 1"),
    "stages": (["--own-stages", "2"], "own stages is 2, must be 1 to 1"),
    "draws": (["--draws", "0"], "draws is 0, must be from 1"),
    "two": (["--to-loss", "1"], "give either --samples"),
    "refresh": (["--refresh", "now.toml"], "--refresh only looks prices up; leave --plan, --samples, --draws, --out out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(name, plan, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = json.loads(plan.read_text())
    (tmp_path / "cut.json").write_text(plan.read_text()[:300])
    (tmp_path / "other.json").write_text(json.dumps(data | {"format": 2}))
    (tmp_path / "profile.json").write_text('{"format": 1}')
    (tmp_path / "estimate.json").write_text('{"format": 1, "plan": "plan.json"}')
    del data["plan"]["bytes"]
    (tmp_path / "older.json").write_text(json.dumps(data))
    for file, text in {
        "negative": '[own.electricity]\nunit = "USD/kWh"\nquotes = [{value = -0.1}]',
        "unit": '[own.electricity]\nunit = "EUR/kWh"\nquotes = [{value = 0.1}]',
        "hour": '[own.electricity]\nunit = "USD/kWh"\nquotes = [{value = 0.1, date = 2026-11-30T10:00:00}]',
        "name": '[own.electricty]\nunit = "USD/kWh"\nquotes = []',
    }.items():
        (tmp_path / f"{file}.toml").write_text(text)
    before = sorted(tmp_path.iterdir())
    arguments, message = BAD[name]
    given = {"--plan": str(plan), "--samples": "1000", "--out": "out.json", "--draws": "20"} | {arguments[0]: arguments[1]}
    assert _run(["cost", *(word for pair in given.items() for word in pair)]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_to_loss_takes_the_samples_of_a_comparison_of_the_same_model(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "fuzz"))

    def here(folder, runs, jobs, progress):
        for run in runs:
            (folder.run(run.name) / OUTCOME).write_text(json.dumps(carry_out(run.config, folder.run(run.name))))

    monkeypatch.setattr(compare_api, "do_runs", here)
    assert (
        _run(
            [
                "compare",
                "--recipe",
                "small_recipe:recipe",
                "--quiet",
                "--methods",
                "1f1b,pipeoptim",
                "--steps",
                "3",
                "--out",
                "c",
            ]
        )
        == 0
    )
    settings = json.loads((tmp_path / "c" / "compare.json").read_text())["settings"]
    data = json.loads(plan.read_text())
    own = tmp_path / "own.json"
    own.write_text(json.dumps(data | {"model": settings["config"]["recipe"]}))
    call = ["cost", "--draws", "20", "--compared", "c", "--plan"]
    assert _run([*call, str(own), "--to-loss", "1e6", "--out", "cost.json"]) == 0
    samples = json.loads((tmp_path / "cost.json").read_text())["run"]["samples"]
    assert samples["low"] == samples["high"] and samples["low"] % settings["config"]["batch_size"] == 0
    capsys.readouterr()
    assert _run([*call, str(own), "--to-loss", "-1"]) == 2
    assert "did not reach loss -1 with every seed" in capsys.readouterr().err
    assert _run([*call, str(plan), "--to-loss", "1e6"]) == 2
    assert "give one of the same model" in capsys.readouterr().err


def test_refresh_writes_a_file_that_prices_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gpuhunt", None)
    assert _run(["cost", "--refresh", "now.toml"]) == 2
    assert "pip install 'pipeoptim[prices]'" in capsys.readouterr().err
    offers = [
        SimpleNamespace(provider="aws", instance_name='p5"x', location="us", price=80.0, gpu_count=8, spot=False),
        SimpleNamespace(provider="aws", instance_name="p5", location="eu", price=56.0, gpu_count=8, spot=False),
        SimpleNamespace(provider="gcp", instance_name="a3", location="us", price=5.0, gpu_count=1, spot=True),
    ]
    monkeypatch.setitem(sys.modules, "gpuhunt", SimpleNamespace(query=lambda gpu_name: offers if gpu_name == "h100" else []))
    assert _run(["cost", "--refresh", "now.toml", "--life", "3", "--checkpoint-every", "60"]) == 2
    assert "leave --life, --checkpoint-every out" in capsys.readouterr().err
    assert _run(["cost", "--refresh", "now.toml"]) == 0
    tomllib.loads((tmp_path / "now.toml").read_text())
    book = read_prices(tmp_path / "now.toml")
    assert (book.prices["h100.on_demand"].span.typical, book.prices["h100.spot"].span.typical) == (7.0, 5.0)
    assert _run(["cost", "--refresh", "other.toml", "--accelerator", "z"]) == 2 and not (tmp_path / "other.toml").exists()
