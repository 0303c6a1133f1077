/* The two passes of default LAMB (float32 weights, L2 norms, no look-ahead) in AVX-512, for one type of moments.
 * Included by lamb_avx512.h once per type of moments, with
 *
 *   MOMENT           what moments are stored in
 *   LOAD512(p, k)    16 stored moments as float32; k: mask of those that exist
 *   STORE512(p, k, x, r)  16 float32 as stored moments, in place of x what was stored; r: 16 random bits each
 *   RANDOM           1 if STORE512 rounds stochastically
 *   NAME(x)          the function's name for this type
 *
 * The loops of lamb_pass.h are limited by square root and division, a compiler's best. Here the root is an estimate and
 * one step of Newton's, right to the last bit but one, while the divider divides; and norms are summed on the way.
 */

/* u = scale*m/(sqrt(v) + eps) + decay*w: equations.adam_update with the bias correction drawn out of the root. */
static ALWAYS_INLINE __m512 NAME(update512)(const Numbers512 *the, __m512 w, __m512 m, __m512 v) {
    const __m512 quotient = _mm512_div_ps(m, _mm512_add_ps(root512(v), the->eps));
    const __m512 u = _mm512_mul_ps(quotient, the->moment1);
    return the->decays ? _mm512_fmadd_ps(the->decay, w, u) : u;
}

/* What a first pass carries along. */
typedef struct {
    __m512 squares_w, squares_u;
    __m512i place;
    uint32_t seed;
} NAME(Carried512);

/* One vector of the first pass, of those elements that are `here`. */
static ALWAYS_INLINE void NAME(direct512)(const Numbers512 *the, __mmask16 here, const float *restrict w,
                                          const float *restrict g, MOMENT *restrict m, MOMENT *restrict v,
                                          float *restrict u, NAME(Carried512) *carried) {
    AHEAD512(w), AHEAD512(g), AHEAD512(m), AHEAD512(v);
    const __m512 weight = _mm512_maskz_loadu_ps(here, w);
    __m512 grad = _mm512_maskz_loadu_ps(here, g);
    if (the->bounded) grad = _mm512_max_ps(the->low, _mm512_min_ps(the->high, grad)); /* of NaN the second: NaN */
    grad = _mm512_mul_ps(grad, the->grad_scale);
    __m512 moment1 = _mm512_mul_ps(the->take1, grad);
    __m512 moment2 = _mm512_mul_ps(_mm512_mul_ps(the->take2, grad), grad);
    moment1 = _mm512_fmadd_ps(the->keep1, LOAD512(m, here), moment1);
    moment2 = _mm512_fmadd_ps(the->keep2, LOAD512(v, here), moment2);
    const __m512i random MAYBE_UNUSED = RANDOM ? random512(carried->place, carried->seed) : _mm512_setzero_si512();
    STORE512(m, here, moment1, _mm512_and_si512(random, _mm512_set1_epi32(0xffff)));
    STORE512(v, here, moment2, _mm512_srli_epi32(random, 16));
    if (RANDOM) carried->place = _mm512_add_epi32(carried->place, _mm512_set1_epi32(16));
    const __m512 update = NAME(update512)(the, weight, moment1, moment2);
    if (u) _mm512_mask_storeu_ps(u, here, update);
    carried->squares_w = _mm512_fmadd_ps(weight, weight, carried->squares_w);
    carried->squares_u = _mm512_mask3_fmadd_ps(update, update, carried->squares_u, here); /* beyond the end maybe NaN */
}

/* Updates the moments of n elements; their updates go to u if that is given, the sums of squares to statistics. Returns
 * 0 if float32 may have lost digits of these or overflowed: then u is not to be trusted to have been summed up. */
static int NAME(direction512)(const Numbers512 *the, int64_t n, const float *restrict w, const float *restrict g,
                              MOMENT *restrict m, MOMENT *restrict v, float *restrict u, int64_t from, uint32_t seed,
                              double *statistics) {
    const __m512i place = _mm512_add_epi32(_mm512_set1_epi32((int)from), LANES512);
    NAME(Carried512) carried = {_mm512_setzero_ps(), _mm512_setzero_ps(), place, seed};
    const int64_t whole = n & ~(int64_t)15;
    for (int64_t i = 0; i < whole; i += 16)
        NAME(direct512)(the, ALL512, w + i, g + i, m + i, v + i, u ? u + i : NULL, &carried);
    if (whole < n)
        NAME(direct512)(the, FIRST512(n - whole), w + whole, g + whole, m + whole, v + whole, u ? u + whole : NULL,
                        &carried);
    const float sum_w = _mm512_reduce_add_ps(carried.squares_w), sum_u = _mm512_reduce_add_ps(carried.squares_u);
    statistics[0] += sum_w, statistics[1] += sum_u;
    return sum_w > 1e-25f && sum_w < 1e30f && sum_u > 1e-25f && sum_u < 1e30f;
}

/* One vector of the second pass, of those elements that are `here`. */
static ALWAYS_INLINE void NAME(move512)(const Numbers512 *the, __mmask16 here, float *restrict w,
                                        const MOMENT *restrict m, const MOMENT *restrict v, float *restrict u,
                                        __m512 step_size) {
    AHEAD512(w), AHEAD512(m), AHEAD512(v);
    const __m512 weight = _mm512_maskz_loadu_ps(here, w);
    const __m512 update = NAME(update512)(the, weight, LOAD512(m, here), LOAD512(v, here));
    if (u) _mm512_mask_storeu_ps(u, here, update);
    else _mm512_mask_storeu_ps(w, here, _mm512_fnmadd_ps(step_size, update, weight));
}

/* The updates of n elements, worked out again from the moments: subtracted from w times step_size, or written to u. */
static void NAME(apply512)(const Numbers512 *the, int64_t n, float *restrict w, const MOMENT *restrict m,
                           const MOMENT *restrict v, float *restrict u, float step_size) {
    const __m512 size = _mm512_set1_ps(step_size);
    const int64_t whole = n & ~(int64_t)15;
    for (int64_t i = 0; i < whole; i += 16) NAME(move512)(the, ALL512, w + i, m + i, v + i, u ? u + i : NULL, size);
    if (whole < n)
        NAME(move512)(the, FIRST512(n - whole), w + whole, m + whole, v + whole, u ? u + whole : NULL, size);
}
