"""Who was given fewer than others, by what processes have noted of themselves when a wait fails."""

import pytest

from pipeoptim.engine.processes.progress import _compared


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        (["ended 4 0", "trains 7 0", "trains 6 0"], "stage 0 ended after 4 mini-batches, but stage 1 was given 7"),
        (["trains 6 0", "evaluates 4 0", "trains 5 0"], "stage 1 ended after 4 mini-batches, but stage 0 was given 6"),
        # The last one is in the middle of its evaluation, and says nothing of where that ends.
        (["ended 4 2", "evaluates 4 3", "evaluates 4 0"], "stage 0 ended after 2 batches to evaluate, but stage 1 was given 3"),
        (["evaluates 4 5", "ended 4 2", "evaluates 4 2"], "stage 1 ended after 2 batches to evaluate, but stage 0 was given 5"),
        (["evaluates 4 5", "evaluates 4 0", "trains 4 0"], ""),
        (["ended 4 3", "evaluates 4 2", "ended 4 3"], ""),
        (["trains 4 0", "trains 5 0"], ""),
    ],
)
def test_the_process_that_has_ended_first_is_named(notes, said):
    found = _compared("stage {}", dict(enumerate(notes)))
    assert found.partition(";")[0] == said
