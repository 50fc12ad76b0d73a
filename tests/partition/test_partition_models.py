"""Ordinary models in stages: what they compute, how they train, what each stage holds, and the way back."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

import partition_models as models
import pipeoptim as po
from pipeoptim.partitioning.absent_tensor import AbsentTensor

STEPS = 3


def through(stages, args, kwargs):
    value = stages[0](*args, **kwargs)
    for stage in stages[1:]:
        value = stage(*value) if isinstance(value, tuple) else stage(value)
    return value


def scores(output):
    return output.logits if hasattr(output, "logits") else output


def train_whole(case, m):
    """Unpartitioned: gradients of M micro-batches accumulated, one step per mini-batch."""
    optimizer = models.optimizer(case.model.parameters())
    for _ in range(STEPS):
        for j in range(m):
            args = [a.chunk(m)[j] for a in case.args]
            kwargs = {name: a.chunk(m)[j] for name, a in case.kwargs.items()}
            (case.loss(case.model(*args, **kwargs), case.target.chunk(m)[j]) / m).backward()
        optimizer.step()
        optimizer.zero_grad()
    return case.model.state_dict()


@pytest.mark.parametrize("name", models.CASES)
def test_flush_training_of_stages_equals_training_the_model_and_loads_back_into_its_class(name):
    case = models.case(name)
    start = copy.deepcopy(case.model)
    expected = train_whole(models.case(name), 2)
    costs = None
    for depth in (2, 3, 4):
        model = copy.deepcopy(start)
        cut = po.partition(model, depth, case.args, case.kwargs, costs=costs)
        costs = cut.costs
        assert bool(cut.tied) == name.endswith("_tied")
        pipe = po.Emulator(cut.stages, models.optimizer, case.loss, method="1f1b", microbatches=2)
        for _ in range(STEPS):
            pipe.step(*case.args, target=case.target, **case.kwargs)
        pipe.drain()
        full = cut.full_state_dict()
        assert sorted(full) == sorted(expected)
        for key, value in expected.items():
            assert torch.allclose(full[key], value, rtol=2e-4, atol=2e-6), f"{key} differs at depth {depth}"
        fresh = copy.deepcopy(start)
        fresh.load_state_dict(full)
        with torch.no_grad():
            ours, whole = (
                through([s.eval() for s in cut.stages], case.args, case.kwargs),
                fresh.eval()(*case.args, **case.kwargs),
            )
        assert torch.equal(scores(ours), scores(whole)), "the trained stages and the model that loads them differ"


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_every_stage_holds_its_own_parameters_and_nothing_else(name):
    case = models.case(name)
    whole = sum(p.numel() for p in case.model.parameters())
    cut = po.partition(case.model, 3, case.args, case.kwargs, pins=[2, 3], costs=None)
    held = [{p.data_ptr() for p in stage.parameters()} for stage in cut.stages]
    assert sum(p.numel() for stage in cut.stages for p in stage.parameters()) == whole
    assert not any(a & b for a, b in itertools.combinations(held, 2))
    for stage, names in zip(cut.stages, cut.names, strict=True):
        assert set(names.values()) == set(stage.state_dict())
        tensors = [v for m in stage.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
        assert all(isinstance(t, AbsentTensor) for t in tensors), "a stage holds a tensor that is neither parameter nor buffer"


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_batch_and_length_and_masks_may_differ_from_the_sample(name):
    case = models.case(name)
    model = case.model.eval()
    stages = [s.eval() for s in po.partition(model, 3, case.args, case.kwargs).stages]
    ids = torch.randint(40, (3, 11))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, 6:] = 0
    for kwargs in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            assert torch.equal(through(stages, (ids,), kwargs).logits, model(ids, **kwargs).logits)


@pytest.mark.parametrize(
    ("name", "layers", "blocks"),
    [
        ("gpt2", "transformer.h", [f"transformer.h.{n}" for n in range(4)]),
        ("llama", ["model.layers.1", "model.layers.3"], ["model.layers.1", "model.layers.3"]),
        ("vit", ["vit.layers", "vit.layernorm"], [*(f"vit.layers.{n}" for n in range(4)), "vit.layernorm"]),
    ],
)
def test_lists_and_single_modules_may_be_named(name, layers, blocks):
    case = models.case(name)
    cut = po.partition(case.model, 3, case.args, case.kwargs, layers=layers)
    assert [cost.name for cost in cut.costs] == [*blocks, f"after {blocks[-1]}"]
    assert all(cost.forward > 0 and cost.backward > 0 for cost in cut.costs)
    with torch.no_grad():
        ours = through([stage.eval() for stage in cut.stages], case.args, case.kwargs)
        assert torch.equal(scores(ours), scores(case.model.eval()(*case.args, **case.kwargs)))


def test_tied_weights_are_named_and_copied():
    torch.manual_seed(0)
    case = models.gpt2(tie=True)
    cut = po.partition(case.model, 2, case.args, case.kwargs)
    (tie,) = cut.tied
    assert set(tie.names) == {"transformer.wte.weight", "lm_head.weight"}
    assert [k for k, _ in tie.places] == [0, 1]
    first, second = (dict(cut.stages[k].named_parameters())[name] for k, name in tie.places)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert cut.names[0]["transformer.wte.weight"] == tie.places[0][1]
    assert cut.names[1]["lm_head.weight"] == tie.places[1][1]
    assert "on stages 0, 1" in cut.to_text()
    assert not po.partition(case.model, 1, case.args, case.kwargs).tied


def test_a_trace_keeps_tied_weights_tied_and_leaves_the_model_as_it_was():
    case = models.case("gpt2_tied")
    expected = train_whole(models.case("gpt2_tied"), 1)
    plain = [dict(vars(module)) for module in case.model.modules()]
    for depth in (3, 2):  # again: what tracing leaves in the model would break a second trace
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has modules for dropout
            cut = po.partition(case.model, depth, case.args, case.kwargs, how="trace")
        assert [vars(module).keys() for module in case.model.modules()] == [before.keys() for before in plain]
        (tie,) = cut.tied
        assert set(tie.names) == {"transformer.wte.weight", "lm_head.weight"} and tie.holders == (0, depth - 1)
        embedding = case.model.transformer.wte.weight
        assert cut.stages[0].get_parameter(tie.name_on(0)) is embedding
        assert sum(p.shape == embedding.shape for stage in cut.stages for p in stage.parameters()) == 2
    pipe = po.Emulator(cut.stages, models.optimizer, case.loss, method="1f1b")
    for _ in range(STEPS):
        pipe.step(*case.args, target=case.target, **case.kwargs)
    for key, value in cut.full_state_dict().items():
        assert torch.allclose(expected[key], value, rtol=2e-4, atol=2e-6), f"{key} differs"


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (3, 2)])
def test_a_tied_model_resumes_with_another_number_of_stages(before, after, tmp_path):
    def build(depth):
        case = models.case("gpt2_tied")
        cut = po.partition(case.model, depth, case.args, case.kwargs, costs=models.equal_costs("gpt2_tied"))
        return case, cut, po.Emulator(cut.stages, models.optimizer, case.loss, "1f1b", 2)

    case, cut, pipe = build(before)
    for n in range(2 * STEPS):
        if n == STEPS:
            po.save_sharded(pipe, tmp_path / "saved")
        pipe.step(*case.args, target=case.target, **case.kwargs)
    _, other, resumed = build(after)
    assert not po.load_sharded(resumed, tmp_path / "saved")
    for _ in range(STEPS):
        resumed.step(*case.args, target=case.target, **case.kwargs)
    for key, value in cut.full_state_dict().items():
        assert torch.allclose(other.full_state_dict()[key], value, rtol=2e-4, atol=2e-6), f"{key} differs"


def test_a_model_without_values_is_cut_and_filled_stage_by_stage():
    case = models.case("llama")
    with torch.device("meta"):
        empty = type(case.model)(case.model.config)
    cut = po.partition(empty, 3, case.args, case.kwargs, pins=["model.layers.1", "model.layers.3"])
    assert cut.lengths == [1, 2, 2]
    assert all(p.is_meta for stage in cut.stages for p in stage.parameters())
    weights, stages = case.model.state_dict(), []
    for k, stage in enumerate(cut.stages):
        stage.to_empty(device="cpu")
        stage.load_state_dict({own: weights[name] for name, own in cut.names[k].items()})
        for name, buffer in case.model.named_buffers():  # not in checkpoints; made by the class
            dict(stage.model.named_buffers())[name].copy_(buffer)
        stages.append(stage.eval())
    with torch.no_grad():
        assert torch.equal(through(stages, case.args, {}).logits, case.model.eval()(*case.args).logits)
    with pytest.raises(po.ConfigError, match="meta device"):
        po.partition(empty, 3, case.args)


class Skip(nn.Module):
    """The last layer also sees what the first one made."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        first = x = self.layers[0](x)
        for layer in self.layers[1:3]:
            x = layer(x).tanh() * 0.5
        return self.head(self.layers[3](x + first))


def test_code_between_layers_runs_and_a_cut_across_a_skip_is_refused():
    model, x = Skip(), torch.randn(3, 4)
    cut = po.partition(model, 3, (x,))
    assert cut.lengths == [1, 3, 1]
    torch.testing.assert_close(through(cut.stages, (x,), {}), model(x))
    with pytest.raises(po.ConfigError, match="only 2 of the 4 places .* can be cut"):
        po.partition(model, 4, (x,), how="layers")
    traced = po.partition(model, 5, (x,))  # so it is traced
    assert traced.how == "trace" and traced.lengths == [1] * 5
    assert torch.equal(through(traced.stages, (x,), {}), model(x))
    assert traced.full_state_dict().keys() == model.state_dict().keys()
    with pytest.raises(po.ConfigError, match="traced with \\[3, 4\\]"):
        traced.stages[0](torch.randn(2, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "layer"}, "did you mean layers"),
        ({"layers": ["layers", "layers.0"]}, "names 'layers.0' twice"),
        ({"how": "blocks"}, 'or how="layers"'),
        ({"how": "magic"}, "must be one of auto, blocks, layers"),
        ({"pins": ["layers.9"]}, "known: layers.0"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(options, words):
    with pytest.raises(po.ConfigError, match=words):
        po.partition(Skip(), 2, (torch.randn(3, 4),), **options)


def test_a_forward_that_fails_is_told():
    with pytest.raises(po.ConfigError, match="does not run on sample_args"):
        po.partition(Skip(), 2, (torch.randn(3, 5),))
