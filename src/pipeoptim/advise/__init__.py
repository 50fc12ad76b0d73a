"""Which regime is mine: the choice of method, M, slack and prediction, with the reasons and the expected cost."""

from pipeoptim.advise.advice import Advice, Settled, advise, automatic
from pipeoptim.advise.decision import Choice, Question, decide
from pipeoptim.advise.diagram import to_mermaid
from pipeoptim.advise.evidence import Evidence, evidence, nearest
from pipeoptim.advise.situation import Situation

__all__ = [
    "Advice",
    "Choice",
    "Evidence",
    "Question",
    "Settled",
    "Situation",
    "advise",
    "automatic",
    "decide",
    "evidence",
    "nearest",
    "to_mermaid",
]
