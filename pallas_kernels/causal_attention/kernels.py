"""Causal attention with a key bias in Triton, forward and backward, for training on NVIDIA GPUs.

FlashAttention-2 (Dao 2023, arXiv 2307.08691) with what DMC needs inside: a bias of every key, the
newest tokens that it spares, or gives another, and keys of certain ages only. With scores to base
2, so that softmax takes one `exp2` each,

    s_ij = FACTOR q_i . k_j + bias_j [i - j >= spared]       p_ij = 2^(s_ij - lse_i)

    dv_j    = sum_i p_ij do_i                       ds_ij = p_ij (do_i . v_j - delta_i)
    dk_j    = scale sum_i ds_ij q_i                 delta_i = do_i . o_i - dlse_i
    dq_i    = scale sum_j ds_ij k_j                 dbias_j = sum_{i - j >= spared} ds_ij

for first <= i - j < until in the document of i: from its first token, `starts[i]`, to the one
before `ends[i]`. Loops visit such blocks only, those near the diagonal apart: elsewhere nothing is
masked or spared.

A program adds up what it writes, in one order: nothing is added to by two, and results repeat bit
for bit. Queries that share a KV head take turns in the program of its keys.
"""

from typing import no_type_check

import triton
import triton.language as tl

# A finite stand-in for minus infinity: a block may be masked as a whole, and inf - inf is NaN. What
# such a block adds to a row's sums is wiped out by the first key that the row sees; where it sees
# none, its peak tells.
_MASKED = tl.constexpr(-1e30)


@triton.jit
@no_type_check
def attend(
    q_ptr,  # [B, T, N, H]
    k_ptr,  # [B, T, K, H]
    v_ptr,
    bias_ptr,  # [B, K, T], float32, to base 2
    spared_ptr,  # likewise, while a key is spared; means nothing without OTHER
    starts_ptr,  # [B, T]
    out_ptr,  # [B, T, N, H]
    lse_ptr,  # [B, N, T], float32, to base 2
    FACTOR: tl.constexpr,  # scale / ln 2
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,  # H, padded to a power of two
    QUERIES: tl.constexpr,  # a block: a multiple of KEYS
    KEYS: tl.constexpr,
    WIDEN: tl.constexpr,  # compute in float32; else in bfloat16, with sums in float32
    SPARED: tl.constexpr,
    OTHER: tl.constexpr,  # spared keys have a bias too
    FIRST: tl.constexpr,
    UNTIL: tl.constexpr,  # 0: there is none
    BAND: tl.constexpr,  # more keys or queries to treat as on the diagonal, whole blocks of them
):
    """One program per block of queries and head; the last blocks, which see most, come first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // N
    n = tl.program_id(1) % N
    kv = n // (N // K)
    dtype: tl.constexpr = tl.float32 if WIDEN else tl.bfloat16
    # Three products of truncated float32 add up to nearly all of its precision.
    precision: tl.constexpr = "tf32x3" if WIDEN else "tf32"
    tokens = tl.cast(b, tl.int64) * T
    h = tl.arange(0, WIDTH)[None, :]
    t = block * QUERIES + tl.arange(0, QUERIES)
    at = (t * N + n)[:, None] * H + h
    # Not `&`: in interpreted kernels it is wrong for masks that broadcast, in some versions.
    real = tl.where((t < T)[:, None], h < H, False)
    q = tl.load(q_ptr + tokens * N * H + at, mask=real, other=0.0).to(dtype)
    first = tl.load(starts_ptr + tokens + t, mask=t < T, other=0)
    peak = tl.full([QUERIES], _MASKED, tl.float32)
    total = tl.full([QUERIES], 0.0, tl.float32)
    weighted = tl.full([QUERIES, WIDTH], 0.0, tl.float32)
    for diagonal in tl.static_range(2):
        begin = tl.load(starts_ptr + tokens + block * QUERIES) // KEYS * KEYS
        near = tl.maximum(begin, block * QUERIES - BAND)
        if diagonal:
            begin = near
            end = tl.minimum(block * QUERIES + QUERIES - FIRST, T)
        elif UNTIL:
            end = begin
        else:
            end = near
        for start in tl.range(begin, end, KEYS):
            s = start + tl.arange(0, KEYS)
            at_s = (s * K + kv)[:, None] * H + h
            real_s = tl.where((s < T)[:, None], h < H, False)
            keys = tl.load(k_ptr + tokens * K * H + at_s, mask=real_s, other=0.0).to(dtype)
            values = tl.load(v_ptr + tokens * K * H + at_s, mask=real_s, other=0.0).to(dtype)
            bias = tl.load(bias_ptr + (tokens * K + kv * T) + s, mask=s < T, other=0.0)[None, :]
            visible = s[None, :] >= first[:, None]
            if diagonal:
                own = t[:, None] - s[None, :]
                other = 0.0
                if OTHER:
                    of_keys = (tokens * K + kv * T) + s
                    other = tl.load(spared_ptr + of_keys, mask=s < T, other=0.0)[None, :]
                bias = tl.where(own < SPARED, other, bias)
                visible = tl.where(own >= FIRST, visible, False)
                if UNTIL:
                    visible = tl.where(own < UNTIL, visible, False)
            scores = tl.dot(q, tl.trans(keys), input_precision=precision) * FACTOR + bias
            scores = tl.where(visible, scores, _MASKED)
            higher = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp2(peak - higher)
            weights = tl.exp2(scores - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            weighted = tl.dot(
                weights.to(dtype), values, weighted * shrink[:, None], input_precision=precision
            )
            peak = higher
    lse = peak + tl.log2(total)
    out = weighted / total[:, None]
    if FIRST:
        sees = peak > _MASKED / 2
        lse = tl.where(sees, lse, float("-inf"))
        out = tl.where(sees[:, None], out, 0.0)
    tl.store(lse_ptr + (tokens * N + n * T) + t, lse, mask=t < T)
    tl.store(out_ptr + tokens * N * H + at, out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
@no_type_check
def key_gradients(
    q_ptr,  # [B, T, N, H]
    k_ptr,  # [B, T, K, H]
    v_ptr,
    bias_ptr,  # [B, K, T], float32, to base 2
    spared_ptr,  # likewise, while a key is spared; means nothing without OTHER
    starts_ptr,  # [B, T]
    ends_ptr,  # [B, T]
    lse_ptr,  # [B, N, T], float32, to base 2
    delta_ptr,  # [B, N, T], float32
    d_out_ptr,  # [B, T, N, H]
    dk_ptr,  # [B, T, K, H]
    dv_ptr,
    dbias_ptr,  # [B, K, T], float32, of the natural bias
    dspared_ptr,  # likewise; means nothing without OTHER
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,  # a block: a multiple of QUERIES
    WIDEN: tl.constexpr,
    SPARED: tl.constexpr,
    OTHER: tl.constexpr,
    FIRST: tl.constexpr,
    UNTIL: tl.constexpr,
    BAND: tl.constexpr,
):
    """One program per block of keys and KV head; the first blocks, seen by most, come first."""
    begin_s = tl.program_id(0) * KEYS
    b = tl.program_id(1) // K
    kv = tl.program_id(1) % K
    dtype: tl.constexpr = tl.float32 if WIDEN else tl.bfloat16
    precision: tl.constexpr = "tf32x3" if WIDEN else "tf32"
    tokens = tl.cast(b, tl.int64) * T
    h = tl.arange(0, WIDTH)[None, :]
    s = begin_s + tl.arange(0, KEYS)
    at_s = (s * K + kv)[:, None] * H + h
    real_s = tl.where((s < T)[:, None], h < H, False)
    keys = tl.load(k_ptr + tokens * K * H + at_s, mask=real_s, other=0.0).to(dtype)
    values = tl.load(v_ptr + tokens * K * H + at_s, mask=real_s, other=0.0).to(dtype)
    at_bias = (tokens * K + kv * T) + s
    bias = tl.load(bias_ptr + at_bias, mask=s < T, other=0.0)[:, None]
    other = 0.0
    if OTHER:
        other = tl.load(spared_ptr + at_bias, mask=s < T, other=0.0)[:, None]
        dspared = tl.full([KEYS], 0.0, tl.float32)
    last = tl.load(ends_ptr + tokens + tl.minimum(begin_s + KEYS, T) - 1)
    dk = tl.full([KEYS, WIDTH], 0.0, tl.float32)
    dv = tl.full([KEYS, WIDTH], 0.0, tl.float32)
    dbias = tl.full([KEYS], 0.0, tl.float32)
    for n in tl.range(kv * (N // K), (kv + 1) * (N // K), num_stages=1):
        for diagonal in tl.static_range(2):
            begin = begin_s + KEYS + BAND
            if diagonal:
                end = tl.minimum(begin, T)
                begin = begin_s + FIRST // QUERIES * QUERIES
            elif UNTIL:
                end = begin
            else:
                end = last
            for start in tl.range(begin, end, QUERIES):
                t = start + tl.arange(0, QUERIES)
                at = (t * N + n)[:, None] * H + h
                real = tl.where((t < T)[:, None], h < H, False)
                q = tl.load(q_ptr + tokens * N * H + at, mask=real, other=0.0).to(dtype)
                d_out = tl.load(d_out_ptr + tokens * N * H + at, mask=real, other=0.0).to(dtype)
                of_row = (tokens * N + n * T) + t
                # So queries past the last have weights of 2^-inf.
                lse = tl.load(lse_ptr + of_row, mask=t < T, other=float("inf"))[None, :]
                delta = tl.load(delta_ptr + of_row, mask=t < T, other=0.0)[None, :]
                first = tl.load(starts_ptr + tokens + t, mask=t < T, other=0)
                visible = s[:, None] >= first[None, :]
                scores = tl.dot(keys, tl.trans(q), input_precision=precision) * FACTOR - lse
                if diagonal:
                    own = t[None, :] - s[:, None]
                    scores += tl.where(own < SPARED, other, bias)
                    visible = tl.where(own >= FIRST, visible, False)
                    if UNTIL:
                        visible = tl.where(own < UNTIL, visible, False)
                else:
                    scores += bias
                weights = tl.where(visible, tl.exp2(scores), 0.0)
                dv = tl.dot(weights.to(dtype), d_out, dv, input_precision=precision)
                d_weights = tl.dot(values, tl.trans(d_out), input_precision=precision)
                d_scores = weights * (d_weights - delta)
                dk = tl.dot(d_scores.to(dtype), q, dk, input_precision=precision)
                if diagonal:
                    # The same for 1, but for fewer registers.
                    spares = own == 0 if SPARED == 1 else own < SPARED
                    if OTHER:
                        dspared += tl.sum(tl.where(spares, d_scores, 0.0), 1)
                    d_scores = tl.where(spares, 0.0, d_scores)
                dbias += tl.sum(d_scores, 1)
    tl.store(dk_ptr + tokens * K * H + at_s, (SCALE * dk).to(dk_ptr.dtype.element_ty), mask=real_s)
    tl.store(dv_ptr + tokens * K * H + at_s, dv.to(dv_ptr.dtype.element_ty), mask=real_s)
    tl.store(dbias_ptr + at_bias, dbias, mask=s < T)
    if OTHER:
        tl.store(dspared_ptr + at_bias, dspared, mask=s < T)


@triton.jit
@no_type_check
def query_gradients(
    q_ptr,  # [B, T, N, H]
    k_ptr,  # [B, T, K, H]
    v_ptr,
    bias_ptr,  # [B, K, T], float32, to base 2
    spared_ptr,  # likewise, while a key is spared; means nothing without OTHER
    starts_ptr,  # [B, T]
    lse_ptr,  # [B, N, T], float32, to base 2
    delta_ptr,  # [B, N, T], float32
    d_out_ptr,  # [B, T, N, H]
    dq_ptr,  # [B, T, N, H]
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,  # a block: a multiple of KEYS
    KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
    SPARED: tl.constexpr,
    OTHER: tl.constexpr,
    FIRST: tl.constexpr,
    UNTIL: tl.constexpr,
    BAND: tl.constexpr,
):
    """One program per block of queries and head, as in `attend`."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // N
    n = tl.program_id(1) % N
    kv = n // (N // K)
    dtype: tl.constexpr = tl.float32 if WIDEN else tl.bfloat16
    precision: tl.constexpr = "tf32x3" if WIDEN else "tf32"
    tokens = tl.cast(b, tl.int64) * T
    h = tl.arange(0, WIDTH)[None, :]
    t = block * QUERIES + tl.arange(0, QUERIES)
    at = (t * N + n)[:, None] * H + h
    real = tl.where((t < T)[:, None], h < H, False)
    q = tl.load(q_ptr + tokens * N * H + at, mask=real, other=0.0).to(dtype)
    d_out = tl.load(d_out_ptr + tokens * N * H + at, mask=real, other=0.0).to(dtype)
    of_row = (tokens * N + n * T) + t
    lse = tl.load(lse_ptr + of_row, mask=t < T, other=float("inf"))[:, None]
    delta = tl.load(delta_ptr + of_row, mask=t < T, other=0.0)[:, None]
    first = tl.load(starts_ptr + tokens + t, mask=t < T, other=0)
    dq = tl.full([QUERIES, WIDTH], 0.0, tl.float32)
    for diagonal in tl.static_range(2):
        begin = tl.load(starts_ptr + tokens + block * QUERIES) // KEYS * KEYS
        near = tl.maximum(begin, block * QUERIES - BAND)
        if diagonal:
            begin = near
            end = tl.minimum(block * QUERIES + QUERIES - FIRST, T)
        elif UNTIL:
            end = begin
        else:
            end = near
        for start in tl.range(begin, end, KEYS):
            s = start + tl.arange(0, KEYS)
            at_s = (s * K + kv)[:, None] * H + h
            real_s = tl.where((s < T)[:, None], h < H, False)
            keys = tl.load(k_ptr + tokens * K * H + at_s, mask=real_s, other=0.0).to(dtype)
            values = tl.load(v_ptr + tokens * K * H + at_s, mask=real_s, other=0.0).to(dtype)
            bias = tl.load(bias_ptr + (tokens * K + kv * T) + s, mask=s < T, other=0.0)[None, :]
            visible = s[None, :] >= first[:, None]
            if diagonal:
                own = t[:, None] - s[None, :]
                other = 0.0
                if OTHER:
                    of_keys = (tokens * K + kv * T) + s
                    other = tl.load(spared_ptr + of_keys, mask=s < T, other=0.0)[None, :]
                bias = tl.where(own < SPARED, other, bias)
                visible = tl.where(own >= FIRST, visible, False)
                if UNTIL:
                    visible = tl.where(own < UNTIL, visible, False)
            scores = tl.dot(q, tl.trans(keys), input_precision=precision) * FACTOR + bias
            weights = tl.where(visible, tl.exp2(scores - lse), 0.0)
            d_weights = tl.dot(d_out, tl.trans(values), input_precision=precision)
            d_scores = (weights * (d_weights - delta)).to(dtype)
            dq = tl.dot(d_scores, keys, dq, input_precision=precision)
    tl.store(dq_ptr + tokens * N * H + at, (SCALE * dq).to(dq_ptr.dtype.element_ty), mask=real)
