/* LAMB and LARS on a CPU: each element is read and written as often as the algorithm needs, and no more.
 *
 * Compiled at first use by kernels/cpu_library.py and called through ctypes by kernels/cpu.py; it includes no header of
 * torch. The update is that of equations.py, where the symbols are explained.
 *
 * A layer needs two passes, because its norms are known only after all of it. The first updates the moments and sums up
 * the norms (reads g, m, v, w; writes m, v), the second computes the update again and applies it (reads m, v, w; writes
 * w): 40 bytes per float32 parameter and no temporary. The second goes backwards, so that it begins with what the cache
 * still holds.
 *
 * Norms do not depend on the number of threads: they are sums in double over tiles of fixed size, added in their order.
 */
#define _GNU_SOURCE                 /* RTLD_DEFAULT */
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define MAYBE_UNUSED __attribute__((unused))

enum { TILE = 1 << 15 };      /* elements of one task of a large layer, and of one of its partial sums */
enum { SMALL = 1 << 16 };     /* elements of layers that one thread does alone; the updates of so many are kept */
enum { BLOCK = 1 << 9 };      /* elements done at a time; they stay in the first-level cache */
enum { MOST_THREADS = 256 };

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, NO_COPY };
enum { ADAM, MOMENTUM };
enum { L2, L1, LINF };
enum { FIRST = 1, SECOND = 2 };                                          /* passes, as bits */
enum { MOMENT1, GRAD, MOMENT2, GRAD_SQUARE, COEFFICIENTS };                  /* equations.Coefficients without lr */

/* One call; mirrored by the class of the same name in cpu.py. Arrays have one entry per layer unless said otherwise. */
typedef struct {
    int64_t layers;
    const int64_t *sizes;
    void *const *weights;
    const void *const *grads;
    void *const *moments1;
    void *const *moments2;          /* unused by MOMENTUM */
    void *const *copies;            /* half-precision parameters, of which `weights` are the masters; see copy_in */
    const double *coefficients;     /* (layers, COEFFICIENTS) */
    const uint32_t *seeds;          /* of stochastic rounding; differ by layer and step */
    const double *step_sizes;       /* SECOND alone: all of it; both passes: what multiplies the ratio */
    double *weight_statistics;      /* out, by FIRST: sums of squares or of magnitudes, or largest magnitudes */
    double *update_statistics;      /* out, by FIRST */
    double *ratios;                 /* out, if both passes are asked for */
    double beta1, beta2, eps, weight_decay;
    double max_grad_value;          /* infinite for none */
    double grad_scale;              /* negative to ascend */
    double phi_low, phi_high;       /* bounds on the weight norm */
    double ratio_low, ratio_high;   /* bounds on the ratio */
    int32_t base, norm, adapt, passes;
    int32_t weight_type, grad_type, moment_type, copy_type;
    int64_t threads;
} Job;

static ALWAYS_INLINE void add_statistic(int norm, double *total, double part) {
    if (norm == LINF) *total = part > *total || part != part ? part : *total; /* a NaN stays: nothing is above it */
    else *total += part;
}

/* ---------------------------------------------------------------------------------------------------------- types */

static inline float from_bfloat16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Adds `noise` below the last bit kept and cuts off: 16 random bits round stochastically. A NaN would turn into a number. */
static inline uint16_t cut_to_bfloat16(float value, uint32_t noise) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + (value == value ? noise : 0)) >> 16);
}

static inline uint16_t nearest_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return cut_to_bfloat16(value, 0x7fffu + ((bits >> 16) & 1u));
}

/* 32 random bits of an element: a multiplicative hash of its position. Same in rounding.py. */
static inline uint32_t random_bits(uint32_t position, uint32_t seed) {
    uint32_t x = position * 0x9e3779b1u + seed;
    x = (x ^ x >> 16) * 0x85ebca6bu;
    return x ^ x >> 15;
}

#ifdef __FLT16_MAX__
EXPORT int32_t lamb_knows_float16(void) { return 1; }
#else
EXPORT int32_t lamb_knows_float16(void) { return 0; }
#endif
EXPORT int64_t lamb_job_size(void) { return (int64_t)sizeof(Job); }
EXPORT int64_t lamb_tile(void) { return TILE; }

/* Gradients of another type are converted by blocks; half-precision parameters are compared and written by blocks.
 *   gradient   gradient elements [from, from + n) as REAL, n <= BLOCK
 *   copy_in    takes over the elements of the parameter that somebody else changed: where it is not the rounded master
 *   copy_out   rounds the master to the parameter */
#define CONVERT(TYPE, SOURCE, VALUE)                                              \
    if (job->grad_type == TYPE) {                                                 \
        const SOURCE *restrict source = (const SOURCE *)job->grads[layer] + from; \
        for (int64_t i = 0; i < n; i++) converted[i] = VALUE;                     \
    }
#define COPY_IN(TYPE, HALF, ROUNDED, VALUE)                                           \
    if (job->copy_type == TYPE) {                                                     \
        const HALF *restrict half = (const HALF *)job->copies[layer] + from;          \
        for (int64_t i = 0; i < n; i++) w[i] = (ROUNDED) == half[i] ? w[i] : (VALUE); \
    }
#define COPY_OUT(TYPE, HALF, ROUNDED)                            \
    if (job->copy_type == TYPE) {                                \
        HALF *restrict half = (HALF *)job->copies[layer] + from; \
        for (int64_t i = 0; i < n; i++) half[i] = ROUNDED;       \
    }
#ifdef __FLT16_MAX__
#define IF_FLOAT16(statement) statement
#else
#define IF_FLOAT16(statement)
#endif
#define TYPE_CONVERSIONS(NAME, REAL, TYPE)                                                                              \
    static const REAL *NAME(gradient)(const Job *job, int64_t layer, int64_t from, int64_t n, REAL *restrict converted) { \
        if (job->grad_type == TYPE) return (const REAL *)job->grads[layer] + from;                                      \
        CONVERT(FLOAT32, float, (REAL)source[i])                                                                        \
        CONVERT(FLOAT64, double, (REAL)source[i])                                                                       \
        CONVERT(BFLOAT16, uint16_t, (REAL)from_bfloat16(source[i]))                                                     \
        IF_FLOAT16(CONVERT(FLOAT16, _Float16, (REAL)source[i]))                                                         \
        return converted;                                                                                               \
    }                                                                                                                   \
    static void NAME(copy_in)(const Job *job, int64_t layer, REAL *restrict w, int64_t from, int64_t n) {               \
        COPY_IN(BFLOAT16, uint16_t, nearest_bfloat16((float)w[i]), (REAL)from_bfloat16(half[i]))                        \
        IF_FLOAT16(COPY_IN(FLOAT16, _Float16, (_Float16)w[i], (REAL)half[i]))                                           \
    }                                                                                                                   \
    static void NAME(copy_out)(const Job *job, int64_t layer, const REAL *restrict w, int64_t from, int64_t n) {        \
        COPY_OUT(BFLOAT16, uint16_t, nearest_bfloat16((float)w[i]))                                                     \
        IF_FLOAT16(COPY_OUT(FLOAT16, _Float16, (_Float16)w[i]))                                                         \
    }
#define float_(x) x##_float
#define double_(x) x##_double
#define narrow_(x) x##_narrow
TYPE_CONVERSIONS(float_, float, FLOAT32)
TYPE_CONVERSIONS(double_, double, FLOAT64)
#define gradient_narrow gradient_float
#define copy_in_narrow copy_in_float
#define copy_out_narrow copy_out_float

/* --------------------------------------------------------------------------------------------------------- passes */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_AVX512 1
#include "lamb_avx512.h"
#else
#define HAS_AVX512 0
#endif

#define REAL float
#define BITS uint32_t
#define MAGNITUDE 0x7fffffffu
#define SQRT sqrtf
#define MOMENT float
#define LOAD(x) (x)
#define STORE(x, r) (x)
#define RANDOM 0
#define NAME float_
#define VECTORS HAS_AVX512
#include "lamb_pass.h"
#undef VECTORS
#undef MOMENT
#undef LOAD
#undef STORE
#undef RANDOM
#undef NAME

/* float32 weights with moments in bfloat16, rounded stochastically: rounded to nearest, an average that moves by less
 * than half a unit in the last place per step (beta2 = 0.999: always) would never move. */
#define MOMENT uint16_t
#define LOAD(x) from_bfloat16(x)
#define STORE(x, r) cut_to_bfloat16(x, r)
#define RANDOM 1
#define NAME narrow_
#define VECTORS HAS_AVX512
#include "lamb_pass.h"
#undef VECTORS
#undef REAL
#undef BITS
#undef MAGNITUDE
#undef SQRT
#undef MOMENT
#undef LOAD
#undef STORE
#undef RANDOM
#undef NAME

#define REAL double
#define BITS uint64_t
#define MAGNITUDE 0x7fffffffffffffffu
#define SQRT sqrt
#define MOMENT double
#define LOAD(x) (x)
#define STORE(x, r) (x)
#define RANDOM 0
#define NAME double_
#define VECTORS 0
#include "lamb_pass.h"

static void first(const Job *job, int64_t layer, int64_t from, int64_t n, void *kept, double *statistics) {
    statistics[0] = statistics[1] = 0;
    if (job->weight_type == FLOAT64) first_double(job, layer, from, n, kept, statistics);
    else if (job->moment_type == BFLOAT16) first_narrow(job, layer, from, n, kept, statistics);
    else first_float(job, layer, from, n, kept, statistics);
}

static void second(const Job *job, int64_t layer, int64_t from, int64_t n, const void *kept, double step_size) {
    if (job->weight_type == FLOAT64) second_double(job, layer, from, n, kept, step_size);
    else if (job->moment_type == BFLOAT16) second_narrow(job, layer, from, n, kept, step_size);
    else second_float(job, layer, from, n, kept, step_size);
}

/* ---------------------------------------------------------------------------------------------------------- ratio */

static double clamped(double value, double low, double high) {
    return value < low ? low : value > high ? high : value;
}

/* equations.trust_ratio: phi(||w||)/||u||, or 1 where either norm is zero. */
static double trust_ratio(const Job *job, double weight_statistic, double update_statistic) {
    const double weight_norm = job->norm == L2 ? sqrt(weight_statistic) : weight_statistic;
    const double update_norm = job->norm == L2 ? sqrt(update_statistic) : update_statistic;
    if (weight_norm == 0 || update_norm == 0) return 1;
    return clamped(clamped(weight_norm, job->phi_low, job->phi_high) / update_norm, job->ratio_low, job->ratio_high);
}

/* Stores a layer's statistics and returns the size of its step. */
static double finish_first(const Job *job, int64_t layer, const double *statistics) {
    job->weight_statistics[layer] = statistics[0];
    job->update_statistics[layer] = statistics[1];
    if (!(job->passes & SECOND)) return 0;
    const double ratio = job->adapt ? trust_ratio(job, statistics[0], statistics[1]) : 1;
    job->ratios[layer] = ratio;
    return job->step_sizes[layer] * ratio;
}

/* ---------------------------------------------------------------------------------------------------------- tasks */

/* A large layer is cut into tiles, a task each, that the threads share. Small layers are done whole, a run of them per
 * task. If both passes are made, tasks are the first ones, and each thread makes the second pass over the tiles that it
 * made the first over, backwards: its own cache holds them, while another one's would have to be asked. */
typedef struct {
    int64_t layer, until;           /* small layers [layer, until); of a large one `until` is unused */
    int64_t tile;                   /* of the large layer, or -1 */
    int pass;
} Task;

/* What threads share about a large layer. */
typedef struct {
    double *parts;                  /* (tiles, 2) statistics of its tiles */
    double step_size;
    atomic_llong unfinished;        /* first passes */
    int64_t end;                    /* the task after the layer's last first pass */
    atomic_int ready;               /* step_size is known */
} Shared;

typedef struct {
    const Job *job;
    Task *tasks;
    int64_t count;
    int64_t most_kept;              /* bytes of the updates of the largest small layer, if both passes are made */
    Shared *shared;
    int64_t most_tiles;             /* of one layer, if both passes are made */
    int32_t *own;                   /* (threads, most_tiles): the tiles of the present layer that a thread has begun */
    atomic_llong next;
    atomic_llong places;            /* threads that have begun */
} Work;

static int64_t tiles_of(int64_t size) { return (size + TILE - 1) / TILE; }

static void whole_layer(const Job *job, int64_t layer, void *kept) {
    const int64_t size = job->sizes[layer];
    double step_size = 0, statistics[2];
    if (job->passes & FIRST) {
        first(job, layer, 0, size, kept, statistics);
        step_size = finish_first(job, layer, statistics);
    }
    if (job->passes == SECOND) step_size = job->step_sizes[layer];
    if (job->passes & SECOND) second(job, layer, 0, size, kept, step_size);
}

static void first_of_tile(const Work *work, int64_t layer, int64_t tile) {
    const Job *job = work->job;
    Shared *shared = &work->shared[layer];
    const int64_t from = tile * TILE, rest = job->sizes[layer] - from;
    first(job, layer, from, rest < TILE ? rest : TILE, NULL, &shared->parts[2 * tile]);
    if (atomic_fetch_sub_explicit(&shared->unfinished, 1, memory_order_acq_rel) > 1) return;
    double total[2] = {0, 0};       /* this thread was the last one: all tiles are there */
    for (int64_t part = 0; part < tiles_of(job->sizes[layer]); part++) {
        add_statistic(job->norm, &total[0], shared->parts[2 * part]);
        add_statistic(job->norm, &total[1], shared->parts[2 * part + 1]);
    }
    shared->step_size = finish_first(job, layer, total);
    atomic_store_explicit(&shared->ready, 1, memory_order_release);
}

static void second_of_tile(const Work *work, int64_t layer, int64_t tile) {
    const Job *job = work->job;
    Shared *shared = &work->shared[layer];
    double step_size;
    if (job->passes & FIRST) {
        /* Every first pass of this layer was claimed before, by threads that are at it now, or at an earlier layer's
         * second passes: not long. */
        for (int spins = 0; !atomic_load_explicit(&shared->ready, memory_order_acquire); spins++)
            if (spins > 1000) sched_yield();
        step_size = shared->step_size;
    } else step_size = job->step_sizes[layer];
    const int64_t from = tile * TILE, rest = job->sizes[layer] - from;
    second(job, layer, from, rest < TILE ? rest : TILE, NULL, step_size);
}

static void second_of_own(const Work *work, int64_t layer, const int32_t *own, int64_t owned) {
    while (owned-- > 0) second_of_tile(work, layer, own[owned]);
}

static void *take_tasks(void *argument) {
    Work *work = argument;
    /* The second pass of small layers takes the updates from here; without memory it works them out again. */
    void *kept = work->most_kept ? malloc((size_t)work->most_kept) : NULL;
    const int64_t place = atomic_fetch_add_explicit(&work->places, 1, memory_order_relaxed);
    int32_t *own = work->own + place * work->most_tiles;
    int64_t owned = 0, layer = 0;
    for (;;) {
        if (owned && atomic_load_explicit(&work->next, memory_order_relaxed) >= work->shared[layer].end) {
            second_of_own(work, layer, own, owned);
            owned = 0;
        }
        const int64_t index = atomic_fetch_add_explicit(&work->next, 1, memory_order_relaxed);
        if (index >= work->count) break;
        const Task *task = &work->tasks[index];
        if (owned && (task->tile < 0 || task->layer != layer)) {
            second_of_own(work, layer, own, owned);
            owned = 0;
        }
        if (task->tile < 0)
            for (int64_t small = task->layer; small < task->until; small++) whole_layer(work->job, small, kept);
        else if (task->pass == SECOND) second_of_tile(work, task->layer, task->tile);
        else {
            layer = task->layer;
            first_of_tile(work, layer, task->tile);
            if (work->job->passes & SECOND) own[owned++] = (int32_t)task->tile;
        }
    }
    second_of_own(work, layer, own, owned);
    free(kept);
    return NULL;
}

/* Lists the tasks in the order in which they are claimed; with tasks == NULL only counts them. */
static int64_t list_tasks(const Job *job, Task *tasks) {
    int64_t count = 0;
    for (int64_t position = 0; position < job->layers;) {
        /* The second pass alone starts with the last layer, which the cache may still hold. */
        const int backwards = job->passes == SECOND;
        int64_t layer = backwards ? job->layers - 1 - position : position;
        if (job->sizes[layer] > SMALL) {
            const int64_t tiles = tiles_of(job->sizes[layer]);
            if (job->passes & FIRST)
                for (int64_t tile = 0; tile < tiles; tile++, count++)
                    if (tasks) tasks[count] = (Task){layer, 0, tile, FIRST};
            if (job->passes == SECOND)
                for (int64_t tile = tiles - 1; tile >= 0; tile--, count++)
                    if (tasks) tasks[count] = (Task){layer, 0, tile, SECOND};
            position++;
            continue;
        }
        int64_t members = 0, elements = 0;
        for (; position < job->layers; position++, members++) {
            const int64_t size = job->sizes[backwards ? job->layers - 1 - position : position];
            if (size > SMALL || (members && elements + size > TILE)) break;
            elements += size;
        }
        if (backwards) layer -= members - 1;
        if (tasks) tasks[count] = (Task){layer, layer + members, -1, 0};
        count++;
    }
    return count;
}

static int prepare(Work *work, const Job *job, int64_t threads, double **parts) {
    int64_t tiles = 0, used = 0;
    for (int64_t layer = 0; layer < job->layers; layer++) {
        const int64_t size = job->sizes[layer], bytes = size * (job->weight_type == FLOAT64 ? 8 : 4);
        tiles += tiles_of(size);
        if (size > SMALL && tiles_of(size) > work->most_tiles && job->passes == (FIRST | SECOND))
            work->most_tiles = tiles_of(size);
        if (size <= SMALL && bytes > work->most_kept && job->passes == (FIRST | SECOND)) work->most_kept = bytes;
    }
    work->job = job;
    work->count = list_tasks(job, NULL);
    work->tasks = malloc((size_t)(work->count + 1) * sizeof(Task));
    work->shared = malloc((size_t)(job->layers + 1) * sizeof(Shared));
    work->own = malloc((size_t)(work->most_tiles * threads + 1) * sizeof(int32_t));
    *parts = malloc((size_t)(2 * tiles + 1) * sizeof(double));
    if (!work->tasks || !work->shared || !work->own || !*parts) return -1;
    list_tasks(job, work->tasks);
    for (int64_t layer = 0; layer < job->layers; layer++) {
        Shared *shared = &work->shared[layer];
        shared->parts = *parts + 2 * used;
        atomic_init(&shared->unfinished, tiles_of(job->sizes[layer]));
        atomic_init(&shared->ready, 0);
        used += tiles_of(job->sizes[layer]);
    }
    for (int64_t index = 0; index < work->count; index++)
        if (work->tasks[index].tile >= 0) work->shared[work->tasks[index].layer].end = index + 1;
    atomic_init(&work->next, 0);
    atomic_init(&work->places, 0);
    return 0;
}

static void join_team(void *work) { take_tasks(work); }

/* libgomp's, which torch brings and uses, or NULL. After a parallel operation of torch its threads spin for some
 * milliseconds, waiting for the next one, and threads of our own would share the cores with them: twice the time. */
typedef void (*Team)(void (*function)(void *), void *data, unsigned threads, unsigned flags);
static Team team_of_torch;
__attribute__((constructor)) static void find_team_of_torch(void) {
    *(void **)&team_of_torch = dlsym(RTLD_DEFAULT, "GOMP_parallel");
}

static void run_threads(Work *work, int64_t wanted) {
    pthread_t threads[MOST_THREADS];
    int64_t started = 0;
    /* Whoever does not start is not missed: tasks go to the threads that are there, this one included. */
    while (started + 1 < wanted && !pthread_create(&threads[started], NULL, take_tasks, work)) started++;
    take_tasks(work);
    for (int64_t index = 0; index < started; index++) pthread_join(threads[index], NULL);
}

/* Does what `job` says with at most job->threads threads. Returns 0, or -1 if there was no memory (nothing is done). */
EXPORT int32_t lamb_run(const Job *job) {
    Work work = {0};
    double *parts = NULL;
    const int64_t most = job->threads < 1 ? 1 : job->threads > MOST_THREADS ? MOST_THREADS : job->threads;
    const int32_t failed = prepare(&work, job, most, &parts);
    if (!failed) {
        const int64_t wanted = most < work.count ? most : work.count;
        if (team_of_torch && wanted > 1) team_of_torch(join_team, &work, (unsigned)wanted, 0);
        else run_threads(&work, wanted);
    }
    free(work.tasks);
    free(work.shared);
    free(work.own);
    free(parts);
    return failed;
}

/* Adds one to each float32 step count and reports it. Returns 1 if all counts are now equal. */
EXPORT int32_t lamb_advance(int64_t n, float *const *steps, double *values) {
    int32_t alike = 1;
    for (int64_t i = 0; i < n; i++) {
        *steps[i] += 1;
        values[i] = *steps[i];
        alike &= values[i] == values[0];
    }
    return alike;
}
