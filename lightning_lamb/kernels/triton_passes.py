"""The passes of the Triton kernel: what runs on the device. `triton` launches them and explains the table they read."""

# ruff: noqa: ANN001, ANN201, ANN202 - Triton reads its own annotations
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(8192)
"""Elements per program."""
BLOCK = tl.constexpr(2048)
"""Elements at a time."""
PARTS = tl.constexpr(256)
"""Tiles added at a time."""

# The table begins with numbers of the whole batch; rows of one entry per layer follow.
KEEP1, TAKE1, KEEP2, TAKE2, EPS, DECAY, BOUND, SIGN, PHI_LOW, PHI_HIGH, RATIO_LOW, RATIO_HIGH = (
    tl.constexpr(i) for i in range(12)
)
NUMBERS = tl.constexpr(12)
SIZE, WEIGHT, GRADIENT, FIRST, SECOND, PARAMETER, SEED, FIRST_TILE = (tl.constexpr(i) for i in range(8))
MOMENT1, GRAD, MOMENT2, GRAD_SQUARE, SCALE = (tl.constexpr(i) for i in range(5))
ADAM, MOMENTUM = tl.constexpr(0), tl.constexpr(1)
L2, L1, LINF, NO_NORM = (tl.constexpr(i) for i in range(4))


@triton.jit
def _number(table, index):
    """A float64 that the table holds as an integer."""
    return tl.load(table + index).to(tl.float64, bitcast=True)


@triton.jit
def _entry(table, row: tl.constexpr, layer, layers):
    """What a row of the table says about a layer."""
    return tl.load(table + NUMBERS + row * layers + layer)


@triton.jit
def _address(table, row: tl.constexpr, layer, layers, dtype: tl.constexpr, aligned: tl.constexpr):
    """Where a layer's tensor begins; ``aligned``: at a multiple of 16 bytes, which allows wide loads."""
    address = _entry(table, row, layer, layers).to(tl.pointer_type(dtype))
    if aligned:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _scalar(table, index: tl.constexpr, real: tl.constexpr):
    """A number of the batch in the type of the computation."""
    return _number(table, index).to(real)


@triton.jit
def _addresses(
    table, layer, layers, aligned: tl.constexpr,
    real: tl.constexpr, grad_type: tl.constexpr, moment_type: tl.constexpr, copy_type: tl.constexpr,
):  # fmt: skip
    """Of a layer's weight, gradient, moments and half-precision parameter; nonsense where there is none."""
    return (
        _address(table, WEIGHT, layer, layers, real, aligned),
        _address(table, GRADIENT, layer, layers, grad_type, aligned),
        _address(table, FIRST, layer, layers, moment_type, aligned),
        _address(table, SECOND, layer, layers, moment_type, aligned),
        _address(table, PARAMETER, layer, layers, copy_type, aligned),
    )


@triton.jit
def _constants(table, grad_scale, real: tl.constexpr):
    """What both passes need of the batch: eps, decay, bound of the gradient, and what the gradient is multiplied by.

    Read before a loop, because the compiler cannot know that stores in the loop leave the table alone.
    """
    factor = tl.load(grad_scale).to(real) * _scalar(table, SIGN, real)
    return _scalar(table, EPS, real), _scalar(table, DECAY, real), _scalar(table, BOUND, real), factor


@triton.jit
def _bits(position, seed):
    """32 random bits per element; the same as in rounding.py."""
    x = position.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    return x ^ (x >> 15)


@triton.jit
def _cut(value, noise):
    """A float32 that is a bfloat16: ``noise`` is added below its last bit, and the rest cut off."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = bits + tl.where(value == value, noise, 0)  # noqa: PLR0124 - a NaN would turn into a number
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(w, copy_type: tl.constexpr):
    """A master as its half-precision parameter, rounded to nearest, ties to even; the interpreter would cut it off."""
    if copy_type == tl.bfloat16:
        w = _cut(w, 0x7FFF + ((w.to(tl.uint32, bitcast=True) >> 16) & 1))
    return w.to(copy_type)


@triton.jit
def _gradient(gradient, offsets, mask, bound, factor, real: tl.constexpr):
    """In the type of the computation, bounded, signed, clipped. Comparisons are false for NaN, which so survives."""
    g = tl.load(gradient + offsets, mask=mask, other=0).to(real)
    g = tl.where(g > bound, bound, g)
    g = tl.where(g < -bound, -bound, g)
    return g * factor


@triton.jit
def _adam(at, eps, decay, w, g, m, v, ahead: tl.constexpr, real: tl.constexpr):
    """``u = m_hat/(sqrt(v_hat) + eps) + weight_decay*w``; a term whose coefficient is zero is left out."""
    m_hat = tl.load(at + MOMENT1).to(real) * m
    v_hat = tl.load(at + MOMENT2).to(real) * v
    if ahead >= 1:
        m_hat += tl.load(at + GRAD).to(real) * g
    if ahead == 2:
        v_hat += tl.load(at + GRAD_SQUARE).to(real) * g * g
    u = tl.div_rn(m_hat, tl.sqrt_rn(v_hat) + eps) if real == tl.float32 else m_hat / (tl.sqrt(v_hat) + eps)
    return u + tl.where(decay != 0, decay * w, 0.0)


@triton.jit
def _magnitude(x, real: tl.constexpr):
    """Bits ordered like the magnitude, with NaN above infinity: an integer maximum keeps a NaN."""
    if real == tl.float32:
        bits = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    else:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    return bits


@triton.jit
def _largest(bits, real: tl.constexpr):
    """The float64 magnitude behind `_magnitude`."""
    if real == tl.float32:
        largest = bits.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        largest = bits.to(tl.float64, bitcast=True)
    return largest


@triton.jit
def _joined(total, x, norm: tl.constexpr, real: tl.constexpr):
    """Running statistics, one per place in a block: float64 sums, or the bits of the largest magnitude."""
    if norm == LINF:
        total = tl.maximum(total, _magnitude(x, real))
    elif norm == L1:
        total += tl.abs(x.to(tl.float64))
    else:
        wide = x.to(tl.float64)
        total += wide * wide
    return total


@triton.jit
def _statistic(total, norm: tl.constexpr, real: tl.constexpr):
    """The statistic of a tile from the running ones."""
    return _largest(tl.max(total), real) if norm == LINF else tl.sum(total)


@triton.jit
def _first_pass_of_tile(
    table, coefficients, grad_scale, parts, layer, layers, start, size, masked: tl.constexpr, aligned: tl.constexpr,
    base: tl.constexpr, ahead: tl.constexpr, norm: tl.constexpr, narrow: tl.constexpr, has_copy: tl.constexpr,
    real: tl.constexpr, grad_type: tl.constexpr, moment_type: tl.constexpr, copy_type: tl.constexpr,
):  # fmt: skip
    weight, gradient, first, second, parameter = _addresses(
        table, layer, layers, aligned, real, grad_type, moment_type, copy_type
    )
    seed = _entry(table, SEED, layer, layers)
    at = coefficients + layer * 5
    keep1, take1 = _scalar(table, KEEP1, real), _scalar(table, TAKE1, real)
    keep2, take2 = _scalar(table, KEEP2, real), _scalar(table, TAKE2, real)
    eps, decay, bound, factor = _constants(table, grad_scale, real)
    sum_w = tl.zeros((BLOCK,), tl.float64 if norm != LINF else tl.int64)
    sum_u = tl.zeros((BLOCK,), tl.float64 if norm != LINF else tl.int64)
    stop = tl.minimum(start + TILE, size) if masked else start + TILE
    for begin in range(start, stop, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = offsets < size if masked else tl.full((BLOCK,), 1, tl.int1)
        w = tl.load(weight + offsets, mask=mask, other=0)
        if has_copy:
            half = tl.load(parameter + offsets, mask=mask, other=0)
            changed = _rounded(w, copy_type) != half
            w = tl.where(changed, half.to(real), w)
            tl.store(weight + offsets, w, mask=mask & changed)
        g = _gradient(gradient, offsets, mask, bound, factor, real)
        if base == MOMENTUM:
            g += tl.where(decay != 0, decay * w, 0.0)
        m = keep1 * tl.load(first + offsets, mask=mask, other=0).to(real) + take1 * g
        if narrow:
            noise = _bits(offsets, seed)
            m = _cut(m, noise & 0xFFFF)
        tl.store(first + offsets, m.to(moment_type), mask=mask)
        if base == ADAM:
            v = keep2 * tl.load(second + offsets, mask=mask, other=0).to(real) + take2 * g * g
            if narrow:
                v = _cut(v, noise >> 16)
            tl.store(second + offsets, v.to(moment_type), mask=mask)
            u = _adam(at, eps, decay, w, g, m, v, ahead, real)
        else:
            u = m
        if norm != NO_NORM:
            # Beyond the end 0/(0 + eps) would be NaN without an eps.
            sum_w = _joined(sum_w, w, norm, real)
            sum_u = _joined(sum_u, tl.where(mask, u, 0.0) if masked else u, norm, real)
    if norm != NO_NORM:
        tl.store(parts + 2 * tl.program_id(0), _statistic(sum_w, norm, real))
        tl.store(parts + 2 * tl.program_id(0) + 1, _statistic(sum_u, norm, real))


@triton.jit
def first_pass(
    table, coefficients, grad_scale, tiles, parts, layers, aligned: tl.constexpr,
    base: tl.constexpr, ahead: tl.constexpr, norm: tl.constexpr, narrow: tl.constexpr, has_copy: tl.constexpr,
    real: tl.constexpr, grad_type: tl.constexpr, moment_type: tl.constexpr, copy_type: tl.constexpr,
):  # fmt: skip
    """Moments in place, and partial sums of the norms, of one tile."""
    layer = tl.load(tiles + tl.program_id(0))
    size = _entry(table, SIZE, layer, layers)
    start = (tl.program_id(0) - _entry(table, FIRST_TILE, layer, layers)) * TILE
    # Without a mask, loads are as wide as they can be.
    if start + TILE <= size:
        _first_pass_of_tile(
            table, coefficients, grad_scale, parts, layer, layers, start, size, False, aligned,
            base, ahead, norm, narrow, has_copy, real, grad_type, moment_type, copy_type,
        )  # fmt: skip
    else:
        _first_pass_of_tile(
            table, coefficients, grad_scale, parts, layer, layers, start, size, True, aligned,
            base, ahead, norm, narrow, has_copy, real, grad_type, moment_type, copy_type,
        )  # fmt: skip


@triton.jit
def _clamped(value, low, high):
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def finish(table, coefficients, parts, found, sizes, layers, norm: tl.constexpr, both: tl.constexpr):
    """Statistics of one layer from its tiles; with ``both`` its norms, ratio and step size."""
    layer = tl.program_id(0)
    begin = _entry(table, FIRST_TILE, layer, layers)
    end = begin + (_entry(table, SIZE, layer, layers) + TILE - 1) // TILE
    total_w, total_u = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    ratio = tl.full((), 1.0, tl.float64)
    if norm != NO_NORM:
        for chunk in range(begin, end, PARTS):
            tile = chunk + tl.arange(0, PARTS)
            part_w = tl.load(parts + 2 * tile, mask=tile < end, other=0)
            part_u = tl.load(parts + 2 * tile + 1, mask=tile < end, other=0)
            if norm == LINF:
                total_w = tl.maximum(total_w, _largest(tl.max(_magnitude(part_w, tl.float64)), tl.float64),
                                     propagate_nan=tl.PropagateNan.ALL)  # fmt: skip
                total_u = tl.maximum(total_u, _largest(tl.max(_magnitude(part_u, tl.float64)), tl.float64),
                                     propagate_nan=tl.PropagateNan.ALL)  # fmt: skip
            else:
                total_w += tl.sum(part_w)
                total_u += tl.sum(part_u)
        if both:
            if norm == L2:
                total_w, total_u = tl.sqrt(total_w), tl.sqrt(total_u)
            phi = _clamped(total_w, _number(table, PHI_LOW), _number(table, PHI_HIGH))
            undefined = (total_w == 0) | (total_u == 0)
            bounded = _clamped(
                phi / tl.where(undefined, 1.0, total_u), _number(table, RATIO_LOW), _number(table, RATIO_HIGH)
            )
            ratio = tl.where(undefined, 1.0, bounded)
    tl.store(found + layer, total_w)
    tl.store(found + layers + layer, total_u)
    if both:
        tl.store(found + 2 * layers + layer, ratio)
        tl.store(sizes + layer, ratio * tl.load(coefficients + layer * 5 + SCALE))


@triton.jit
def _second_pass_of_tile(
    table, coefficients, grad_scale, sizes, layer, layers, start, size, masked: tl.constexpr, aligned: tl.constexpr,
    base: tl.constexpr, ahead: tl.constexpr, has_copy: tl.constexpr,
    real: tl.constexpr, grad_type: tl.constexpr, moment_type: tl.constexpr, copy_type: tl.constexpr,
):  # fmt: skip
    weight, gradient, first, second, parameter = _addresses(
        table, layer, layers, aligned, real, grad_type, moment_type, copy_type
    )
    at = coefficients + layer * 5
    step_size = tl.load(sizes + layer).to(real)
    eps, decay, bound, factor = _constants(table, grad_scale, real)
    stop = tl.minimum(start + TILE, size) if masked else start + TILE
    for begin in range(start, stop, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = offsets < size if masked else tl.full((BLOCK,), 1, tl.int1)
        w = tl.load(weight + offsets, mask=mask, other=0)
        m = tl.load(first + offsets, mask=mask, other=0).to(real)
        if base == ADAM:
            v = tl.load(second + offsets, mask=mask, other=0).to(real)
            g = _gradient(gradient, offsets, mask, bound, factor, real) if ahead >= 1 else m
            u = _adam(at, eps, decay, w, g, m, v, ahead, real)
        else:
            u = m
        w = w - step_size * u
        tl.store(weight + offsets, w, mask=mask)
        if has_copy:
            tl.store(parameter + offsets, _rounded(w, copy_type), mask=mask)


@triton.jit
def second_pass(
    table, coefficients, grad_scale, tiles, sizes, layers, aligned: tl.constexpr,
    base: tl.constexpr, ahead: tl.constexpr, has_copy: tl.constexpr,
    real: tl.constexpr, grad_type: tl.constexpr, moment_type: tl.constexpr, copy_type: tl.constexpr,
):  # fmt: skip
    """Works the update out again, and applies it, of one tile."""
    layer = tl.load(tiles + tl.program_id(0))
    size = _entry(table, SIZE, layer, layers)
    start = (tl.program_id(0) - _entry(table, FIRST_TILE, layer, layers)) * TILE
    if start + TILE <= size:
        _second_pass_of_tile(
            table, coefficients, grad_scale, sizes, layer, layers, start, size, False, aligned,
            base, ahead, has_copy, real, grad_type, moment_type, copy_type,
        )  # fmt: skip
    else:
        _second_pass_of_tile(
            table, coefficients, grad_scale, sizes, layer, layers, start, size, True, aligned,
            base, ahead, has_copy, real, grad_type, moment_type, copy_type,
        )  # fmt: skip
