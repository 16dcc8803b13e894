"""A layer's elementwise work in one kernel each: what `canvastune.model.kernels` launches on a GPU.

Each program takes whole rows, computes them in float32, and rounds what it stores. Nothing is
added atomically, so results do not change from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def, misc, no-any-return"


@triton.jit
def _load(pointer, columns, mask):
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, columns, value, mask):
    tl.store(pointer + columns, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _inverse_rms(x, width, eps):
    return tl.rsqrt(tl.sum(x * x, 0) / width + eps)


@triton.jit
def _norm_gradient(upstream, normed, inverse, width):
    """Return the gradient of x from that of x * inverse."""
    return inverse * (upstream - normed * (tl.sum(upstream * normed, 0) / width))


@triton.jit
def before_experts(
    hidden,
    attended,
    after_weight,
    dense_weight,
    experts_weight,
    router_weight,
    residual,
    dense,
    experts,
    router,
    root,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute residual = hidden + norm(attended), and its three norms: of the dense MLP, the experts and
    the router."""
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    start = tl.program_id(0).to(tl.int64) * WIDTH
    x = _load(attended + start, columns, mask)
    x = x * _inverse_rms(x, WIDTH, eps) * _load(after_weight, columns, mask)
    total = (_load(hidden + start, columns, mask) + x).to(residual.dtype.element_ty)
    tl.store(residual + start + columns, total, mask=mask)
    total = total.to(tl.float32)
    normed = total * _inverse_rms(total, WIDTH, eps)
    _store(dense + start, columns, normed * _load(dense_weight, columns, mask), mask)
    _store(experts + start, columns, normed * _load(experts_weight, columns, mask), mask)
    _store(router + start, columns, normed * _load(router_weight, columns, mask) * root, mask)


@triton.jit(do_not_specialize=["rows"])
def before_experts_backward(
    attended,
    residual,
    after_weight,
    dense_weight,
    experts_weight,
    router_weight,
    residual_gradient,
    dense_gradient,
    experts_gradient,
    router_gradient,
    hidden_gradient,
    attended_gradient,
    weight_gradients,
    rows,
    root,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """Compute the gradients of `before_experts`; with WEIGHTS, each program's sums for the first three
    weights."""
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    of_after = tl.zeros([BLOCK], tl.float32)
    of_dense = tl.zeros([BLOCK], tl.float32)
    of_experts = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * WIDTH
        total = _load(residual + start, columns, mask)
        inverse = _inverse_rms(total, WIDTH, eps)
        normed = total * inverse
        from_dense = _load(dense_gradient + start, columns, mask)
        from_experts = _load(experts_gradient + start, columns, mask)
        upstream = from_dense * _load(dense_weight, columns, mask)
        upstream += from_experts * _load(experts_weight, columns, mask)
        upstream += (
            _load(router_gradient + start, columns, mask)
            * _load(router_weight, columns, mask)
            * root
        )
        gradient = _load(residual_gradient + start, columns, mask)
        gradient += _norm_gradient(upstream, normed, inverse, WIDTH)
        _store(hidden_gradient + start, columns, gradient, mask)
        x = _load(attended + start, columns, mask)
        x_inverse = _inverse_rms(x, WIDTH, eps)
        x_normed = x * x_inverse
        of_attended = _norm_gradient(
            gradient * _load(after_weight, columns, mask), x_normed, x_inverse, WIDTH
        )
        _store(attended_gradient + start, columns, of_attended, mask)
        if WEIGHTS:
            of_after += gradient * x_normed
            of_dense += from_dense * normed
            of_experts += from_experts * normed
    if WEIGHTS:
        start = tl.program_id(0).to(tl.int64) * 3 * WIDTH
        _store(weight_gradients + start, columns, of_after, mask)
        _store(weight_gradients + start + WIDTH, columns, of_dense, mask)
        _store(weight_gradients + start + 2 * WIDTH, columns, of_experts, mask)


@triton.jit
def after_experts(
    residual,
    dense,
    routed,
    dense_weight,
    routed_weight,
    sum_weight,
    scale,
    scale_stride,
    out,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute out = scale * (residual + norm(norm(dense) + norm(routed)))."""
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    row = tl.program_id(0).to(tl.int64)
    start = row * WIDTH
    x = _load(dense + start, columns, mask)
    y = _load(routed + start, columns, mask)
    both = x * _inverse_rms(x, WIDTH, eps) * _load(dense_weight, columns, mask)
    both += y * _inverse_rms(y, WIDTH, eps) * _load(routed_weight, columns, mask)
    both = both * _inverse_rms(both, WIDTH, eps) * _load(sum_weight, columns, mask)
    both += _load(residual + start, columns, mask)
    _store(out + start, columns, both * tl.load(scale + row * scale_stride).to(tl.float32), mask)


@triton.jit(do_not_specialize=["rows"])
def after_experts_backward(
    dense,
    routed,
    dense_weight,
    routed_weight,
    sum_weight,
    scale,
    scale_stride,
    upstream,
    residual_gradient,
    dense_gradient,
    routed_gradient,
    weight_gradients,
    rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """Compute the gradients of `after_experts`; with WEIGHTS, each program's sums for the three weights."""
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    of_dense = tl.zeros([BLOCK], tl.float32)
    of_routed = tl.zeros([BLOCK], tl.float32)
    of_sum = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * WIDTH
        x = _load(dense + start, columns, mask)
        y = _load(routed + start, columns, mask)
        x_weight = _load(dense_weight, columns, mask)
        y_weight = _load(routed_weight, columns, mask)
        x_inverse = _inverse_rms(x, WIDTH, eps)
        y_inverse = _inverse_rms(y, WIDTH, eps)
        x *= x_inverse
        y *= y_inverse
        both = x * x_weight + y * y_weight
        inverse = _inverse_rms(both, WIDTH, eps)
        both *= inverse
        gradient = _load(upstream + start, columns, mask)
        gradient *= tl.load(scale + row * scale_stride).to(tl.float32)
        _store(residual_gradient + start, columns, gradient, mask)
        of_both = _norm_gradient(gradient * _load(sum_weight, columns, mask), both, inverse, WIDTH)
        x_gradient = _norm_gradient(of_both * x_weight, x, x_inverse, WIDTH)
        y_gradient = _norm_gradient(of_both * y_weight, y, y_inverse, WIDTH)
        _store(dense_gradient + start, columns, x_gradient, mask)
        _store(routed_gradient + start, columns, y_gradient, mask)
        if WEIGHTS:
            of_dense += of_both * x
            of_routed += of_both * y
            of_sum += gradient * both
    if WEIGHTS:
        start = tl.program_id(0).to(tl.int64) * 3 * WIDTH
        _store(weight_gradients + start, columns, of_dense, mask)
        _store(weight_gradients + start + WIDTH, columns, of_routed, mask)
        _store(weight_gradients + start + 2 * WIDTH, columns, of_sum, mask)


@triton.jit
def _turn_head(x, out, start, weight, cos, sin, eps, D: tl.constexpr, ROTATES: tl.constexpr):
    """Normalize one head of a row, scale and rotate it where ROTATES."""
    at = tl.arange(0, D)
    other = (at + D // 2) % D
    own = tl.load(x + start + at).to(tl.float32)
    inverse = _inverse_rms(own, D, eps)
    own *= inverse
    if ROTATES:
        sign = tl.where(at < D // 2, -1.0, 1.0)
        partner = tl.load(x + start + other).to(tl.float32) * inverse
        own *= tl.load(weight + at).to(tl.float32)
        partner *= tl.load(weight + other).to(tl.float32)
        own = own * cos + partner * sin * sign
    tl.store(out + start + at, own.to(out.dtype.element_ty))


@triton.jit
def turn_heads(
    query,
    key,
    value,
    query_weight,
    key_weight,
    cos,
    sin,
    query_out,
    key_out,
    value_out,
    eps,
    A: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
):
    """Compute norms of a row's query, key and value heads, and the rotation of the first two."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = row * D + tl.arange(0, D)
    c, s = tl.load(cos + at).to(tl.float32), tl.load(sin + at).to(tl.float32)
    if head < A:
        _turn_head(query, query_out, (row * A + head) * D, query_weight, c, s, eps, D, True)
    elif head < A + G:
        _turn_head(key, key_out, (row * G + head - A) * D, key_weight, c, s, eps, D, True)
    else:
        _turn_head(value, value_out, (row * G + head - A - G) * D, key_weight, c, s, eps, D, False)


@triton.jit
def _turn_head_back(
    x, upstream, gradient, start, weight, cos, sin, row, eps, D: tl.constexpr, ROTATES: tl.constexpr
):
    """Store the gradient of a head; return that of the weight from this row."""
    at = tl.arange(0, D)
    other = (at + D // 2) % D
    normed = tl.load(x + start + at).to(tl.float32)
    inverse = _inverse_rms(normed, D, eps)
    normed *= inverse
    found = tl.load(upstream + start + at).to(tl.float32)
    of_weight = found
    if ROTATES:
        sign = tl.where(at < D // 2, 1.0, -1.0)
        found *= tl.load(cos + row * D + at).to(tl.float32)
        partner = tl.load(upstream + start + other).to(tl.float32)
        found += partner * tl.load(sin + row * D + other).to(tl.float32) * sign
        of_weight = found * normed
        found *= tl.load(weight + at).to(tl.float32)
    found = _norm_gradient(found, normed, inverse, D)
    tl.store(gradient + start + at, found.to(gradient.dtype.element_ty))
    return of_weight


@triton.jit(do_not_specialize=["rows"])
def turn_heads_backward(
    query,
    key,
    value,
    query_weight,
    key_weight,
    cos,
    sin,
    query_upstream,
    key_upstream,
    value_upstream,
    query_gradient,
    key_gradient,
    value_gradient,
    weight_gradients,
    rows,
    eps,
    A: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """Compute the gradients of `turn_heads`; with WEIGHTS, each program's sum for the weight of its head."""
    head = tl.program_id(1)
    total = tl.zeros([D], tl.float32)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        if head < A:
            start = (row * A + head) * D
            total += _turn_head_back(
                query, query_upstream, query_gradient, start, query_weight, cos, sin, row, eps, D,
                True,
            )  # fmt: skip
        elif head < A + G:
            start = (row * G + head - A) * D
            total += _turn_head_back(
                key, key_upstream, key_gradient, start, key_weight, cos, sin, row, eps, D, True
            )
        else:
            start = (row * G + head - A - G) * D
            _turn_head_back(
                value, value_upstream, value_gradient, start, key_weight, cos, sin, row, eps, D,
                False,
            )  # fmt: skip
    if WEIGHTS and head < A + G:
        start = (tl.program_id(0) * (A + G) + head) * D
        tl.store(weight_gradients + start + tl.arange(0, D), total)


@triton.jit
def _gelu(x):
    """Return gelu (its tanh form) of x and its derivative."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    tanh = 2 * tl.sigmoid(2 * inner) - 1
    slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope


@triton.jit
def gate(
    gates,
    ups,
    weights,
    out,
    stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Compute out = gelu(gates) * ups, times the row's weight if WEIGHTED."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    active, _ = _gelu(_load(gates + row * stride, columns, mask))
    product = active * _load(ups + row * stride, columns, mask)
    if WEIGHTED:
        product *= tl.load(weights + row).to(tl.float32)
    _store(out + row * WIDTH, columns, product, mask)


@triton.jit
def gate_backward(
    gates,
    ups,
    weights,
    upstream,
    gates_gradient,
    ups_gradient,
    weights_gradient,
    stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Compute the gradients of `gate`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    active, slope = _gelu(_load(gates + row * stride, columns, mask))
    up = _load(ups + row * stride, columns, mask)
    gradient = _load(upstream + row * WIDTH, columns, mask)
    if WEIGHTED:
        tl.store(
            weights_gradient + row,
            tl.sum(gradient * active * up, 0).to(weights_gradient.dtype.element_ty),
        )
        gradient *= tl.load(weights + row).to(tl.float32)
    start = row * stride
    _store(gates_gradient + start, columns, gradient * up * slope, mask)
    _store(ups_gradient + start, columns, gradient * active, mask)


@triton.jit
def choose(
    scores,
    scales,
    weights,
    index,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Find the K highest of a row's scores, of equal ones the first, and the softmax over them times
    the experts' scales."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    places = tl.arange(0, BLOCK_K)
    left = tl.load(scores + row * E + columns, mask=columns < E, other=-float("inf"))
    left = left.to(tl.float32)
    values = tl.full([BLOCK_K], -float("inf"), tl.float32)
    experts = tl.zeros([BLOCK_K], tl.int32)
    for place in tl.static_range(K):
        highest = tl.max(left, 0)
        # No score equals a NaN: any expert will do, but it must be one.
        expert = tl.minimum(tl.min(tl.where(left == highest, columns, BLOCK), 0), E - 1)
        values = tl.where(places == place, highest, values)
        experts = tl.where(places == place, expert, experts)
        left = tl.where(columns == expert, -float("inf"), left)
    terms = tl.exp(values - tl.max(values, 0))
    mask = places < K
    scale = tl.load(scales + experts, mask=mask, other=0.0).to(tl.float32)
    tl.store(weights + row * K + places, terms / tl.sum(terms, 0) * scale, mask=mask)
    tl.store(index + row * K + places, experts.to(tl.int64), mask=mask)


@triton.jit
def choose_backward(
    scores,
    scales,
    index,
    upstream,
    gradient,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the gradient of `choose`'s scores: zero where not chosen."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK_K)
    mask = places < K
    experts = tl.load(index + row * K + places, mask=mask, other=0)
    values = tl.load(scores + row * E + experts, mask=mask, other=-float("inf")).to(tl.float32)
    terms = tl.exp(values - tl.max(values, 0))
    share = terms / tl.sum(terms, 0)
    found = tl.load(upstream + row * K + places, mask=mask, other=0.0).to(tl.float32)
    found *= tl.load(scales + experts, mask=mask, other=0.0).to(tl.float32)
    found = share * (found - tl.sum(found * share, 0))
    columns = tl.arange(0, BLOCK)
    hit = (columns[:, None] == experts[None, :].to(tl.int32)) & mask[None, :]
    spread = tl.sum(tl.where(hit, found[None, :], 0.0), 1)
    _store(gradient + row * E, columns, spread, columns < E)


@triton.jit(do_not_specialize=["rows"])
def sort_rows(index, order, inverse, counts, rows, BLOCK: tl.constexpr):
    """Sort rows by expert, stably, a program for each expert."""
    expert = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int64)
    for start in range(0, rows, BLOCK):
        found = tl.load(index + start + place, mask=start + place < rows, other=2147483647)
        before += (found < expert).to(tl.int64)
    first = tl.sum(before, 0)
    at = first
    for start in range(0, rows, BLOCK):
        found = tl.load(index + start + place, mask=start + place < rows, other=2147483647)
        own = (found == expert).to(tl.int64)
        target = at + tl.cumsum(own, 0) - own
        row = (start + place).to(tl.int64)
        tl.store(order + target, row, mask=own != 0)
        tl.store(inverse + row, target, mask=own != 0)
        at += tl.sum(own, 0)
    tl.store(counts + expert, at - first)


@triton.jit
def sort_segments(
    received,
    by_expert,
    by_sender,
    ends,
    RANKS: tl.constexpr,
    L: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Order rows by expert that arrived by sender and then by expert, a program for each
    sender and expert."""
    own = tl.program_id(0)
    sender, expert = own // L, own % L
    segment = tl.arange(0, SEGMENTS)
    sizes = tl.load(received + segment, mask=segment < RANKS * L, other=0)
    source = tl.sum(tl.where(segment < own, sizes, 0), 0)
    others, of = segment // L, segment % L
    earlier = (of < expert) | ((of == expert) & (others < sender))
    target = tl.sum(tl.where(earlier, sizes, 0), 0)
    size = tl.sum(tl.where(segment == own, sizes, 0), 0)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(by_expert + target + place, source + place, mask=place < size)
        tl.store(by_sender + source + place, target + place, mask=place < size)
    if sender == RANKS - 1:
        tl.store(ends + expert, (target + size).to(tl.int32))


@triton.jit(do_not_specialize=["per_row"])
def take_rows(
    rows,
    weights,
    index,
    out,
    weights_out,
    per_row,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Copy out[i] = rows[index[i] // per_row] and weights_out[i] = weights[index[i]]."""
    at = tl.program_id(0).to(tl.int64)
    found = tl.load(index + at)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    values = tl.load(rows + found // per_row * WIDTH + columns, mask=mask)
    tl.store(out + at * WIDTH + columns, values.to(out.dtype.element_ty), mask=mask)
    if WEIGHTED:
        tl.store(weights_out + at, tl.load(weights + found))


@triton.jit
def sum_rows(
    rows,
    weights,
    inverse,
    out,
    weights_out,
    PER_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Compute out[t] = sum over k of rows[inverse[t, k]], and weights_out[t, k] = weights[inverse[t, k]]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(PER_ROW):
        found = tl.load(inverse + token * PER_ROW + place)
        total += _load(rows + found * WIDTH, columns, mask)
        if WEIGHTED:
            tl.store(weights_out + token * PER_ROW + place, tl.load(weights + found))
    _store(out + token * WIDTH, columns, total, mask)
