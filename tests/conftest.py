"""One thread per process, as everywhere in this project: two cores are shared by tests that start several processes."""

import os
import tempfile

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="pipeoptim-tests-")  # the key that signs runs is not the user's
settings.register_profile("pipeoptim", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pipeoptim")
