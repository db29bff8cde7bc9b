/* Vectors of sixteen, the same on every instruction set.
 *
 * An op is written once against these and compiled once per set (-DISA=avx512 | avxvnni | avx2 | portable). Where two
 * sets have the same arithmetic (a fused multiply-add), their results are equal bit for bit.
 */
#ifndef CLUSTER_SIMD_H
#define CLUSTER_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define OP_JOIN(name, isa) name##_##isa
#define OP_OF(name, isa) OP_JOIN(name, isa)
/* The exported name of an op, for example rms_norm_avx512. */
#define OP(name) OP_OF(name, ISA)

#define INLINE static inline __attribute__((always_inline, unused))
#define LANES 16

INLINE int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

typedef float f32x16 __attribute__((vector_size(64), aligned(64)));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(64)));

/* --- loads and stores; no alignment is asked for --- */

/* Minus zero is nothing; plus zero would be an addition, since it turns -0 into 0. */
INLINE f32x16 f32_set1(float value) { return value - (f32x16){}; }

INLINE f32x16 f32_load(const float *from) {
    f32x16 out;
    memcpy(&out, from, sizeof out);
    return out;
}

INLINE void f32_store(float *to, f32x16 value) { memcpy(to, &value, sizeof value); }

/* The first `count` lanes, zeros behind them. */
INLINE f32x16 f32_load_n(const float *from, int count) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
    f32x16 out = {};
    memcpy(&out, from, (size_t)count * sizeof(float));
    return out;
#endif
}

INLINE void f32_store_n(float *to, f32x16 value, int count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)value);
#else
    memcpy(to, &value, (size_t)count * sizeof(float));
#endif
}

/* --- arithmetic --- */

/* a * b + c, rounded once where the machine has that, twice on the portable set. */
INLINE f32x16 f32_fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    union {
        f32x16 whole;
        __m256 half[2];
    } x = {a}, y = {b}, z = {c};
    z.half[0] = _mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]);
    z.half[1] = _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]);
    return z.whole;
#else
    return a * b + c;
#endif
}

INLINE f32x16 f32_select(i32x16 mask, f32x16 yes, f32x16 no) {
    return (f32x16)(((i32x16)yes & mask) | ((i32x16)no & ~mask));
}

/* b where either is NaN. */
INLINE f32x16 f32_max(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return f32_select(a > b, a, b);
#endif
}

INLINE f32x16 f32_min(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return f32_select(a < b, a, b);
#endif
}

INLINE f32x16 f32_abs(f32x16 a) { return (f32x16)((i32x16)a & ((i32x16){} + 0x7fffffff)); }

/* Sum of `count` numbers, a power of two, always in the same order: halves onto each other. */
INLINE float sum_halves(float *numbers, int count) {
    for (int half = count / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) numbers[i] += numbers[i + half];
    return numbers[0];
}

INLINE float f32_sum(f32x16 a) {
    float lane[LANES];
    f32_store(lane, a);
    return sum_halves(lane, LANES);
}

INLINE float f32_max_all(f32x16 a) {
    float lane[LANES];
    f32_store(lane, a);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return lane[0];
}

/* To the nearest integer, ties to even. |a| < 2^22. */
INLINE f32x16 f32_round(f32x16 a) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it leaves no fraction bits */
    return (a + shift) - shift;
}

INLINE i32x16 i32_from_f32(f32x16 whole) { return __builtin_convertvector(whole, i32x16); }
INLINE f32x16 f32_from_i32(i32x16 a) { return __builtin_convertvector(a, f32x16); }

/* --- 16-bit formats --- */

INLINE uint16_t bf16_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float f32_of_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* Exact, subnormal numbers included. */
INLINE float f32_of_f16(uint16_t value) {
    uint32_t sign = (uint32_t)(value & 0x8000) << 16, rest = value & 0x7fff, bits;
    float out;
    if (rest >= 0x7c00) { /* infinity, NaN */
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
        memcpy(&out, &bits, sizeof out);
        return out;
    }
    bits = rest << 13; /* the exponent is 112 too small: a product makes up for it, whatever the number */
    memcpy(&out, &bits, sizeof out);
    out *= 5.192296858534828e33f; /* 2^112 */
    memcpy(&bits, &out, sizeof bits);
    bits |= sign;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* To nearest, ties to even; what exceeds float16 becomes its largest number, NaN becomes 0: a cache holds finite numbers
 * only. */
INLINE uint16_t f16_of_finite(float value) {
    float magnitude = value < 0 ? -value : value;
    if (!(magnitude == magnitude)) return 0;
    if (magnitude > 65504.0f) magnitude = 65504.0f;
    uint32_t bits, sign = value < 0 ? 0x8000 : 0;
    if (magnitude < 6.103515625e-5f) { /* subnormal: adding 0.5 rounds to multiples of 2^-24 */
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    memcpy(&bits, &magnitude, sizeof bits);
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t)(sign | ((bits >> 13) - (112 << 10)));
}

/* --- products of bytes --- */

typedef struct {
    i32x16 even, odd; /* on AVX2 the bytes 0, 2 and 1, 3 of each lane as 16-bit numbers; elsewhere `even` holds all */
} bytes;

/* Sixteen lanes of four unsigned bytes. */
INLINE bytes bytes_unsigned(i32x16 raw) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    return (bytes){raw, raw};
#else
    return (bytes){raw & 0x00ff00ff, (i32x16)((u32x16)raw >> 8) & 0x00ff00ff};
#endif
}

/* Four signed bytes, the same in every lane. */
INLINE bytes bytes_signed_set1(const int8_t *from) {
    int32_t raw;
    memcpy(&raw, from, sizeof raw);
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    i32x16 all = (i32x16){} + raw;
    return (bytes){all, all};
#else
    uint32_t even = ((uint32_t)from[0] & 0xffff) | (uint32_t)from[2] << 16;
    uint32_t odd = ((uint32_t)from[1] & 0xffff) | (uint32_t)from[3] << 16;
    (void)raw;
    return (bytes){(i32x16){} + (int32_t)even, (i32x16){} + (int32_t)odd};
#endif
}

/* Per lane: sum + the dot product of an unsigned and a signed quadruple of bytes. Exact: nothing saturates. */
INLINE i32x16 i32_dot(i32x16 sum, bytes a, bytes b) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a.even, (__m512i)b.even);
#elif defined(__AVX2__)
    union {
        i32x16 whole;
        __m256i half[2];
    } out = {sum}, x = {a.even}, y = {b.even};
#if defined(__AVXVNNI__)
    for (int i = 0; i < 2; i++) out.half[i] = _mm256_dpbusd_avx_epi32(out.half[i], x.half[i], y.half[i]);
#else
    union {
        i32x16 whole;
        __m256i half[2];
    } u = {a.odd}, v = {b.odd};
    for (int i = 0; i < 2; i++) {
        __m256i pair = _mm256_madd_epi16(x.half[i], y.half[i]);
        out.half[i] = _mm256_add_epi32(out.half[i], _mm256_add_epi32(pair, _mm256_madd_epi16(u.half[i], v.half[i])));
    }
#endif
    return out.whole;
#else
    i32x16 low_a = a.even & 0xffff, high_a = a.even >> 16, low_b = b.even << 16 >> 16, high_b = b.even >> 16;
    sum += low_a * low_b + high_a * high_b;
    low_a = a.odd & 0xffff, high_a = a.odd >> 16, low_b = b.odd << 16 >> 16, high_b = b.odd >> 16;
    return sum + low_a * low_b + high_a * high_b;
#endif
}

#endif
