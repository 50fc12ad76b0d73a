"""The prediction's kernel for GPUs: interpreted on the CPU against float64, and compiled for GPUs that need not be there.

Triton's interpreter runs the kernel as it is, on addresses of the CPU's memory. Where there is a GPU the same tests run the compiled one.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeoptim.kernels import triton_move
from pipeoptim.kernels.tensor_layout import share_flat_index, share_memory_order
from pipeoptim.rules import RULES, interpreters
from pipeoptim.rules.entries import parameter_entries
from pipeoptim.rules.horizon import Horizon
from pipeoptim.rules.interpreters import ApplyMode, MoveBatch
from pipeoptim.rules.lr import next_rates
from pipeoptim.rules.move import Move, Term
from pipeoptim.rules.registry import RULE_KINDS
from pipeoptim.rules.rule_moves import predict_by_rule
from rules_cases import CASES, train, values_of, weights_of

pytest.importorskip("triton", reason="no Triton here")

SMALL = 16  # elements per program while interpreting
DTYPES = triton_move.TYPES
BITS = {torch.float32: 24, torch.bfloat16: 7, torch.float16: 11}
"""Of a result that is rounded to nearest; the interpreter cuts bfloat16 off instead, so one less of it is asked for."""
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))


def interpreted_kernel() -> Any:
    """A second copy of the kernel's module, made while Triton interprets."""
    spec = importlib.util.find_spec("pipeoptim.kernels.triton_source")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module.move


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernel runs: on "cpu" it is interpreted."""
    monkeypatch.setattr(triton_move, "_failed", [])
    if request.param == "cpu":
        kernel = interpreted_kernel()
        monkeypatch.setattr(triton_move, "_kernel", lambda: kernel)
        monkeypatch.setattr(triton_move, "BLOCK", SMALL)
    name: str = request.param
    return name


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[triton_move.Form]:
    """The forms of all launches."""
    seen: list[triton_move.Form] = []
    real = triton_move._launch
    monkeypatch.setattr(triton_move, "_launch", lambda form, *rest: (seen.append(form), real(form, *rest))[1])
    return seen


# ---- every rule --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", RULES, ids=lambda c: c.__name__)
def test_every_rule_is_written_as_by_the_plain_path(cls: Any, device: str, launches: list[triton_move.Form]) -> None:
    own = [case for case in CASES if case.cls is cls and "tensor_lr" not in case.name]
    assert own or not cls.__module__.startswith("torch.optim")
    for case in own:
        optimizer = case.make(dtype=torch.float32)
        if device != "cpu":
            optimizer = case.cls([torch.nn.Parameter(w.detach().to(device)) for w in weights_of(optimizer)], **case.settings)
        train(optimizer, 2)
        for kind in [kind for kind in RULES[cls].kinds if kind in RULE_KINDS]:
            before = len(launches)
            results = [by_mode(optimizer, kind, mode) for mode in ("plain", "triton")]
            assert len(launches) > before or all(map(torch.equal, results[0], weights_of(optimizer))), (case.name, kind)
            for plain, ours in zip(*results, strict=True):
                torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6 * max(1.0, float(plain.abs().max())))


def by_mode(optimizer: Any, kind: str, mode: ApplyMode) -> list[Tensor]:
    out = [torch.full_like(w, float("nan")) for w in values_of(optimizer)]
    predict_by_rule(
        parameter_entries(optimizer, kind),
        [w.grad for w in weights_of(optimizer)],
        Horizon(3, next_rates(optimizer, None, 3)),
        out,
        mode,
    )
    return out


# ---- any move ----------------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-2, 2, width=16)
FORMS = ("plain", "transposed", "channels_last", "unaligned")
SHAPES = [(), (0, 3), (1,), (SMALL,), (3, 5), (2 * SMALL + 1,), (2, 3, 4, 5)]


def laid_out(values: Tensor, form: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """The values in memory as ``form`` says, and that memory, which is NaN everywhere else."""
    if form == "channels_last" and values.dim() != 4:
        form = "plain"
    dims = {"transposed": tuple(range(values.dim()))[::-1], "channels_last": (0, 2, 3, 1)}.get(form, range(values.dim()))
    order = values.permute(tuple(dims))
    memory = torch.full((values.numel() + 24,), float("nan"), dtype=dtype, device=device)
    start = 8 + (form == "unaligned")  # 8 elements are at least 16 bytes
    inside = memory[start : start + values.numel()].view(order.shape).copy_(order)
    back = sorted(range(values.dim()), key=lambda d: tuple(dims)[d])
    return inside.permute(tuple(back)), memory


@st.composite
def drawn_moves(draw: st.DrawFn, device: str) -> tuple[list[Tensor], list[Move], list[Tensor], list[Tensor]]:
    """Weights, moves, buffers, and the memory that the buffers lie in."""
    weights, moves, outs, memories = [], [], [], []
    torch.manual_seed(draw(st.integers(0, 99)))
    for _ in range(draw(st.integers(1, 4))):
        shape, form = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(FORMS))
        types = draw(st.tuples(*[st.sampled_from(DTYPES)] * 3))

        def tensor(dtype: torch.dtype, positive: bool = False, shape: Any = shape, form: str = form) -> Tensor:
            values = torch.randn(shape)
            return laid_out(values.abs() + 0.5 if positive else values, form, dtype, device)[0]

        operands = [(tensor(types[1]), tensor(types[1], True)) for _ in range(draw(st.integers(0, 3)))]
        if draw(st.booleans()):
            operands = operands[:1] * draw(st.integers(1, 4))
        terms = [
            Term(draw(NUMBERS), value, root if draw(st.booleans()) else None, draw(st.floats(0.5, 2)), draw(st.floats(0, 1)))
            for value, root in operands
        ]
        out, memory = laid_out(torch.full(shape, float("nan")), form, types[2], device)
        weights.append(tensor(types[0]))
        moves.append(Move(tuple(terms), draw(st.one_of(st.just(1.0), NUMBERS))))
        outs.append(out)
        memories.append(memory)
    return weights, moves, outs, memories


def exact(weight: Tensor, move: Move) -> tuple[Tensor, Tensor]:
    """The result in float64, and the sum of the sizes of what is added up, which rounding errors grow with."""
    result, size = weight.double() * move.keep, weight.double().abs() * (1 + abs(move.keep))
    for term in move.terms:
        step = term.value.double()
        if term.root is not None:
            step = step / (term.root.double().sqrt() / term.root_divisor + term.eps)
        result, size = result - step * term.scale, size + (step * term.scale).abs()
    return result, size


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_moves_are_those_of_float64_and_nothing_else_is_written(data: st.DataObject, device: str) -> None:
    weights, moves, outs, memories = data.draw(drawn_moves(device))
    originals = [w.clone() for w in weights]
    assert interpreters.apply_by_triton(weights, moves, outs)
    for weight, original, move, out, memory in zip(weights, originals, moves, outs, memories, strict=True):
        expected, size = exact(weight, move)
        error = (out.double() - expected).abs()
        allowed = 4 * 2**-23 * size + 2.0 ** -BITS[out.dtype] * expected.abs() + (2.0**-24 if out.dtype is torch.float16 else 0)
        assert bool((error <= allowed).all()), (error - allowed).max()
        assert int(memory.isnan().sum()) == memory.numel() - out.numel()
        assert torch.equal(weight, original)


def test_offsets_beyond_2_to_the_31_elements(device: str) -> None:
    """The last block of a tensor of 2^33 elements, of which only that block exists."""
    form = triton_move.Form(torch.device(device), (torch.float32,) * 3, 1, False, 0, 16)
    block = triton_move.BLOCK
    weight, value, out = torch.randn(block, device=device), torch.randn(block, device=device), torch.zeros(block, device=device)
    number = (1 << 33) // block
    start = number * block
    places = torch.tensor([start + block - 3, *(t.data_ptr() - 4 * start for t in (weight, out, value)), 0], device=device)
    blocks = torch.tensor([[0, number]], dtype=torch.int32, device=device)
    numbers = torch.tensor([0.0, 2.0, 1.0, 0.0], device=device)
    triton_move._kernel()[(1,)](places, numbers, blocks, 1, **triton_move.constants(form), **triton_move.OPTIONS)
    assert torch.equal(out[:-3], (weight - 2 * value)[:-3])
    assert not out[-3:].any()
    table = triton_move._blocks((1, (1 << 31) + 1), 1 << 20, torch.device("cpu"), 0)
    assert table[0].tolist() == [0, 0] and table[1].tolist() == [1, 0] and table[-1].tolist() == [1, 1 << 11]


# ---- what is kept, and what is not taken ---------------------------------------------------------------------------------------


def test_addresses_are_sent_once_and_again_when_something_moved(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.dtype] = []
    real = triton_move._on
    monkeypatch.setattr(triton_move, "_on", lambda where, table: (sent.append(table.dtype), real(where, table))[1])
    weights = [torch.randn(n, device=device) for n in (5, 40)]
    values, others, out = ([torch.randn_like(w) for w in weights] for _ in range(3))

    def run(values: Sequence[Tensor], scale: float) -> list[torch.dtype]:
        sent.clear()
        moves = [Move((Term(scale, value),)) for value in values]
        assert interpreters.apply_by_triton(weights, moves, out)
        for weight, value, buffer in zip(weights, values, out, strict=True):
            torch.testing.assert_close(buffer, weight - scale * value)
        return sent

    triton_move._places.cache_clear()
    triton_move._blocks.cache_clear()
    assert sorted(map(str, run(values, 0.5))) == ["torch.float32", "torch.int32", "torch.int64"]
    assert run(values, 0.25) == [torch.float32]  # the formula's numbers alone
    assert run(others, 0.25) == [torch.int64, torch.float32]
    assert run(values, 0.5) == [torch.float32]


def test_parameters_of_one_form_share_a_launch(device: str, launches: list[triton_move.Form]) -> None:
    weights = [torch.randn(n, device=device) for n in range(1, 30)]
    kept = [torch.rand_like(w) for w in weights]
    outs = [torch.empty_like(w) for w in weights]
    batch = MoveBatch("triton")
    for n, (weight, value, out) in enumerate(zip(weights, kept, outs, strict=True)):
        batch.add(weight, Move((Term(0.1 * n, value, value if n % 2 else None, 1.0, 0.1),), 1.0 - 0.01 * n), out)
    batch.flush()
    assert len(launches) == 2  # with root, and without


def test_numbers_that_lie_on_the_device_are_not_read(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As step counts and learning rates with ``fused=True`` or ``capturable=True`` do on a GPU."""
    weights = [torch.randn(n, device=device) for n in (5, 40)]
    values, roots = [torch.randn_like(w) for w in weights], [torch.rand_like(w) for w in weights]
    numbers = [torch.tensor(x, device=device, dtype=torch.float64) for x in (0.9, 2.0, 0.5, 0.1)]
    moves = [Move((Term(numbers[1], v, r, numbers[2], numbers[3]),), numbers[0]) for v, r in zip(values, roots, strict=True)]
    moves[0] = Move((Term(2.0, values[0], roots[0], numbers[2], 0.1),), 0.9)
    outs = [torch.empty_like(w) for w in weights]
    with monkeypatch.context() as patch:
        for reading in ("item", "tolist", "__float__"):
            patch.setattr(Tensor, reading, lambda self: pytest.fail("read"))
        batch = MoveBatch("triton")
        for weight, move, out in zip(weights, moves, outs, strict=True):
            assert interpreters._triton_can(weight, move, out, "triton")
            batch.add(weight, move, out)
        batch.flush()
    for weight, value, root, out in zip(weights, values, roots, outs, strict=True):
        torch.testing.assert_close(out, 0.9 * weight - 2.0 * value / (root.sqrt() / 0.5 + 0.1))


def test_only_what_lies_at_multiples_of_16_bytes_is_read_16_at_a_time() -> None:
    memory = torch.zeros(100)
    start = -memory.data_ptr() // 4 % 4
    aligned, not_aligned = memory[start : start + 5], memory[start + 1 : start + 6]
    for w, out, value, root, align in [
        (aligned, aligned, aligned, aligned, 16),
        (aligned, aligned, aligned, None, 16),
        (aligned, aligned, aligned, not_aligned, 1),
        (not_aligned, aligned, aligned, aligned, 1),
        (aligned, not_aligned, aligned, None, 1),
    ]:
        assert triton_move._form(triton_move.TritonMove(w, out, (triton_move.TritonTerm(value, 1.0, root),)))[0].align == align


def test_what_the_kernel_cannot_take_goes_another_way(device: str, launches: list[triton_move.Form]) -> None:
    class Own(Tensor):
        pass

    image = torch.randn(2, 3, 4, 5, device=device)
    odd: list[tuple[Tensor, Tensor, Any]] = [
        (image, image.contiguous(memory_format=torch.channels_last), 0.5),
        (image.double(), image.double(), 0.5),
        (image[..., ::2], image[..., ::2], 0.5),
        (image.as_subclass(Own), image, 0.5),
        (image, image.double(), 0.5),
        (image, image.clone(), torch.tensor([0.5], device=device)),
    ]
    for weight, value, scale in odd:
        out = torch.empty_like(weight)
        batch = MoveBatch("triton")
        batch.add(weight, Move((Term(scale, value),)), out)
        batch.flush()
        torch.testing.assert_close(out, weight - (0.5 * value).to(weight.dtype))
    assert not launches


def test_on_a_cpu_nobody_asks_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_move, "can", lambda *_: pytest.fail("asked"))
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(3, dtype=dtype)
        out = torch.empty_like(weight)
        batch = MoveBatch()
        batch.add(weight, Move((Term(0.5, weight),)), out)
        batch.flush()
        assert out.tolist() == [0.5] * 3


def broken(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton that does not work: absent, or one whose compiler fails."""
    triton_move._kernel.cache_clear()
    if kernel == "absent":
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "pipeoptim.kernels.triton_source", raising=False)
        monkeypatch.delattr("pipeoptim.kernels.triton_source", raising=False)
        return

    class Failing:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    monkeypatch.setattr(triton_move, "_kernel", Failing)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_move, "_failed", [])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    kept = triton_move._kernel
    yield
    kept.cache_clear()


@pytest.mark.parametrize("kernel", ["absent", "failing"])
@pytest.mark.usefixtures("fresh")
def test_without_a_triton_that_works_it_goes_on_and_says_so_once(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(kernel, monkeypatch)
    optimizer = CASES[0].make(dtype=torch.float32)
    train(optimizer, 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # As on a GPU, where `triton` is what "auto" means.
        monkeypatch.setattr(interpreters, "_triton_can", lambda *_: triton_move.available())
        results = [by_mode(optimizer, "refined", "triton") for _ in range(2)]
    plain = by_mode(optimizer, "refined", "plain")
    for ours in results:
        torch.testing.assert_close(ours, plain)
    why = "No module named|import of triton halted" if kernel == "absent" else "RuntimeError: Failed to find C compiler"
    assert len(said) == 1
    assert re.search(f"goes on without its Triton kernel.*({why}).*PIPEOPTIM_KERNELS=0", str(said[0].message))


@pytest.mark.usefixtures("fresh")
def test_switched_off_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_move._kernel.cache_clear()
    monkeypatch.setenv("PIPEOPTIM_KERNELS", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton_move.available()


# ---- compiled for GPUs that need not be there --------------------------------------------------------------------------------

F32, BF16, F16 = DTYPES
COMPILED = {  # types of weight, operands and result; terms, whether they share operands, whether they have roots
    "Adam": ((F32, F32, F32), 1, False, True),
    "SGD momentum": ((F32, F32, F32), 1, False, False),
    "SGD nesterov": ((F32, F32, F32), 2, False, False),
    "decayed Adam": ((F32, F32, F32), 3, True, True),
    "bfloat16": ((BF16, BF16, BF16), 1, False, True),
    "into bfloat16": ((F32, F32, BF16), 1, False, True),
    "into float16": ((F32, F32, F16), 1, False, True),
}


def compiled(job: triton_move.TritonMove, generation: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a launch for that job is compiled to on a GPU of that generation. All is as on a GPU but the launch itself."""
    import triton
    from triton.backends.compiler import GPUTarget

    from pipeoptim.kernels import triton_source

    made: list[Any] = []

    class OnlyCompiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: made.append(triton_source.move.warmup(*args, grid=grid, **options))

    driver = SimpleNamespace(
        get_current_device=lambda: 1000 + generation,  # what is compiled is kept by this number
        get_current_target=lambda: GPUTarget("cuda", generation, 32),
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton_move, "_kernel", OnlyCompiled)
    monkeypatch.setattr(triton_move, "_failed", [])
    assert triton_move.run_moves([job]), triton_move._failed
    return made[0]


@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_to_wide_loads(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the copy without mask each thread takes 16 bytes at a time of every stream, once, and nothing is fused or approximate."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types, terms, shared, rooted = COMPILED[name]

    def job(shift: int) -> triton_move.TritonMove:
        def tensor(dtype: torch.dtype) -> Tensor:
            return laid_out(torch.zeros(3000), "unaligned" if shift else "plain", dtype, "cpu")[0]

        operands = [(tensor(types[1]), tensor(types[1]) if rooted else None) for _ in range(1 if shared else terms)]
        own = (operands * terms)[:terms]
        return triton_move.TritonMove(
            tensor(types[0]), tensor(types[2]), tuple(triton_move.TritonTerm(value, 0.5, root) for value, root in own)
        )

    pairs = 1 if shared else terms
    streams = [types[0]] + [types[1]] * (2 * pairs if rooted else pairs)
    per_thread = triton_move.BLOCK // (32 * triton_move.OPTIONS["num_warps"])
    for generation in (80, 90) if name == "Adam" else (90,):
        made = compiled(job(0), generation, monkeypatch)
        assert len(made.asm["cubin"]) > 1000  # machine code
        assert wide("ld", made) == sum(per_thread * dtype.itemsize // 16 for dtype in streams)
        assert wide("st", made) == per_thread * types[2].itemsize // 16
        assert made.metadata.shared == 0
        ptx = made.asm["ptx"]
        assert set(re.findall(r"\b(?:fma|sqrt|div)\.\S*f32", ptx)) == ({"sqrt.rn.f32", "div.rn.f32"} if rooted else set())
        rounded = set(re.findall(r"\bcvt\.r\w\.b?f16\S*", ptx))
        assert bool(rounded) == (types[2].itemsize == 2)
        assert all(op.startswith("cvt.rn.") for op in rounded), rounded  # to nearest, which the interpreter does not show
    assert not wide("ld", compiled(job(1), 90, monkeypatch))


def wide(what: str, made: Any) -> int:
    """How many instructions of the kernel load or store 16 bytes per thread."""
    return len(re.findall(rf"\b{what}\.global\S*\.v4\.b32\b", made.asm["ptx"]))


# ---- memory ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_flat_is_in_step_for_float32_on_a_cpu(form: str, other: str) -> None:
    values = torch.randn(2, 3, 4, 5)
    pair = [laid_out(values, f, torch.float32, "cpu")[0] for f in (form, other)]
    assert share_flat_index(pair) == share_memory_order(pair) == ({form, other} <= {"plain", "unaligned"} or form == other)
    assert share_memory_order([pair[0], pair[0].bfloat16()]) and not share_flat_index([pair[0], pair[0].bfloat16()])
