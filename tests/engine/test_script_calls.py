"""What a ported script has left over is told in a sentence; what a script may do goes on unhindered."""

import copy
import io
import re
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR

import pipeoptim as po
from pipeoptim.engine.other_names import OTHER_NAMES
from pipeoptim.engine.processes.crowded_cores import CoreUse, own_core_use, warn_of_crowded_cores
from pipeoptim.rules.fused.step import FusedStep

x = torch.ones(4, 4)
mse = nn.functional.mse_loss


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


class Script:
    """A script around a pipeline of three stages, with an optimizer per stage and one over everything from before."""

    def __init__(self, method="pipeoptim", m=1, make=adamw, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        self.optimizers = [make(stage.parameters()) for stage in self.model]
        self.whole = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.pipe = po.Emulator(list(self.model), self.optimizers, mse, method, m, **options)
        self.loss = None

    def train(self, left_over=lambda _: None, steps=4):
        for _ in range(steps):
            self.loss = self.pipe.step(x, target=x)
            left_over(self)
        return self


def made(chain=False):
    script = Script("1f1b")
    rates = [ConstantLR(o, 1.0) for o in script.optimizers]
    script.rates = [ChainedScheduler([rate]) for rate in rates] if chain else rates
    script.pipe = po.Emulator(list(script.model), script.optimizers, mse, "1f1b", schedulers=script.rates)
    return script


def clip(script):
    nn.utils.clip_grad_norm_(script.model.parameters(), 1e-3)


STEP = r"optimizer.step\(\) was called on the optimizer of stage 0, which the pipeline steps itself"
SUMMED = "the gradients of stage 1, of which .* were cleared or changed between mini-batches; remove optimizer.step"
LEFT_OVER = {
    "backward": (Script, lambda s: s.loss.backward(), r"loss.backward\(\) was called on the loss of a mini-batch"),
    "backward, flush": (lambda: Script("1f1b"), lambda s: s.loss.backward(), r"loss.backward\(\) was called"),
    "step": (Script, lambda s: s.optimizers[0].step(), STEP),
    "step, M = 2": (lambda: Script("pipedream", 2), lambda s: s.optimizers[0].step(), STEP),
    "step, flush": (lambda: Script("1f1b", 2), lambda s: s.optimizers[0].step(), STEP),
    "step of a combination": (lambda: Script(make=po.muon_adamw), lambda s: s.optimizers[0].step(), STEP),
    "step of a member": (lambda: Script(make=po.muon_adamw), lambda s: s.optimizers[0].optimizers[1].step(), STEP),
    "zero_grad": (Script, lambda s: s.optimizers[0].zero_grad(), r"zero_grad\(\) was called on the optimizer of stage 0"),
    "those of another one": (lambda: Script(m=2), lambda s: (s.whole.step(), s.whole.zero_grad()), SUMMED),
    "zeros": (lambda: Script(m=2), lambda s: s.whole.zero_grad(set_to_none=False), SUMMED),
    "clipping": (lambda: Script(m=2), clip, SUMMED),
    "scheduler": (made, lambda s: s.rates[0].step(), "scheduler of stage 0 was stepped by the script as well"),
    "chained scheduler": (lambda: made(True), lambda s: s.rates[1].step(), "scheduler of stage 1 was stepped by the script"),
}


@pytest.mark.parametrize("case", LEFT_OVER)
def test_what_is_left_over_is_told(case):
    make, left_over, words = LEFT_OVER[case]
    with pytest.raises(po.ConfigError, match=words) as told:
        make().train(left_over)
    assert len(str(told.value).splitlines()) == 1


def test_an_optimizer_over_the_whole_model_is_no_stage_s():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(
        po.ConfigError, match="holds 2 parameters that are not in the stage's module .* as one over the whole model"
    ):
        po.Emulator(list(model), lambda _: adamw(model.parameters()), mse)


@pytest.mark.parametrize(("method", "m"), [("pipeoptim", 1), ("pipeoptim", 2), ("1f1b", 2)])
def test_after_a_drain_the_optimizers_are_the_script_s(method, m):
    def alone(model, optimizers):
        for optimizer in optimizers:
            optimizer.zero_grad()
        mse(model(x), x).backward()
        for optimizer in optimizers:
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    script = Script(method, m).train()
    script.pipe.drain()
    twin = copy.deepcopy([script.model, script.optimizers])  # copies are nobody's
    found = alone(script.model, script.optimizers)
    same = dict(zip(script.model.parameters(), twin[0].parameters(), strict=True))
    for optimizer in twin[1]:
        for group in optimizer.param_groups:
            group["params"] = [same.get(p, p) for p in group["params"]]
    assert found[0].shape == x.shape
    again = po.Emulator(list(script.model), script.optimizers, mse, method, m)
    for optimizer in script.optimizers:
        optimizer.zero_grad()
    again.step(x, target=x)
    again.drain()
    assert not torch.equal(found[0], script.model[0].weight)


def test_optimizers_of_a_pipeline_that_is_gone_are_the_script_s():
    script = Script().train()
    del script.pipe
    script.optimizers[0].zero_grad()
    mse(script.model(x), x).backward()
    script.optimizers[0].step()


def test_kernels_step_although_calls_are_checked():
    script = Script()
    assert all(FusedStep(optimizer)._unpatched() for optimizer in script.optimizers)
    script.optimizers[0].register_step_pre_hook(lambda *_: None)
    assert not FusedStep(script.optimizers[0])._unpatched()


def test_a_loaded_scheduler_is_not_a_stepped_one():
    script = made().train()
    script.pipe.drain()
    for rate in script.rates:
        rate.load_state_dict({**rate.state_dict(), "last_epoch": rate.last_epoch + 1})
    script.train()


def test_weights_may_be_written_into_where_nothing_is_in_flight_and_after_each_update():
    def shrink(module):
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(0.9)

    Script("1f1b", 2).train(lambda script: shrink(script.model))
    script = Script("pipeoptim", 2, on_update=lambda k, _: shrink(script.model[k]))
    script.train()


def test_the_loss_is_a_tensor_like_any_other():
    loss = Script().train().loss
    plain = loss.detach()
    assert type(plain) is torch.Tensor and isinstance(loss, torch.Tensor) and not loss.requires_grad
    made = [loss + 0, loss.clone(), torch.stack([loss])[0], copy.deepcopy(loss), loss.cpu() + 0, loss.to(torch.float64).float()]
    assert all(type(other) is torch.Tensor and torch.equal(other, plain) for other in made)
    assert (repr(loss), f"{loss:.4f}", str(loss)) == (repr(plain), f"{plain:.4f}", str(plain))
    assert float(loss) == plain.item() == loss.numpy()
    file = io.BytesIO()
    torch.save({"loss": loss}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["loss"]
    assert type(loaded) is torch.Tensor and torch.equal(loaded, plain)


USES = {
    "all cores in each": ([CoreUse("a", 2, [0, 1])] * 2, [r"2 processes .* 4 threads on 2 cores .*set_num_threads\(1\)", ""]),
    "more cores": ([CoreUse("a", 8, range(8))] * 2, [r"16 threads on 8 cores .*OMP_NUM_THREADS=4", ""]),
    "one each": ([CoreUse("a", 1, [0, 1])] * 4, [""] * 4),
    "pinned": ([CoreUse("a", 2, [0, 1]), CoreUse("a", 2, [2, 3])], ["", ""]),
    "two machines": ([CoreUse("a", 2, [0, 1]), CoreUse("b", 2, [0, 1])], ["", ""]),
    "two of three": ([CoreUse(), CoreUse("a", 2, [0]), CoreUse("a", 2, [0])], ["", r"2 processes .* on 1 core ", ""]),
    "on a GPU": ([CoreUse("a", 0, [0, 1])] * 2, ["", ""]),
}


@pytest.mark.parametrize("case", USES)
def test_more_threads_than_cores_are_told_by_one_process(case):
    uses, told = USES[case]
    for index, words in enumerate(told):
        if words:
            with pytest.warns(UserWarning, match=words):
                warn_of_crowded_cores(uses, index)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warn_of_crowded_cores(uses, index)
    assert own_core_use(False).threads == 0 < own_core_use(True).threads


def test_the_model_that_was_cut_is_not_called_while_its_stages_have_different_versions():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    cut = po.partition(model, 3, pins=[1, 2])
    pipe = po.Emulator(cut, adamw, mse, microbatches=2)
    model(x)
    pipe.step(x, target=x)
    for evaluated in (model, lambda _: model.eval()(x)):
        with pytest.raises(
            po.ConfigError, match=r"was called while mini-batches are in flight, .*call drain\(\) first, or pipe.evaluate"
        ):
            evaluated(x)
    pipe.step(x, target=x)  # nothing was disturbed
    torch.save(model, io.BytesIO())
    copy.deepcopy(model)(x)  # its weights are its own
    copy.deepcopy(cut.stages[0])(x)
    loss = pipe.evaluate([(x, x)]).loss
    assert loss == pytest.approx(mse(model(x), x).item())  # drained
    pipe.step(x, target=x)
    newer = po.Emulator(cut, adamw, mse, microbatches=2)
    model(x)  # the weights are the newer's, with nothing in flight
    newer.step(x, target=x)
    with pytest.raises(po.ConfigError, match="in flight"):
        model(x)
    del pipe, newer
    model(x)  # nobody trains it any more


def test_methods_that_flush_leave_the_model_free():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
    pipe = po.Emulator(po.partition(model, 2, pins=[1]), adamw, mse, "1f1b", 2)
    pipe.step(x, target=x)
    model(x)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_names_of_other_objects_say_what_a_pipeline_has_instead(name):
    pipe = Script().pipe
    assert not hasattr(pipe, name)  # a name that it has one day leaves the list
    with pytest.raises(AttributeError, match=f"Emulator has no '{name}': "):
        getattr(pipe, name)


def test_other_names_get_pythons_own_error_and_a_property_its_own():
    class Pipe(po.Emulator):
        @property
        def broken(self):
            return self.nothing_like_that

    pipe = Pipe(list(Script().model), adamw, mse)
    with pytest.raises(AttributeError, match="'Pipe' object has no attribute 'foo'"):
        _ = pipe.foo
    with pytest.raises(AttributeError, match="has no attribute 'nothing_like_that'"):
        _ = pipe.broken


def test_what_the_list_of_other_names_recommends_is_there():
    named = {word for text in OTHER_NAMES.values() for word in re.findall(r"(po\.\w+|\b\w+(?=\())", text)}
    pipe, made = Script().pipe, {"parameters", "train"}  # of the module that stage_module(k) returns
    for word in named - made:
        assert hasattr(po, word[3:]) if word.startswith("po.") else hasattr(pipe, word), word
