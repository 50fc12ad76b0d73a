/* Vectors of floats as wide as the machine has them, in the vector extension of GCC and Clang.
 *
 * Only what the language extension lacks is spelled out per processor: the square root, and the store that bypasses the
 * caches ("stream"). A streamed line is not read before it is written, which saves one pass over memory.
 */
#ifndef PIPEOPTIM_VECTOR_H
#define PIPEOPTIM_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const unaligned_vec *)p; }
static inline void store(float *p, vec x) { *(unaligned_vec *)p = x; }
static inline vec all(float x) { return x - (vec){0}; }

#if defined(__SSE2__)
#include <immintrin.h>
#define CAN_STREAM 1
static inline void fence(void) { _mm_sfence(); }
#if LANES == 16
static inline vec root(vec x) { return (vec)_mm512_sqrt_ps((__m512)x); }
static inline void stream(float *p, vec x) { _mm512_stream_ps(p, (__m512)x); }
#elif LANES == 8
static inline vec root(vec x) { return (vec)_mm256_sqrt_ps((__m256)x); }
static inline void stream(float *p, vec x) { _mm256_stream_ps(p, (__m256)x); }
#else
static inline vec root(vec x) { return (vec)_mm_sqrt_ps((__m128)x); }
static inline void stream(float *p, vec x) { _mm_stream_ps(p, (__m128)x); }
#endif
#else
#define CAN_STREAM 0
static inline void fence(void) {}
static inline void stream(float *p, vec x) { store(p, x); }
#if defined(__aarch64__)
#include <arm_neon.h>
static inline vec root(vec x) { return (vec)vsqrtq_f32((float32x4_t)x); }
#else
static inline vec root(vec x) {
    for (int l = 0; l < LANES; l++) x[l] = sqrtf(x[l]);
    return x;
}
#endif
#endif

/* Fewer than LANES floats, padded: the same arithmetic as everywhere else, without touching what lies behind. */
static inline vec load_part(const float *p, int64_t n, float padding) {
    vec x = all(padding);
    memcpy(&x, p, (size_t)n * sizeof(float));
    return x;
}
static inline void store_part(float *p, vec x, int64_t n) { memcpy(p, &x, (size_t)n * sizeof(float)); }

/* Floats before the next address to which a vector may be streamed; at most `n`. */
static inline int64_t before_aligned(const float *p, int64_t n) {
    int64_t head = (int64_t)((-(uintptr_t)p) % sizeof(vec)) / (int64_t)sizeof(float);
    return head < n ? head : n;
}

#endif
