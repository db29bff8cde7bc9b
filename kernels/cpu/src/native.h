/* Vectors as wide as one register, for what a loop carries: compilers keep wider ones in memory.
 *
 * Ops still count in sixteens (LANES), so that sums have one order on all instruction sets: PARTS native vectors.
 */
#ifndef CLUSTER_NATIVE_H
#define CLUSTER_NATIVE_H

#include "simd.h"

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define PARTS (LANES / WIDTH)

typedef float f32v __attribute__((vector_size(4 * WIDTH)));
typedef int32_t i32v __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t u32v __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t u16v __attribute__((vector_size(2 * WIDTH)));

/* Minus zero is nothing; plus zero would be an addition, since it turns -0 into 0. */
INLINE f32v v_set1(float value) { return value - (f32v){}; }

INLINE f32v v_load(const float *from) {
    f32v out;
    memcpy(&out, from, sizeof out);
    return out;
}

INLINE void v_store(float *to, f32v value) { memcpy(to, &value, sizeof value); }

/* The first `count` lanes, zeros behind them. */
INLINE f32v v_load_n(const float *from, int64_t count) {
    if (count >= WIDTH) return v_load(from);
    f32v out = {};
    memcpy(&out, from, (size_t)count * sizeof(float));
    return out;
}

INLINE void v_store_n(float *to, f32v value, int64_t count) {
    if (count >= WIDTH)
        v_store(to, value);
    else
        memcpy(to, &value, (size_t)count * sizeof(float));
}

INLINE i32v v_indices(void) {
    static const int32_t indices[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    i32v out;
    memcpy(&out, indices, sizeof out);
    return out;
}

/* a * b + c, rounded once where the machine has that, twice on the portable set. */
INLINE f32v v_fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE f32v v_select(i32v mask, f32v yes, f32v no) { return (f32v)(((i32v)yes & mask) | ((i32v)no & ~mask)); }

/* b where either is NaN. */
INLINE f32v v_max(f32v a, f32v b) {
#if defined(__AVX512F__)
    return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return v_select(a > b, a, b);
#endif
}

INLINE f32v v_min(f32v a, f32v b) {
#if defined(__AVX512F__)
    return (f32v)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return v_select(a < b, a, b);
#endif
}

INLINE f32v v_abs(f32v a) { return (f32v)((i32v)a & 0x7fffffff); }

INLINE float v_max_all(f32v a) {
    float lane[WIDTH];
    v_store(lane, a);
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}

/* e^a to 1.5 ulp; 0 from -87.3 down, the largest number's neighbourhood from 88.3 up; NaN stays NaN.
 * 2^n * e^r with a = n ln 2 + r, |r| <= ln 2 / 2, and e^r by its Taylor series to r^7. */
INLINE f32v v_exp(f32v a) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it leaves no fraction bits */
    f32v x = v_min(v_set1(88.3f), v_max(v_set1(-87.33f), a));
    f32v n = (x * 1.44269504f + shift) - shift;
    f32v r = v_fma(n, v_set1(-0.693359375f), x); /* ln 2 in two parts: the first times n is exact */
    r = v_fma(n, v_set1(2.12194440e-4f), r);
    f32v p = v_set1(1.98412698e-4f);
    p = v_fma(p, r, v_set1(1.38888889e-3f));
    p = v_fma(p, r, v_set1(8.33333333e-3f));
    p = v_fma(p, r, v_set1(4.16666667e-2f));
    p = v_fma(p, r, v_set1(1.66666667e-1f));
    p = v_fma(p, r, v_set1(0.5f));
    p = v_fma(p, r * r, r) + 1.0f;
    f32v power = (f32v)((__builtin_convertvector(n, i32v) + 127) << 23);
    f32v out = v_select(a < -87.33f, v_set1(0.0f), p * power);
    return v_select(a != a, a, out);
}

/* The fit of degree 11 below is for where the other form cancels. */
INLINE f32v v_tanh(f32v a) {
    f32v z = a * a, p = v_set1(-0.005691985599696636f), size = v_abs(a);
    p = v_fma(p, z, v_set1(0.020626291632652283f));
    p = v_fma(p, z, v_set1(-0.05373531952500343f));
    p = v_fma(p, z, v_set1(0.13331381976604462f));
    p = v_fma(p, z, v_set1(-0.3333328068256378f));
    f32v near = v_fma(a * z, p, a);
    f32v far = 1.0f - 2.0f / (v_exp(size + size) + 1.0f);
    return v_select(size < 0.625f, near, v_select(a < 0.0f, -far, far));
}

INLINE f32v v_from_bf16(const uint16_t *from) {
    u16v half;
    memcpy(&half, from, sizeof half);
#if defined(__AVX512F__)
    return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#elif defined(__AVX2__)
    return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)half), 16);
#else
    return (f32v)(__builtin_convertvector(half, u32v) << 16);
#endif
}

INLINE f32v v_from_f16(const uint16_t *from) {
#if defined(__AVX2__)
    u16v half;
    memcpy(&half, from, sizeof half);
#endif
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtph_ps((__m256i)half);
#elif defined(__AVX2__)
    return (f32v)_mm256_cvtph_ps((__m128i)half);
#else
    f32v out;
    for (int i = 0; i < WIDTH; i++) out[i] = f32_of_f16(from[i]);
    return out;
#endif
}

#endif
