"""What a run costs before it runs, and what it has cost so far: money, energy and carbon, with what is unknown left unknown."""

from pipeoptim.money.estimate import Estimate, estimate
from pipeoptim.money.price_book import PriceBook, read_prices
from pipeoptim.money.priced_run import PricedRun, read_plan
from pipeoptim.money.terms import Terms

__all__ = ["Estimate", "PriceBook", "Terms", "PricedRun", "estimate", "read_plan", "read_prices"]
