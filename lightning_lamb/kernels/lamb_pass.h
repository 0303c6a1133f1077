/* The two passes over a run of elements, for one pair of types. Included by lamb_cpu.c once per pair, with
 *
 *   REAL          what is computed in (the type of the weights)
 *   BITS, MAGNITUDE  the unsigned integer of REAL's size, and its mask without the sign bit
 *   MOMENT        what moments are stored in
 *   LOAD(x)       a stored moment as REAL
 *   STORE(x, r)   a REAL as a stored moment; r: 16 random bits, or 0 where RANDOM is 0
 *   RANDOM        1 if STORE rounds stochastically
 *   NAME(x)       the function's name for this pair
 *
 * Symbols as in equations.py: w weight, g gradient, m and v moments, u update.
 */

/* A gradient element as the equations want it: bounded, then scaled. Comparisons are false for NaN, which so survives. */
static inline REAL NAME(prepared)(REAL g, REAL bound, REAL scale) {
    g = g > bound ? bound : g;
    g = g < -bound ? -bound : g;
    return g * scale;
}

/* u = m_hat/(sqrt(v_hat) + eps) + weight_decay*w. A term whose coefficient is zero is left out: 0*inf would be NaN. */
static inline REAL NAME(adam)(const Job *job, const double *at, REAL w, REAL g, REAL m, REAL v) {
    REAL m_hat = (REAL)at[MOMENT1] * m + (at[GRAD] != 0 ? (REAL)at[GRAD] * g : 0);
    REAL v_hat = (REAL)at[MOMENT2] * v + (at[GRAD_SQUARE] != 0 ? (REAL)at[GRAD_SQUARE] * g * g : 0);
    REAL u = m_hat / (SQRT(v_hat) + (REAL)job->eps);
    return job->weight_decay != 0 ? u + (REAL)job->weight_decay * w : u;
}

/* A magnitude's bits order like the magnitude, with NaN above infinity, so an integer maximum keeps a NaN. */
static inline BITS NAME(magnitude)(REAL x) {
    BITS bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & MAGNITUDE;
}

/* First pass: moments in place, and what the norms need. `base` and `norm` are constants where it is called. */
static ALWAYS_INLINE void NAME(first_pass)(const Job *job, const double *at, const REAL *restrict w, const REAL *restrict g,
                                           MOMENT *restrict m, MOMENT *restrict v, int64_t from, int64_t n, uint32_t seed,
                                           double *restrict statistics, const int base, const int norm) {
    const REAL bound = (REAL)job->max_grad_value, scale = (REAL)job->grad_scale;
    const REAL keep1 = (REAL)job->beta1, take1 = (REAL)(1 - job->beta1);
    const REAL keep2 = (REAL)job->beta2, take2 = (REAL)(1 - job->beta2);
    const REAL decay = (REAL)job->weight_decay;
    double sum_w = 0, sum_u = 0;
    BITS top_w = 0, top_u = 0;
#pragma omp simd reduction(+ : sum_w, sum_u) reduction(max : top_w, top_u)
    for (int64_t i = 0; i < n; i++) {
        const uint32_t random MAYBE_UNUSED = RANDOM ? random_bits((uint32_t)(from + i), seed) : 0;
        REAL grad = NAME(prepared)(g[i], bound, scale), u;
        if (base == ADAM) {
            m[i] = STORE(keep1 * LOAD(m[i]) + take1 * grad, random & 0xffff);
            v[i] = STORE(keep2 * LOAD(v[i]) + take2 * grad * grad, random >> 16);
            u = NAME(adam)(job, at, w[i], grad, LOAD(m[i]), LOAD(v[i]));
        } else {
            if (job->weight_decay != 0) grad += decay * w[i];
            m[i] = STORE(keep1 * LOAD(m[i]) + take1 * grad, random & 0xffff);
            u = LOAD(m[i]);
        }
        if (norm == L2) {
            sum_w += (double)w[i] * (double)w[i];
            sum_u += (double)u * (double)u;
        } else if (norm == L1) {
            sum_w += fabs((double)w[i]);
            sum_u += fabs((double)u);
        } else if (norm == LINF) {
            const BITS here_w = NAME(magnitude)(w[i]), here_u = NAME(magnitude)(u);
            top_w = here_w > top_w ? here_w : top_w;
            top_u = here_u > top_u ? here_u : top_u;
        }
    }
    if (norm == LINF) {
        REAL largest_w, largest_u;
        memcpy(&largest_w, &top_w, sizeof top_w);
        memcpy(&largest_u, &top_u, sizeof top_u);
        sum_w = largest_w, sum_u = largest_u;
    }
    add_statistic(norm, &statistics[0], sum_w);
    add_statistic(norm, &statistics[1], sum_u);
}

/* Second pass: w = w - step_size*u, with u worked out again from the moments rather than kept in memory. */
static ALWAYS_INLINE void NAME(second_pass)(const Job *job, const double *at, REAL step_size, REAL *restrict w,
                                            const REAL *restrict g, const MOMENT *restrict m, const MOMENT *restrict v,
                                            int64_t n, const int base, const int looks_ahead) {
    const REAL bound = (REAL)job->max_grad_value, scale = (REAL)job->grad_scale;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const REAL grad = looks_ahead ? NAME(prepared)(g[i], bound, scale) : 0;
        const REAL u = base == ADAM ? NAME(adam)(job, at, w[i], grad, LOAD(m[i]), LOAD(v[i])) : LOAD(m[i]);
        w[i] -= step_size * u;
    }
}

/* Both passes over elements [from, from + n) of a layer, their gradients converted block by block if need be. */
static void NAME(first)(const Job *job, int64_t layer, int64_t from, int64_t n, double *statistics) {
    const double *at = job->coefficients + layer * COEFFICIENTS;
    REAL *w = (REAL *)job->weights[layer];
    MOMENT *m = (MOMENT *)job->moments1[layer], *v = job->base == ADAM ? (MOMENT *)job->moments2[layer] : NULL;
    const uint32_t seed = job->seeds[layer];
    const int norm = job->adapt ? job->norm : NO_NORM;
    REAL converted[BLOCK];
    for (int64_t end = from + n, i = from, size; i < end; i += size) {
        const REAL *g;
        size = NAME(gradient)(job, layer, i, end - i, converted, &g);
        MOMENT *second = v ? v + i : NULL;
        if (job->copy_type != NO_COPY) {
            size = size < BLOCK ? size : BLOCK;
            NAME(copy_in)(job, layer, w + i, i, size);
        }
#define FIRST_PASS(BASE, NORM) \
    NAME(first_pass)(job, at, w + i, g, m + i, second, i, size, seed, statistics, BASE, NORM)
        if (job->base == MOMENTUM) {
            if (norm == L2) FIRST_PASS(MOMENTUM, L2);
            else if (norm == L1) FIRST_PASS(MOMENTUM, L1);
            else if (norm == LINF) FIRST_PASS(MOMENTUM, LINF);
            else FIRST_PASS(MOMENTUM, NO_NORM);
        } else if (norm == L2) FIRST_PASS(ADAM, L2);
        else if (norm == L1) FIRST_PASS(ADAM, L1);
        else if (norm == LINF) FIRST_PASS(ADAM, LINF);
        else FIRST_PASS(ADAM, NO_NORM);
#undef FIRST_PASS
    }
}

static void NAME(second)(const Job *job, int64_t layer, int64_t from, int64_t n, double step_size) {
    const double *at = job->coefficients + layer * COEFFICIENTS;
    REAL *w = (REAL *)job->weights[layer];
    const MOMENT *m = (const MOMENT *)job->moments1[layer];
    const MOMENT *v = job->base == ADAM ? (const MOMENT *)job->moments2[layer] : NULL;
    const int looks_ahead = at[GRAD] != 0 || at[GRAD_SQUARE] != 0;
    REAL converted[BLOCK];
    for (int64_t end = from + n, i = from, size; i < end; i += size) {
        const REAL *g = NULL;
        size = end - i < BLOCK ? end - i : BLOCK;
        if (looks_ahead) NAME(gradient)(job, layer, i, size, converted, &g);
        if (job->base == MOMENTUM) NAME(second_pass)(job, at, (REAL)step_size, w + i, NULL, m + i, NULL, size, MOMENTUM, 0);
        else if (looks_ahead) NAME(second_pass)(job, at, (REAL)step_size, w + i, g, m + i, v + i, size, ADAM, 1);
        else NAME(second_pass)(job, at, (REAL)step_size, w + i, NULL, m + i, v + i, size, ADAM, 0);
        if (job->copy_type != NO_COPY) NAME(copy_out)(job, layer, w + i, i, size);
    }
}
