"""Triton kernels of `instance_norm`, launched by `_instance_norm_launch`.

Every tensor is read as [N, pixels, C] with C contiguous. A program works on a tile of BLOCK_P pixels x BLOCK_C channels
of one sample, so that each thread reads and writes 16 bytes along C. Forward and backward have the same shape:

    1. reduce  The pixels of a sample are cut into `splits`, one program each, so that a single picture fills the GPU.
               Each split leaves two float32 numbers a channel in `partial` [N, splits, 2, C].
    2. finish  The splits are merged, always in the same order. Few of them (MERGED) are merged again by every
               program of pass 3, which costs less than a launch; many of them by a kernel of their own.
    3. apply   One tile of the result a program, in the opposite order of pass 1: what it left in the cache comes first.

So x is read twice in each direction, the second time from the L2 cache where it fits. In the forward direction the two
numbers are the mean and the sum of squared deviations from it, by Welford's update in each thread and Chan's merge
between them (Chan, Golub, LeVeque 1983), of x minus the sample's first pixel: exact where mean >> std. Backward they
are the sums of dz and dz * xhat. The gradient arrives padded; reflection is folded back by reading, for each pixel, all
places that showed it, in a fixed order: no atomics, the same bits every time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

# Shapes that differ in divisibility must not compile anew: only C decides how wide an access is.
_PLAIN = ["H", "W", "per_split", "splits", "pixels", "n_samples"]


@triton.jit
def _used(rows, c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mask of a tile; without a comparison of channels where they fill their blocks."""
    if C % BLOCK_C == 0:
        return rows[:, None]
    else:  # noqa: RET505 - the compiler drops one branch
        return rows[:, None] & (c < C)[None, :]


@triton.jit
def _reflected(i, size, PAD: tl.constexpr):
    """The row (or column) of the input that row `i` of the padded output shows."""
    i = tl.abs(i - PAD)
    return tl.minimum(i, 2 * (size - 1) - i)


@triton.jit
def _affine(xhat, weight, bias, c, C: tl.constexpr, HAS_AFFINE: tl.constexpr):
    if HAS_AFFINE:
        w = tl.load(weight + c, mask=c < C, other=0.0)
        b = tl.load(bias + c, mask=c < C, other=0.0)
        return xhat * w[None, :] + b[None, :]
    else:  # noqa: RET505 - the compiler drops one branch
        return xhat


@triton.jit(do_not_specialize=_PLAIN)
def _instance_norm_stats_kernel(
    x,  # [N, pixels, C]
    partial,  # float32 [N, splits, 2, C]: mean of x - shift, sum of squared deviations from that mean
    pixels,
    per_split,
    splits,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Forward, pass 1: the statistics of one split."""
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = pid // channel_blocks
    split = part % splits
    x += (part // splits).to(tl.int64) * pixels * C
    shift = tl.load(x + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    lane = tl.arange(0, BLOCK_P)
    first = split * per_split
    size = tl.minimum(pixels - first, per_split)
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(tl.cdiv(size, BLOCK_P)):
        inside = i * BLOCK_P + lane < size
        p = (first + i * BLOCK_P + lane).to(tl.int64)
        value = tl.load(x + (p * C)[:, None] + c[None, :], mask=_used(inside, c, C, BLOCK_C), other=0.0)
        value = value.to(tl.float32) - shift
        # A lane that still has pixels has had i of them; one that has none left keeps what it has.
        delta = tl.where(inside[:, None], value - mean, 0.0)
        mean += delta * (1.0 / (i + 1))
        m2 += delta * (value - mean)
    count = (tl.maximum(size - lane + BLOCK_P - 1, 0) // BLOCK_P).to(tl.float32)[:, None]
    center = tl.sum(count * mean, 0) / size.to(tl.float32)
    deviation = mean - center[None, :]
    out = partial + part.to(tl.int64) * (2 * C) + c
    tl.store(out, center, mask=c < C)
    tl.store(out + C, tl.sum(m2 + count * deviation * deviation, 0), mask=c < C)


@triton.jit
def _merged_statistics(
    x, partial, n, c, pixels, per_split, splits, eps, C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and 1 / sqrt(variance + eps) [BLOCK_C] of sample n from the statistics of its splits."""
    in_c = (c < C)[None, :]
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        # 0 for the splits beyond the last.
        sizes = tl.maximum(tl.minimum(pixels - s * per_split, per_split), 0).to(tl.float32)
        used = (s < splits)[:, None] & in_c
        part = partial + ((n * splits + s) * (2 * C))[:, None] + c[None, :]
        means = tl.load(part, mask=used, other=0.0)
        within = tl.load(part + C, mask=used, other=0.0)
        size = tl.sum(sizes, 0)
        center = tl.sum(means * sizes[:, None], 0) / size
        deviation = means - center[None, :]
        within = tl.sum(within + sizes[:, None] * deviation * deviation, 0)
        delta = center - mean
        total = count + size
        mean += delta * (size / total)
        m2 += within + delta * delta * (count * (size / total))
        count = total
    shift = tl.load(x + n * pixels * C + c, mask=c < C, other=0.0).to(tl.float32)
    return shift + mean, tl.rsqrt(m2 / pixels + eps)


@triton.jit(do_not_specialize=_PLAIN)
def _instance_norm_finish_stats_kernel(
    x,  # [N, pixels, C]
    partial,  # float32 [N, splits, 2, C]
    mean,  # float32 [N, C]
    rstd,  # float32 [N, C]
    pixels,
    per_split,
    splits,
    eps,
    C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Forward, between the passes, for many splits."""
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (pid // channel_blocks).to(tl.int64)
    mu, r = _merged_statistics(x, partial, n, c, pixels, per_split, splits, eps, C, BLOCK_S, BLOCK_C)
    tl.store(mean + n * C + c, mu, mask=c < C)
    tl.store(rstd + n * C + c, r, mask=c < C)


@triton.jit(do_not_specialize=_PLAIN)
def _instance_norm_apply_kernel(
    x,  # [N, H, W, C]
    weight,  # float32 [C]
    bias,  # float32 [C]
    residual,  # [N, H, W, C], rows and samples at any pitch
    partial,  # float32 [N, splits, 2, C]
    mean,  # float32 [N, C], written here where MERGED, else read
    rstd,  # float32 [N, C], likewise
    y,  # [N, H + 2 PAD, W + 2 PAD, C]
    H,
    W,
    residual_n,
    residual_h,
    per_split,
    splits,
    eps,
    slope,
    C: tl.constexpr,
    PAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Forward, pass 2: one tile of the padded result."""
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    padded_w = W + 2 * PAD
    pixels_out = (H + 2 * PAD) * padded_w
    tiles = tl.cdiv(pixels_out, BLOCK_P)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    c = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = pid // channel_blocks % tiles
    n = (pid // channel_blocks // tiles).to(tl.int64)

    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    used = _used(p < pixels_out, c, C, BLOCK_C)
    row = p // padded_w
    h = _reflected(row, H, PAD)
    w = _reflected(p - row * padded_w, W, PAD)
    source = (n * H + h) * W + w
    value = tl.load(x + (source * C)[:, None] + c[None, :], mask=used, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        source = n * residual_n + h.to(tl.int64) * residual_h + w * C
        extra = tl.load(residual + source[:, None] + c[None, :], mask=used, other=0.0).to(tl.float32)

    if MERGED:
        mu, r = _merged_statistics(x, partial, n, c, H * W, per_split, splits, eps, C, BLOCK_S, BLOCK_C)
        if tile == 0:
            tl.store(mean + n * C + c, mu, mask=c < C)
            tl.store(rstd + n * C + c, r, mask=c < C)
    else:
        mu = tl.load(mean + n * C + c, mask=c < C, other=0.0)
        r = tl.load(rstd + n * C + c, mask=c < C, other=0.0)

    z = _affine((value - mu[None, :]) * r[None, :], weight, bias, c, C, HAS_AFFINE)
    if ACTIVATION == 1:
        z = tl.where(z < 0.0, 0.0, z)  # not maximum, which hides NaN
    elif ACTIVATION == 2:
        z = tl.where(z > 0.0, z, z * slope)
    if HAS_RESIDUAL:
        z += extra
    target = n * pixels_out + p
    tl.store(y + (target * C)[:, None] + c[None, :], z.to(y.dtype.element_ty), mask=used)


@triton.jit
def _place(i, size, K: tl.constexpr, PAD: tl.constexpr, NARROW: tl.constexpr):
    """Index in the padded output of the K-th reflection (from 1) of row or column `i`, and whether there is one.

    The PAD first rows after row 0 are shown again before it, the PAD last ones before the last row after that; only
    where the input is so NARROW that a row can be both, there are two reflections to ask for.
    """
    low = (i >= 1) & (i <= PAD)
    high = (i >= size - 1 - PAD) & (i <= size - 2)
    if not NARROW:
        place = tl.where(low, PAD - i, 2 * (size - 1) + PAD - i)
        shown = low | high
    elif K == 1:
        place = PAD - i
        shown = low
    else:
        place = 2 * (size - 1) + PAD - i
        shown = high
    return place, shown


@triton.jit
def _folded_row(
    grad, row, in_row, w, c, W, C: tl.constexpr, PAD: tl.constexpr, NARROW: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sum over the columns of the padded gradient that show column w, in row `row` (counted through all samples)."""
    padded_w = W + 2 * PAD
    source = row * padded_w + w + PAD
    total = tl.load(grad + (source * C)[:, None] + c[None, :], mask=_used(in_row, c, C, BLOCK_C), other=0.0)
    total = total.to(tl.float32)
    if PAD > 0:
        for k in tl.static_range(1, 3 if NARROW else 2):
            column, shown = _place(w, W, k, PAD, NARROW)
            source = row * padded_w + column
            used = _used(in_row & shown, c, C, BLOCK_C)
            total += tl.load(grad + (source * C)[:, None] + c[None, :], mask=used, other=0.0).to(tl.float32)
    return total


@triton.jit
def _folded(
    grad, n, first, inside, h, w, c, H, W,
    C: tl.constexpr, PAD: tl.constexpr, NARROW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of pixels (rows h, columns w; `first` is its first pixel) from that of the padded output."""
    top = n * (H + 2 * PAD)
    total = _folded_row(grad, top + h + PAD, inside, w, c, W, C, PAD, NARROW, BLOCK_C)
    if PAD > 0:
        # Only tiles near the upper and lower edge have rows that are shown again: a branch, not masked loads.
        last_row = tl.minimum((first + BLOCK_P - 1) // W, H - 1)
        if (first // W <= PAD) | (last_row >= H - 1 - PAD):
            for k in tl.static_range(1, 3 if NARROW else 2):
                row, shown = _place(h, H, k, PAD, NARROW)
                total += _folded_row(grad, top + row, inside & shown, w, c, W, C, PAD, NARROW, BLOCK_C)
    return total


@triton.jit
def _through_activation(
    g, xhat, weight, bias, c, slope, C: tl.constexpr, ACTIVATION: tl.constexpr, HAS_AFFINE: tl.constexpr
):
    """dz: the gradient g before the activation, whose input z is computed again as the forward pass did."""
    if ACTIVATION == 1:
        g = tl.where(_affine(xhat, weight, bias, c, C, HAS_AFFINE) > 0.0, g, 0.0)
    elif ACTIVATION == 2:
        g = tl.where(_affine(xhat, weight, bias, c, C, HAS_AFFINE) > 0.0, g, g * slope)
    return g


@triton.jit(do_not_specialize=_PLAIN)
def _instance_norm_grad_sums_kernel(
    grad,  # [N, H + 2 PAD, W + 2 PAD, C]
    x,  # [N, H, W, C]
    mean,  # float32 [N, C]
    rstd,  # float32 [N, C]
    weight,  # float32 [C]
    bias,  # float32 [C]
    folded,  # [N, H, W, C], written where STORE_FOLDED: the gradient of the residual
    partial,  # float32 [N, splits, 2, C]: sums of dz and of dz * xhat
    H,
    W,
    per_split,
    splits,
    slope,
    C: tl.constexpr,
    PAD: tl.constexpr,
    NARROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    STORE_FOLDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Backward, pass 1: the sums of one split."""
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pixels = H * W
    pid = tl.program_id(0)
    c = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = pid // channel_blocks
    split = part % splits
    n = (part // splits).to(tl.int64)
    mu = tl.load(mean + n * C + c, mask=c < C, other=0.0)[None, :]
    r = tl.load(rstd + n * C + c, mask=c < C, other=0.0)[None, :]
    first = split * per_split
    size = tl.minimum(pixels - first, per_split)
    sum_dz = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(tl.cdiv(size, BLOCK_P)):
        start = first + i * BLOCK_P
        p = start + tl.arange(0, BLOCK_P)
        inside = p < first + size
        used = _used(inside, c, C, BLOCK_C)
        h = p // W
        at = ((n * pixels + p) * C)[:, None] + c[None, :]
        value = tl.load(x + at, mask=used, other=0.0).to(tl.float32)
        g = _folded(grad, n, start, inside, h, p - h * W, c, H, W, C, PAD, NARROW, BLOCK_P, BLOCK_C)
        if STORE_FOLDED:
            rounded = g.to(folded.dtype.element_ty)
            tl.store(folded + at, rounded, mask=used)
            g = rounded.to(tl.float32)  # as pass 2 will read it
        xhat = (value - mu) * r
        dz = _through_activation(g, xhat, weight, bias, c, slope, C, ACTIVATION, HAS_AFFINE)
        sum_dz += dz
        sum_dz_xhat += dz * xhat
    out = partial + part.to(tl.int64) * (2 * C) + c
    tl.store(out, tl.sum(sum_dz, 0), mask=c < C)
    tl.store(out + C, tl.sum(sum_dz_xhat, 0), mask=c < C)


@triton.jit
def _merged_sums(partial, n, c, splits, C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """The two sums [BLOCK_C] of sample n from those of its splits."""
    first = tl.zeros((BLOCK_C,), tl.float32)
    second = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        used = (s < splits)[:, None] & (c < C)[None, :]
        part = partial + ((n * splits + s) * (2 * C))[:, None] + c[None, :]
        first += tl.sum(tl.load(part, mask=used, other=0.0), 0)
        second += tl.sum(tl.load(part + C, mask=used, other=0.0), 0)
    return first, second


@triton.jit(do_not_specialize=_PLAIN)
def _instance_norm_finish_sums_kernel(
    partial,  # float32 [N, splits, 2, C]
    sums,  # float32 [2, N, C]
    n_samples,
    splits,
    C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Backward, between the passes, for many splits."""
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (pid // channel_blocks).to(tl.int64)
    sum_dz, sum_dz_xhat = _merged_sums(partial, n, c, splits, C, BLOCK_S, BLOCK_C)
    tl.store(sums + n * C + c, sum_dz, mask=c < C)
    tl.store(sums + (n_samples + n) * C + c, sum_dz_xhat, mask=c < C)


@triton.jit(do_not_specialize=_PLAIN)
def _instance_norm_grad_apply_kernel(
    grad,  # [N, H + 2 PAD, W + 2 PAD, C]; [N, H, W, C] where FOLDED
    x,  # [N, H, W, C]
    mean,  # float32 [N, C]
    rstd,  # float32 [N, C]
    weight,  # float32 [C]
    bias,  # float32 [C]
    partial,  # float32 [N, splits, 2, C]
    sums,  # float32 [2, N, C], written here where MERGED, else read
    dx,  # [N, H, W, C]
    H,
    W,
    n_samples,
    splits,
    slope,
    C: tl.constexpr,
    PAD: tl.constexpr,
    NARROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Backward, pass 2: one tile of dx. PAD is 0 where pass 1 has left the folded gradient."""
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pixels = H * W
    tiles = tl.cdiv(pixels, BLOCK_P)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    c = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = pid // channel_blocks % tiles
    n = (pid // channel_blocks // tiles).to(tl.int64)

    start = tile * BLOCK_P
    p = start + tl.arange(0, BLOCK_P)
    inside = p < pixels
    used = _used(inside, c, C, BLOCK_C)
    h = p // W
    at = ((n * pixels + p) * C)[:, None] + c[None, :]
    value = tl.load(x + at, mask=used, other=0.0).to(tl.float32)
    g = _folded(grad, n, start, inside, h, p - h * W, c, H, W, C, PAD, NARROW, BLOCK_P, BLOCK_C)

    if MERGED:
        sum_dz, sum_dz_xhat = _merged_sums(partial, n, c, splits, C, BLOCK_S, BLOCK_C)
        if HAS_AFFINE and tile == 0:
            tl.store(sums + n * C + c, sum_dz, mask=c < C)
            tl.store(sums + (n_samples + n) * C + c, sum_dz_xhat, mask=c < C)
    else:
        sum_dz = tl.load(sums + n * C + c, mask=c < C, other=0.0)
        sum_dz_xhat = tl.load(sums + (n_samples + n) * C + c, mask=c < C, other=0.0)
    mu = tl.load(mean + n * C + c, mask=c < C, other=0.0)
    r = tl.load(rstd + n * C + c, mask=c < C, other=0.0)

    xhat = (value - mu[None, :]) * r[None, :]
    dz = _through_activation(g, xhat, weight, bias, c, slope, C, ACTIVATION, HAS_AFFINE)
    scale = r
    if HAS_AFFINE:
        scale = r * tl.load(weight + c, mask=c < C, other=0.0)
    result = scale[None, :] * (dz - (sum_dz / pixels)[None, :] - xhat * (sum_dz_xhat / pixels)[None, :])
    tl.store(dx + at, result.to(dx.dtype.element_ty), mask=used)
