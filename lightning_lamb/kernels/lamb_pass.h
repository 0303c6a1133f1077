/* The two passes over a layer, for one pair of types. Included by lamb_cpu.c once per pair, with
 *
 *   REAL, SQRT    what is computed in (the type of the weights), and its square root
 *   BITS, MAGNITUDE  the unsigned integer of REAL's size, and its mask without the sign bit
 *   MOMENT        what moments are stored in
 *   LOAD(x)       a stored moment as REAL
 *   STORE(x, r)   a REAL as a stored moment; r: 16 random bits, or 0 where RANDOM is 0
 *   RANDOM        1 if STORE rounds stochastically
 *   NAME(x)       the function's name for this pair
 *   VECTORS       1 if lamb_avx512_pass.h has been included for this pair
 *
 * Symbols as in equations.py: w weight, g gradient, m and v moments, u update.
 */

/* The job's numbers in the type of the computation, so that loops find them in registers. */
typedef struct {
    REAL keep1, take1, keep2, take2;                  /* b1, 1-b1, b2, 1-b2 */
    REAL moment1, grad, moment2, grad_square;         /* equations.Coefficients */
    REAL eps, decay, bound, scale;
} NAME(Numbers);

static NAME(Numbers) NAME(numbers)(const Job *job, int64_t layer) {
    const double *at = job->coefficients + layer * COEFFICIENTS;
    return (NAME(Numbers)){
        (REAL)job->beta1, (REAL)(1 - job->beta1), (REAL)job->beta2, (REAL)(1 - job->beta2),
        (REAL)at[MOMENT1], (REAL)at[GRAD], (REAL)at[MOMENT2], (REAL)at[GRAD_SQUARE],
        (REAL)job->eps, (REAL)job->weight_decay, (REAL)job->max_grad_value, (REAL)job->grad_scale,
    };
}

/* A gradient element as the equations want it: bounded, then scaled. Comparisons are false for NaN, which so survives. */
static ALWAYS_INLINE REAL NAME(prepared)(REAL g, const NAME(Numbers) *the) {
    g = g > the->bound ? the->bound : g;
    g = g < -the->bound ? -the->bound : g;
    return g * the->scale;
}

/* u = m_hat/(sqrt(v_hat) + eps) + weight_decay*w. A term whose coefficient is zero is left out: 0*inf would be NaN. */
static ALWAYS_INLINE REAL NAME(adam)(const NAME(Numbers) *the, REAL w, REAL g, REAL m, REAL v) {
    REAL m_hat = the->moment1 * m, v_hat = the->moment2 * v;
    if (the->grad != 0) m_hat += the->grad * g;
    if (the->grad_square != 0) v_hat += the->grad_square * g * g;
    const REAL u = m_hat / (SQRT(v_hat) + the->eps);
    return the->decay != 0 ? u + the->decay * w : u;
}

/* Updates the moments of n elements and writes their updates to u. `from` is the position of the first in the layer. */
static void NAME(direction)(NAME(Numbers) numbers, int base, int64_t n, const REAL *restrict w, const REAL *restrict g,
                            MOMENT *restrict m, MOMENT *restrict v, REAL *restrict u, int64_t from, uint32_t seed) {
    const NAME(Numbers) *the = &numbers;
    if (base == ADAM) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const uint32_t random MAYBE_UNUSED = RANDOM ? random_bits((uint32_t)(from + i), seed) : 0;
            const REAL grad = NAME(prepared)(g[i], the);
            const MOMENT moment1 = STORE(the->keep1 * LOAD(m[i]) + the->take1 * grad, random & 0xffff);
            const MOMENT moment2 = STORE(the->keep2 * LOAD(v[i]) + the->take2 * grad * grad, random >> 16);
            m[i] = moment1, v[i] = moment2;
            u[i] = NAME(adam)(the, w[i], grad, LOAD(moment1), LOAD(moment2));
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const uint32_t random MAYBE_UNUSED = RANDOM ? random_bits((uint32_t)(from + i), seed) : 0;
            REAL grad = NAME(prepared)(g[i], the);
            if (the->decay != 0) grad += the->decay * w[i];
            m[i] = STORE(the->keep1 * LOAD(m[i]) + the->take1 * grad, random & 0xffff);
            u[i] = LOAD(m[i]);
        }
    }
}

/* w = w - step_size*u with u worked out again, from the moments as `direction` left them. */
static void NAME(apply_again)(NAME(Numbers) numbers, int base, int64_t n, REAL *restrict w, const REAL *restrict g,
                              const MOMENT *restrict m, const MOMENT *restrict v, REAL step_size) {
    const NAME(Numbers) *the = &numbers;
    if (base == MOMENTUM)
        for (int64_t i = 0; i < n; i++) w[i] -= step_size * LOAD(m[i]);
    else if (g)
        for (int64_t i = 0; i < n; i++)
            w[i] -= step_size * NAME(adam)(the, w[i], NAME(prepared)(g[i], the), LOAD(m[i]), LOAD(v[i]));
    else {
        numbers.grad = numbers.grad_square = 0;
        for (int64_t i = 0; i < n; i++) w[i] -= step_size * NAME(adam)(the, w[i], 0, LOAD(m[i]), LOAD(v[i]));
    }
}

static void NAME(apply_kept)(int64_t n, REAL *restrict w, const REAL *restrict u, REAL step_size) {
    for (int64_t i = 0; i < n; i++) w[i] -= step_size * u[i];
}

/* equations.norm_statistic of at most BLOCK elements. */
static double NAME(statistic)(const REAL *restrict x, int64_t n, int norm) {
    if (norm == LINF) {
        BITS top = 0; /* magnitudes are ordered like their bits, with NaN above infinity: a NaN is kept */
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < n; i++) {
            BITS bits;
            memcpy(&bits, &x[i], sizeof bits);
            bits &= MAGNITUDE;
            top = bits > top ? bits : top;
        }
        REAL largest;
        memcpy(&largest, &top, sizeof largest);
        return largest;
    }
    REAL sum = 0;
    if (norm == L1)
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += x[i] < 0 ? -x[i] : x[i];
    else
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    /* Where float32 has lost digits or overflowed, once more in double. Few additions make one sum: it is right to 1e-7. */
    if (sum > (REAL)1e-25 && sum < (REAL)1e30) return sum;
    double wide = 0;
    for (int64_t i = 0; i < n; i++) wide += norm == L1 ? fabs((double)x[i]) : (double)x[i] * (double)x[i];
    return wide;
}

#if VECTORS
/* Whether the vectors of lamb_avx512_pass.h do this job. */
static int NAME(suits512)(const Job *job, int64_t layer) {
    const double *at = job->coefficients + layer * COEFFICIENTS;
    return job->base == ADAM && job->norm == L2 && at[GRAD] == 0 && at[GRAD_SQUARE] == 0 && at[MOMENT2] > 0;
}

static void NAME(first512)(const Job *job, int64_t layer, int64_t from, int64_t n, void *kept, double *statistics) {
    float *w = (float *)job->weights[layer];
    MOMENT *m = (MOMENT *)job->moments1[layer], *v = (MOMENT *)job->moments2[layer];
    const Numbers512 numbers = numbers512(job, layer);
    float converted[BLOCK], update[BLOCK];
    for (int64_t end = from + n, i = from, size; i < end; i += size) {
        size = end - i < BLOCK ? end - i : BLOCK;
        float *u = kept ? (float *)kept + (i - from) : NULL;
        const float *g = gradient_float(job, layer, i, size, converted);
        double sums[2] = {0, 0};
        if (job->copy_type != NO_COPY) copy_in_float(job, layer, w + i, i, size);
        const int sure = NAME(direction512)(&numbers, size, w + i, g, m + i, v + i, u, i, job->seeds[layer], sums);
        if (!sure && job->adapt) {
            NAME(apply512)(&numbers, size, w + i, m + i, v + i, update, 0);
            sums[0] = NAME(statistic)(w + i, size, L2);
            sums[1] = NAME(statistic)(update, size, L2);
        }
        statistics[0] += sums[0], statistics[1] += sums[1];
    }
    if (!job->adapt) statistics[0] = statistics[1] = 0;
}
#endif

/* First pass over elements [from, from + n) of a layer: moments, statistics, and the updates if `kept` is given. */
static void NAME(first)(const Job *job, int64_t layer, int64_t from, int64_t n, void *kept, double *statistics) {
#if VECTORS
    if (NAME(suits512)(job, layer)) {
        NAME(first512)(job, layer, from, n, kept, statistics);
        return;
    }
#endif
    REAL *w = (REAL *)job->weights[layer];
    MOMENT *m = (MOMENT *)job->moments1[layer], *v = job->base == ADAM ? (MOMENT *)job->moments2[layer] : m;
    const NAME(Numbers) numbers = NAME(numbers)(job, layer);
    REAL converted[BLOCK], update[BLOCK];
    for (int64_t end = from + n, i = from, size; i < end; i += size) {
        size = end - i < BLOCK ? end - i : BLOCK;
        REAL *u = kept ? (REAL *)kept + (i - from) : update;
        const REAL *g = NAME(gradient)(job, layer, i, size, converted);
        NAME(copy_in)(job, layer, w + i, i, size);
        NAME(direction)(numbers, job->base, size, w + i, g, m + i, v + i, u, i, job->seeds[layer]);
        if (!job->adapt) continue;
        add_statistic(job->norm, &statistics[0], NAME(statistic)(w + i, size, job->norm));
        add_statistic(job->norm, &statistics[1], NAME(statistic)(u, size, job->norm));
    }
}

/* Second pass: w = w - step_size*u, with `kept` updates or with updates worked out again from the moments. */
static void NAME(second)(const Job *job, int64_t layer, int64_t from, int64_t n, const void *kept, double step_size) {
    REAL *w = (REAL *)job->weights[layer];
    const MOMENT *m = (const MOMENT *)job->moments1[layer];
    const MOMENT *v = job->base == ADAM ? (const MOMENT *)job->moments2[layer] : m;
    const NAME(Numbers) numbers = NAME(numbers)(job, layer);
    const int looks_ahead = numbers.grad != 0 || numbers.grad_square != 0;
#if VECTORS
    const Numbers512 vectors = numbers512(job, layer);
    const int suits = NAME(suits512)(job, layer);
#endif
    REAL converted[BLOCK];
    for (int64_t end = from + n, i = from, size; i < end; i += size) {
        size = end - i < BLOCK ? end - i : BLOCK;
        if (kept) NAME(apply_kept)(size, w + i, (const REAL *)kept + (i - from), (REAL)step_size);
#if VECTORS
        else if (suits) NAME(apply512)(&vectors, size, w + i, m + i, v + i, NULL, (float)step_size);
#endif
        else {
            const REAL *g = looks_ahead ? NAME(gradient)(job, layer, i, size, converted) : NULL;
            NAME(apply_again)(numbers, job->base, size, w + i, g, m + i, v + i, (REAL)step_size);
        }
        NAME(copy_out)(job, layer, w + i, i, size);
    }
}
