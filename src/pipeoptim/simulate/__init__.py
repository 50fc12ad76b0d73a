"""What a run will be like before it runs: the engines' own action program with the seconds of a profile. Nothing is trained here."""

from pipeoptim.failures import Failures
from pipeoptim.simulate.profile import Profile, read_profile
from pipeoptim.simulate.result import Interval, SimulatedStage, Simulation
from pipeoptim.simulate.scenario import Conditions, Scenario, even_cut
from pipeoptim.simulate.simulate import simulate
from pipeoptim.simulate.synthetic import TransformerSizes, read_sizes, synthetic

__all__ = [
    "Conditions",
    "Failures",
    "Interval",
    "Profile",
    "Scenario",
    "SimulatedStage",
    "Simulation",
    "TransformerSizes",
    "even_cut",
    "read_profile",
    "read_sizes",
    "simulate",
    "synthetic",
]
