"""The prediction of many parameters in one launch on a GPU, written in Triton: every weight and state read once, the result written once.

Imported only where Triton is there (see `triton_move`, which also makes the tables). A program does one block of one parameter and
finds its addresses in a table, so a launch serves any number of parameters of any size. Arithmetic is float32 with torch's own
roundings: true division and square root, no fused multiply-add; all of it hides behind the memory.
"""
# mypy: ignore-errors
# ruff: noqa: N803  (what a kernel is compiled for is written in capitals)

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["terms"])
def move(
    places,
    numbers,
    blocks,
    terms,
    SHARED: tl.constexpr,
    OWN: tl.constexpr,
    ROOTS: tl.constexpr,
    WEIGHT: tl.constexpr,
    OPERAND: tl.constexpr,
    OUT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = w - lose w - sum(scale value / (sqrt(root) inverse + eps))``, without root ``scale value``.

    Args:
        places: per parameter its size and the addresses of w, of out, and of value and root of each operand.
        numbers: per parameter lose, and of each term scale, inverse and eps.
        blocks: per program its parameter, and which of that one's blocks.
        terms: how many terms each has.
        SHARED: whether all terms have the value and root of the first, which are then read once.
        OWN: pairs of operands per parameter: 1 if shared, else one per term.
        ROOTS: bit n: pair n has a root.
        WEIGHT, OPERAND, OUT: types in memory.
        ALIGN: what all addresses are multiples of.
        BLOCK: elements per program.
    """
    block = blocks + 2 * tl.program_id(0).to(tl.int64)
    n = tl.load(block).to(tl.int64)
    start = tl.load(block + 1).to(tl.int64) * BLOCK  # may be beyond 2^31
    place = places + n * (3 + 2 * OWN)
    numbers += n * (1 + 3 * terms)
    left = tl.load(place) - start
    # Two copies of the work: a mask would keep the compiler from reading 16 bytes at a time.
    if left >= BLOCK:
        _block(place, numbers, terms, start, left, SHARED, OWN, ROOTS, WEIGHT, OPERAND, OUT, ALIGN, BLOCK, False)
    else:
        _block(place, numbers, terms, start, left, SHARED, OWN, ROOTS, WEIGHT, OPERAND, OUT, ALIGN, BLOCK, True)


@triton.jit
def _block(
    place,
    numbers,
    terms,
    start,
    left,
    SHARED: tl.constexpr,
    OWN: tl.constexpr,
    ROOTS: tl.constexpr,
    WEIGHT: tl.constexpr,
    OPERAND: tl.constexpr,
    OUT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    within = tl.arange(0, BLOCK)
    inside = within < left
    weight = _read(place + 1, start, within, inside, WEIGHT, ALIGN, MASKED)
    result = weight - tl.load(numbers) * weight
    if SHARED:
        value = _read(place + 3, start, within, inside, OPERAND, ALIGN, MASKED)
        root = value
        if ROOTS:
            root = _read(place + 4, start, within, inside, OPERAND, ALIGN, MASKED)
        for n in range(terms):
            result -= _term(value, root, numbers + 1 + 3 * n, ROOTS)
    else:
        for n in tl.static_range(OWN):
            value = _read(place + 3 + 2 * n, start, within, inside, OPERAND, ALIGN, MASKED)
            root = value
            if (ROOTS >> n) & 1:
                root = _read(place + 4 + 2 * n, start, within, inside, OPERAND, ALIGN, MASKED)
            result -= _term(value, root, numbers + 1 + 3 * n, (ROOTS >> n) & 1)
    out = _pointer(place + 2, start, OUT, ALIGN) + within
    if MASKED:
        tl.store(out, result.to(OUT), mask=inside)
    else:
        tl.store(out, result.to(OUT))


@triton.jit
def _term(value, root, numbers, ROOT: tl.constexpr):
    if ROOT:
        value = tl.div_rn(value, tl.sqrt_rn(root) * tl.load(numbers + 1) + tl.load(numbers + 2))
    return value * tl.load(numbers)


@triton.jit
def _read(address, start, within, inside, TYPE: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    pointers = _pointer(address, start, TYPE, ALIGN) + within
    # The rest of a block counts as ones, which divide no zero by zero.
    found = tl.load(pointers, mask=inside, other=1.0) if MASKED else tl.load(pointers)
    return found.to(tl.float32)


@triton.jit
def _pointer(address, start, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(TYPE)), ALIGN) + start
