/* What the vectors of AVX-512 do of the default LAMB: square roots, random bits, bfloat16; for lamb_avx512_pass.h. */
#include <immintrin.h>

#define LANES512 _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)

/* Which elements of a vector exist. Whole vectors must be read and written without a mask, and are with this constant:
 * some processors take three times as long for a masked store, even of all elements. */
#define ALL512 ((__mmask16)0xffff)
#define FIRST512(count) ((__mmask16)((1u << (count)) - 1))

/* Asks for what the loop will need 2 KiB later. Processors foresee a stream up to the end of its page (4 KiB); with four
 * streams at once a loop would wait for memory at every new one. */
#define AHEAD512(p) _mm_prefetch((const char *)(p) + 2048, _MM_HINT_T0)

/* What the update of lamb_avx512_pass.h needs, 16 times each. */
typedef struct {
    __m512 keep1, take1, keep2, take2, moment1, eps, decay, low, high, grad_scale;
    int decays, bounded;
} Numbers512;

static Numbers512 numbers512(const Job *job, int64_t layer) {
    const double *at = job->coefficients + layer * COEFFICIENTS, root = sqrt(at[MOMENT2]);
    const float bound = (float)job->max_grad_value;
    return (Numbers512){
        _mm512_set1_ps((float)job->beta1), _mm512_set1_ps((float)(1 - job->beta1)),
        _mm512_set1_ps((float)job->beta2), _mm512_set1_ps((float)(1 - job->beta2)),
        _mm512_set1_ps((float)(at[MOMENT1] / root)), _mm512_set1_ps((float)(job->eps / root)),
        _mm512_set1_ps((float)job->weight_decay), _mm512_set1_ps(-bound), _mm512_set1_ps(bound),
        _mm512_set1_ps((float)job->grad_scale), job->weight_decay != 0, bound < INFINITY,
    };
}

/* Square roots. Those of zero, denormals, infinity and what has none come from the instruction. */
static ALWAYS_INLINE __m512 root512(__m512 x) {
    const __m512 half = _mm512_set1_ps(0.5f), inverse = _mm512_rsqrt14_ps(x), near = _mm512_mul_ps(x, inverse);
    const __m512 error = _mm512_fnmadd_ps(near, _mm512_mul_ps(half, inverse), half);
    const __m512 root = _mm512_fmadd_ps(near, error, near);
    const __m512i above_denormal = _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x00800000));
    const __mmask16 odd = _mm512_cmpge_epu32_mask(above_denormal, _mm512_set1_epi32(0x7f000000));
    return __builtin_expect(odd, 0) ? _mm512_mask_sqrt_ps(root, odd, x) : root;
}

/* random_bits of 16 positions */
static ALWAYS_INLINE __m512i random512(__m512i place, uint32_t seed) {
    __m512i x = _mm512_mullo_epi32(place, _mm512_set1_epi32((int)0x9e3779b1u));
    x = _mm512_add_epi32(x, _mm512_set1_epi32((int)seed));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32((int)0x85ebca6bu));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
}

#define MOMENT float
#define LOAD512(p, k) _mm512_maskz_loadu_ps(k, p)
#define STORE512(p, k, x, r) _mm512_mask_storeu_ps(p, k, x)
#define RANDOM 0
#define NAME float_
#include "lamb_avx512_pass.h"
#undef MOMENT
#undef LOAD512
#undef STORE512
#undef RANDOM
#undef NAME

/* cut_to_bfloat16 of 16 numbers, still as float32 */
static ALWAYS_INLINE __m512 cut512(__m512 x, __m512i noise) {
    const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    __m512i bits = _mm512_castps_si512(x);
    bits = _mm512_mask_add_epi32(bits, number, bits, noise);
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000u)));
}

#define MOMENT uint16_t
#define LOAD512(p, k) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, p)), 16))
#define STORE512(p, k, x, r)                                                                                          \
    (x = cut512(x, r),                                                                                                \
     _mm256_mask_storeu_epi16(p, k, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16))))
#define RANDOM 1
#define NAME narrow_
#include "lamb_avx512_pass.h"
#undef MOMENT
#undef LOAD512
#undef STORE512
#undef RANDOM
#undef NAME
