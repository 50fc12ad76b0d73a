"""``pipeoptim cost``: what a planned run costs, in a cloud, on hardware of one's own, and on both."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from pipeoptim.cli.new_files import check_new_files
from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    from pipeoptim.money.triangular import Triangular


def cost(
    plan: Annotated[Path | None, Option(help="A file of pipeoptim plan --objective ... --out.")] = None,
    samples: Annotated[float | None, Option(help="Rows that the run trains on, as 3e8.")] = None,
    to_loss: Annotated[
        float | None,
        Option(help="Instead of --samples: as many as the plan's method needed for this validation loss in --compared."),
    ] = None,
    compared: Annotated[Path | None, Option(help="With --to-loss: the folder of a comparison of the plan's model.")] = None,
    accelerator: Annotated[
        str, Option(help="Whose prices each device has: h100, a100, or a table of your own prices.")
    ] = "h100",
    prices: Annotated[
        Path | None,
        Option(help="TOML file of your own prices, in the form of the package's prices.toml (docs/cost.md); they go first."),
    ] = None,
    people: Annotated[
        float | None, Option(help="Who look after the run while it lasts, in full-time people; unknown by default.")
    ] = None,
    life: Annotated[float, Option(help="Years in which own hardware is written off.")] = 5.0,
    utilisation: Annotated[
        float,
        Option(help="Share of its time in which own or reserved hardware is used, by this run or others; 0.7 is a guess."),
    ] = 0.7,
    stored: Annotated[float, Option(help="GB of data that are kept for the run, beside two checkpoints.")] = 0.0,
    sent: Annotated[float, Option(help="GB that leave the cloud, beside a checkpoint.")] = 0.0,
    recovery: Annotated[
        str, Option(help="Seconds from a failure until training goes on: one number, or the least and the most.")
    ] = "60,1800",
    checkpoint_every: Annotated[float, Option(help="Seconds of work between two checkpoints.")] = 600.0,
    checkpoint_seconds: Annotated[float, Option(help="Seconds that training waits for a checkpoint.")] = 0.0,
    own_stages: Annotated[
        int | None, Option(help="The first stages, on own hardware where both are used; half of them by default.")
    ] = None,
    draws: Annotated[int, Option(help="How often prices, failures and recoveries are drawn.")] = 1000,
    seed: Annotated[int, Option(help="Of the draws.")] = 0,
    out: Annotated[Path | None, Option(help="Also write all figures, assumptions and sources into this JSON file.")] = None,
    refresh: Annotated[
        Path | None, Option(help="Only write today's prices of --accelerator, by gpuhunt, into this TOML file, for --prices.")
    ] = None,
) -> None:
    """Say what a planned run costs: in a cloud (on demand, reserved, spot), on hardware of your own, and on both.

    Every price is an interval, from the quotes in the package's prices.toml or in your own file, each with its source and date. Prices,
    failures and recovery times are drawn from their intervals; 10, 50 and 90 % of the draws stay below the totals that are shown. What
    has no source is unknown, and its total says so; it is never counted as 0. docs/cost.md explains each line.

    \b
    Examples:
      pipeoptim plan --objective cost --synthetic --sizes layers=32 --devices 16 --stages 16 --out plan.json
      pipeoptim cost --plan plan.json --samples 1e7
          A plan for 16 devices, and what 10 million sequences cost on them.
      pipeoptim cost --plan plan.json --samples 1e7 --people 0.5 --utilisation 0.4 --prices mine.toml
          With half an engineer, on hardware that is used 40 % of its time, at your own prices.
      pipeoptim cost --plan plan.json --to-loss 1.9 --compared runs/compare-chars
          As many samples as the comparison needed for that loss.
      pipeoptim cost --accelerator h100 --refresh today.toml
          Look today's prices up.
      pipeoptim cost --plan plan.json --samples 1e7 --out cost.json && pipeoptim report plan.json --cost cost.json
          All of it on one page.
    """
    options = dict(locals())
    from datetime import date

    check_new_files({"--out": out, "--refresh": refresh})
    today = date.today()
    if refresh is not None:
        defaults = inspect.signature(cost).parameters.items()
        given = [name for name, one in defaults if options[name] != one.default and name not in ("accelerator", "refresh")]
        if given:
            others = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"--refresh only looks prices up; leave {others} out, and give the file to --prices then")
        from pipeoptim.money.refresh import refresh_prices

        print(f"{refresh_prices(accelerator, refresh, today)} quotes written to {refresh}; use them with --prices {refresh}")
        return
    if plan is None:
        raise ConfigError("give --plan FILE, which pipeoptim plan --objective cost --out FILE writes")
    from pipeoptim.cli.cost_table import sentences, show_estimate
    from pipeoptim.files import write_durably
    from pipeoptim.money import Terms, estimate, read_plan, read_prices
    from pipeoptim.version import __version__

    book = read_prices(prices)
    book.check_accelerator(accelerator)
    terms = Terms(
        accelerator=accelerator,
        life=life,
        utilisation=utilisation,
        people=people,
        stored=stored,
        sent=sent,
        recovery=_recovery(recovery),
        checkpoint_every=checkpoint_every,
        checkpoint=checkpoint_seconds,
        own_stages=own_stages,
    )
    work = read_plan(plan, _samples(plan, samples, to_loss, compared))
    found = estimate(work, book, terms, draws, seed)
    show_estimate(found)
    warnings = book.warnings(accelerator, today)
    for warning in warnings:
        print(f"warning: {warning}")
    if out is not None:
        about: dict[str, Any] = {"format": 1, "pipeoptim": __version__, "plan": str(plan), "draws": draws, "seed": seed}
        told = {"findings": [sentence.lstrip("* ") for sentence in sentences(found)], "warnings": warnings}
        data = about | found.to_dict() | told | {"prices": book.to_dict(accelerator)}
        write_durably(out, json.dumps(data, indent=1, allow_nan=False) + "\n")


def _recovery(text: str) -> Triangular:
    """One number of seconds, or the least and the most, whose geometric mean is typical."""
    from pipeoptim.money.triangular import Triangular

    try:
        parts = [float(part) for part in text.split(",")]
        low, high = parts if len(parts) == 2 else parts * 2
    except ValueError:
        raise ConfigError(f"recovery is {text!r}, must be seconds, or the least and the most: 60,1800") from None
    return Triangular(low, (low * high) ** 0.5 if low >= 0 and high >= 0 else low, high)


def _samples(plan: Path, samples: float | None, to_loss: float | None, compared: Path | None) -> Triangular:
    from pipeoptim.money.triangular import Triangular

    if samples is not None and to_loss is None and compared is None:
        return Triangular(samples, samples, samples)
    if samples is None and to_loss is not None and compared is not None:
        from pipeoptim.compare.to_loss import samples_to_loss
        from pipeoptim.money import read_plan

        work = read_plan(plan, Triangular(1.0, 1.0, 1.0))
        return Triangular(*samples_to_loss(compared, work.model, work.method, to_loss))
    if (samples is None) == (to_loss is None):
        raise ConfigError("give either --samples, rows that the run trains on, or --to-loss with --compared")
    raise ConfigError(
        "--to-loss and --compared belong together: a validation loss, and the comparison that says how long it takes"
    )
