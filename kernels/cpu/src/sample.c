/* One token per row of logits: the arithmetic of cluster/worker/sampler.py, fused.
 *
 * A row is one task and reads nothing of its neighbours. What decides between tokens is the same to the last bit as in
 * the sampler, on every instruction set: single IEEE operations in one order (no fused multiply-add), sums of integers,
 * and a noise that is computed in double precision and rounded.
 *
 * Most of a vocabulary is never looked at twice: every pass leaves the maximum of each chunk behind, and a threshold
 * that no value of a chunk reaches skips it.
 */
#include "pool.h"
#include "simd.h"

#include <stdbool.h>

#define CHUNK 128              /* values per maximum; a multiple of LANES */
#define BUCKET_BITS 11         /* a radix of the threshold search; three of them cover 32 bits */
#define NUM_BUCKETS (1 << BUCKET_BITS)
#define MAX_SCORE 1e30f
#define WEIGHT_SCALE 1099511627776.0 /* 2^40 */
#define MAX_NOISE 43.7f              /* -log(2^-63), rounded up */
#define NOT_FINITE (-1)

/* What a row is to become; see SamplingParams. Mirrored by ROW in sample.py. */
typedef struct {
    const int64_t *token_ids; /* prompt, then completion */
    const int64_t *bias_ids;
    const float *biases;
    const int64_t *stop_ids;
    uint64_t seed;
    int64_t num_prompt_tokens;
    int64_t num_tokens; /* of both: the position being drawn */
    int64_t min_tokens;
    double top_p;
    double presence_penalty;
    double frequency_penalty;
    float repetition_penalty;
    float inverse_temperature; /* 0: greedy */
    float min_score;   /* log(min_p); minus infinity: off */
    int32_t top_k;     /* 0: off */
    int32_t candidate_index;
    int32_t num_biases;
    int32_t num_stops;
    int32_t num_logprobs; /* -1: none */
} sampling_row;

/* One thread's memory. */
typedef struct {
    float *logits;    /* adjusted: the vocabulary, padded to whole chunks */
    float *values;    /* as many */
    float *maxima;    /* one per chunk */
    int32_t *counts;  /* one per token; zeros between rows */
    int64_t *buckets; /* NUM_BUCKETS */
} workspace;

typedef struct {
    const float *logits_SV;
    const sampling_row *rows_S;
    int64_t vocab_size;
    int64_t max_logprobs;
    char *memory;
    int64_t *token_ids_S;
    float *logprobs_S;
    int64_t *top_ids_SK;
    float *top_logprobs_SK;
} job;

static int64_t padded(int64_t vocab_size) { return (vocab_size + CHUNK - 1) / CHUNK * CHUNK; }

/* Bytes of one thread's memory, as in sample.py: four arrays as long as the vocabulary (the maxima are short of it). */
static int64_t workspace_bytes(int64_t vocab_size) { return padded(vocab_size) * 16 + NUM_BUCKETS * 8; }

static workspace workspace_of(const job *j, int32_t thread) {
    int64_t width = padded(j->vocab_size);
    char *at = j->memory + thread * workspace_bytes(j->vocab_size);
    workspace w;
    w.buckets = (int64_t *)at;
    w.logits = (float *)(at + NUM_BUCKETS * 8);
    w.values = w.logits + width;
    w.counts = (int32_t *)(w.values + width);
    w.maxima = (float *)(w.counts + width);
    return w;
}

INLINE bool i32_any(i32x16 mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    int64_t words[LANES / 2], any = 0;
    memcpy(words, &mask, sizeof words);
    for (int i = 0; i < LANES / 2; i++) any |= words[i];
    return any != 0;
#endif
}

/* --- maxima --- */

/* The largest value, and each chunk's in `maxima`; NaN where any value is. */
static float scan(const float *values, int64_t size, float *maxima) {
    i32x16 is_nan = {};
    float peak = -INFINITY;
    int64_t start = 0;
    for (int64_t chunk = 0; start < size; chunk++, start += CHUNK) {
        f32x16 best = f32_set1(-INFINITY);
        int64_t end = start + CHUNK < size ? start + CHUNK : size, i = start;
        for (; i + LANES <= end; i += LANES) {
            f32x16 value = f32_load(values + i);
            best = f32_max(value, best);
            is_nan |= value != value;
        }
        for (; i < end; i++) {
            best[0] = values[i] > best[0] ? values[i] : best[0];
            is_nan[0] |= -(values[i] != values[i]);
        }
        maxima[chunk] = f32_max_all(best);
        peak = maxima[chunk] > peak ? maxima[chunk] : peak;
    }
    return i32_any(is_nan) ? NAN : peak;
}

/* The lowest index of the largest value. */
static int64_t first_peak(const float *values, const float *maxima, float peak) {
    int64_t i = 0;
    while (maxima[i] != peak) i++;
    for (i *= CHUNK; values[i] != peak; i++) {
    }
    return i;
}

/* --- weights: e^score in fixed point --- */

/* Integers: 2^40 e^score of scores of at most 0, cut off. The operations are those of `weights` in the sampler. */
INLINE f32x16 weights(f32x16 score) {
    f32x16 x = f32_max(score, f32_set1(-28.0f));
    f32x16 n = f32_round(x * 1.44269504f);
    f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32x16 p = r * 1.98412698e-4f + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = (p * (r * r) + r) + 1.0f;
    f32x16 weight = p * (f32x16)((i32_from_f32(n) + (127 + 40)) << 23);
    f32x16 whole = f32_from_i32(i32_from_f32(f32_min(weight, f32_set1(8388608.0f))));
    return f32_select(weight < 8388608.0f, whole, weight); /* from 2^23 on there is no fraction */
}

static int64_t weight_of(float score) { return (int64_t)weights(f32_set1(score))[0]; }

/* Logits, and what makes scores of them: (logit - peak) * inverse_temperature, at most 0. */
typedef struct {
    const float *logits;
    int64_t size;
    float peak;
    float inverse_temperature;
} scored;

INLINE float score_of(const scored *s, float logit) { return (logit - s->peak) * s->inverse_temperature; }

/* Sixteen scores, minus infinity behind the last. */
INLINE f32x16 scores_at(const scored *s, int64_t i) {
    if (i + LANES <= s->size) return (f32_load(s->logits + i) - s->peak) * s->inverse_temperature;
    f32x16 scores = f32_set1(-INFINITY);
    for (int lane = 0; i + lane < s->size; lane++) scores[lane] = score_of(s, s->logits[i + lane]);
    return scores;
}

/* The weights' sum. */
static int64_t mass(const scored *s) {
    typedef double f64x8 __attribute__((vector_size(64)));
    typedef float f32x8 __attribute__((vector_size(32)));
    int64_t total = 0;
    for (int64_t start = 0; start < s->size; start += 32 * CHUNK) { /* few enough that a double holds the sum exactly */
        int64_t end = start + 32 * CHUNK < s->size ? start + 32 * CHUNK : s->size;
        f64x8 low = {}, high = {};
        for (int64_t i = start; i < end; i += LANES) {
            union {
                f32x16 whole;
                f32x8 half[2];
            } weight = {weights(scores_at(s, i))};
            low += __builtin_convertvector(weight.half[0], f64x8);
            high += __builtin_convertvector(weight.half[1], f64x8);
        }
        for (int lane = 0; lane < 8; lane++) total += (int64_t)low[lane] + (int64_t)high[lane];
    }
    return total;
}

/* --- thresholds --- */

/* Unsigned integers in the order of the floats; both zeros are one. */
static uint32_t order_of(float value) {
    uint32_t bits;
    value += 0.0f;
    memcpy(&bits, &value, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static float value_of(uint32_t order) {
    uint32_t bits = order >> 31 ? order & 0x7fffffffu : ~order;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The least value before which there is less than `wanted`: of weight, or of values where they are counted. */
static float threshold(const float *values, int64_t size, double wanted, bool is_counted, int64_t *buckets) {
    uint32_t prefix = 0, known = 0; /* the bits of the answer that are found, and which they are */
    int64_t before = 0;
    for (int shift = 32 - BUCKET_BITS; known != 0xffffffffu; shift = shift > BUCKET_BITS ? shift - BUCKET_BITS : 0) {
        uint32_t digit = ~known >> shift;
        memset(buckets, 0, NUM_BUCKETS * sizeof *buckets);
        for (int64_t i = 0; i < size; i++) {
            uint32_t order = order_of(values[i]);
            if ((order & known) == prefix) buckets[order >> shift & digit] += is_counted ? 1 : weight_of(values[i]);
        }
        uint32_t bucket = digit, found = 0;
        for (int64_t sum = before;; bucket--) {
            if (buckets[bucket] > 0 && (double)sum < wanted) found = bucket, before = sum;
            sum += buckets[bucket];
            if (bucket == 0) break;
        }
        prefix |= found << shift;
        known |= digit << shift;
    }
    return value_of(prefix);
}

/* A bound that at least `count` scores reach: that of the count-th largest maximum. */
static float bound_of(const workspace *w, int64_t num_chunks, int64_t count) {
    return count > num_chunks ? -INFINITY : threshold(w->maxima, num_chunks, (double)count, true, w->buckets);
}

/* The scores that reach the bound, into w->values. w->maxima are of scores. */
static scored collect(const scored *s, const workspace *w, float bound) {
    int64_t count = 0;
    for (int64_t start = 0; start < s->size; start += CHUNK) {
        if (w->maxima[start / CHUNK] < bound) continue;
        int64_t end = start + CHUNK < s->size ? start + CHUNK : s->size;
        for (int64_t i = start; i < end; i++) {
            w->values[count] = score_of(s, s->logits[i]);
            count += w->values[count] >= bound;
        }
    }
    return (scored){w->values, count, 0.0f, 1.0f};
}

/* The least score that top_k, top_p over what top_k left, and min_p all let through. */
static float least_score(const sampling_row *row, const scored *s, const workspace *w) {
    const int64_t num_chunks = (s->size + CHUNK - 1) / CHUNK;
    float least = -INFINITY;
    scored kept;
    bool has_top_k = row->top_k > 0 && row->top_k < s->size;
    if (has_top_k) {
        kept = collect(s, w, bound_of(w, num_chunks, row->top_k));
        least = threshold(kept.logits, kept.size, row->top_k, true, w->buckets);
    }
    if (row->top_p < 1.0 && has_top_k) {
        kept = collect(s, w, least);
        least = threshold(kept.logits, kept.size, row->top_p * (double)mass(&kept), false, w->buckets);
    } else if (row->top_p < 1.0) {
        double wanted = row->top_p * (double)mass(s);
        int64_t width = 64; /* most nuclei are small */
        for (kept = collect(s, w, bound_of(w, num_chunks, width)); (double)mass(&kept) < wanted && width <= num_chunks;)
            kept = collect(s, w, bound_of(w, num_chunks, width *= 8));
        least = threshold(kept.logits, kept.size, wanted, false, w->buckets);
    }
    return row->min_score > least ? row->min_score : least;
}

/* --- draws --- */

#define GOLDEN_GAMMA 0x9E3779B97F4A7C15u
#define MIX_1 0xBF58476D1CE4E5B9u
#define MIX_2 0x94D049BB133111EBu

static uint64_t mix(uint64_t state) {
    state = (state ^ state >> 30) * MIX_1;
    state = (state ^ state >> 27) * MIX_2;
    return state ^ state >> 31;
}

/* random_key of random_key.py. */
static uint64_t random_key(const sampling_row *row) {
    uint64_t words[] = {row->seed, (uint64_t)row->candidate_index, (uint64_t)row->num_tokens}, key = 0;
    for (int i = 0; i < 3; i++) key = mix((key ^ words[i]) + GOLDEN_GAMMA);
    return key;
}

/* gumbel_noise of random_key.py. */
static float noise_of(uint64_t key, int64_t token_id) {
    uint64_t bits = mix(key + (uint64_t)(token_id + 1) * GOLDEN_GAMMA);
    double uniform = (double)(int64_t)(bits >> 1 | 1) * 0x1p-63;
    if (uniform > 1.0 - 0x1p-53) uniform = 1.0 - 0x1p-53;
    return (float)-log(-log1p(-uniform));
}

typedef uint64_t u64x8 __attribute__((vector_size(64)));

INLINE u64x8 mixed(u64x8 state) {
    state = (state ^ state >> 30) * MIX_1;
    state = (state ^ state >> 27) * MIX_2;
    return state ^ state >> 31;
}

/* Lanes whose noise may exceed `missing`: none that does is left out. The states are those of the even and of the odd
 * lanes. -log(-log1p(-u)) <= -log(u), and a float's bits are an estimate of its binary logarithm from below. */
INLINE i32x16 may_exceed(u64x8 even, u64x8 odd, f32x16 missing) {
    i32x16 upper_bits = (i32x16)(mixed(even) >> 33 | (mixed(odd) >> 33) << 32);
    f32x16 log2_uniform = f32_from_i32((i32x16)f32_from_i32(upper_bits)) * 0x1p-23f - (127.0f + 31.0f);
    return log2_uniform <= 0.01f - missing * 1.44269504f;
}

/* The token of the largest score plus noise among those that reach `least`; the lowest id of equal ones. */
static int64_t draw(const sampling_row *row, const scored *s, const workspace *w, float least, int64_t peak_id) {
    const u64x8 even_states = (u64x8){1, 3, 5, 7, 9, 11, 13, 15} * GOLDEN_GAMMA;
    const uint64_t key = random_key(row);
    int64_t best_id = peak_id;
    float best = noise_of(key, peak_id); /* its score is 0 */
    for (int64_t start = 0; start < s->size; start += CHUNK) {
        float chunk_peak = w->maxima[start / CHUNK];
        if (chunk_peak < least || chunk_peak + MAX_NOISE < best) continue;
        u64x8 state = even_states + (key + (uint64_t)start * GOLDEN_GAMMA);
        for (int64_t i = start; i < start + CHUNK && i < s->size; i += LANES, state += LANES * GOLDEN_GAMMA) {
            f32x16 score = scores_at(s, i);
            i32x16 chosen = may_exceed(state, state + GOLDEN_GAMMA, best - score) & (score >= least);
            if (!i32_any(chosen)) continue;
            for (int lane = 0; lane < LANES; lane++) {
                if (!chosen[lane]) continue;
                float total = score[lane] + noise_of(key, i + lane);
                if (total > best || (total == best && i + lane < best_id)) best = total, best_id = i + lane;
            }
        }
    }
    return best_id;
}

/* --- rows --- */

static bool needs_adjusting(const sampling_row *row) {
    return row->repetition_penalty != 1.0f || row->presence_penalty != 0.0 || row->frequency_penalty != 0.0 ||
           row->num_biases > 0 || row->num_tokens - row->num_prompt_tokens < row->min_tokens;
}

/* w->logits = the logits after penalties, bias and min_tokens. */
static void adjust(const sampling_row *row, const float *logits, const workspace *w, int64_t size) {
    float *scores = w->logits;
    memcpy(scores, logits, (size_t)size * sizeof *scores);
    if (row->repetition_penalty != 1.0f) {
        for (int64_t i = 0; i < row->num_tokens; i++) {
            int64_t token_id = row->token_ids[i];
            if (w->counts[token_id]++ > 0) continue;
            float score = scores[token_id];
            scores[token_id] = score > 0.0f ? score / row->repetition_penalty : score * row->repetition_penalty;
        }
        for (int64_t i = 0; i < row->num_tokens; i++) w->counts[row->token_ids[i]] = 0;
    }
    if (row->presence_penalty != 0.0 || row->frequency_penalty != 0.0) {
        for (int64_t i = row->num_prompt_tokens; i < row->num_tokens; i++) w->counts[row->token_ids[i]]++;
        for (int64_t i = row->num_prompt_tokens; i < row->num_tokens; i++) {
            int32_t *count = &w->counts[row->token_ids[i]];
            if (*count > 0)
                scores[row->token_ids[i]] -= (float)(row->presence_penalty + row->frequency_penalty * *count);
            *count = 0;
        }
    }
    for (int32_t i = 0; i < row->num_biases; i++) scores[row->bias_ids[i]] += row->biases[i];
    for (int64_t i = 0; i < padded(size); i += LANES)
        f32_store(scores + i, f32_max(f32_min(f32_load(scores + i), f32_set1(MAX_SCORE)), f32_set1(-MAX_SCORE)));
    if (row->num_tokens - row->num_prompt_tokens < row->min_tokens)
        for (int32_t i = 0; i < row->num_stops; i++) scores[row->stop_ids[i]] = -MAX_SCORE;
}

/* The `count` likeliest tokens and their logits, likeliest first, the lowest id of equal ones first. w->maxima are of
 * logits. */
static void likeliest(const scored *s, const workspace *w, int32_t count, int64_t *ids, float *logits) {
    float bound = bound_of(w, (s->size + CHUNK - 1) / CHUNK, count);
    int32_t found = 0;
    for (int64_t start = 0; start < s->size; start += CHUNK) {
        if (w->maxima[start / CHUNK] < bound) continue;
        for (int64_t i = start; i < start + CHUNK && i < s->size; i++) {
            float logit = s->logits[i];
            if (logit < bound || (found == count && logit <= logits[count - 1])) continue;
            int32_t at = found < count ? found++ : count - 1;
            for (; at > 0 && logits[at - 1] < logit; at--) logits[at] = logits[at - 1], ids[at] = ids[at - 1];
            logits[at] = logit, ids[at] = i;
        }
    }
}

static void sample_row(void *context, int64_t index, int32_t thread) {
    const job *j = context;
    const sampling_row *row = j->rows_S + index;
    const workspace w = workspace_of(j, thread);
    const scored raw = {j->logits_SV + index * j->vocab_size, j->vocab_size,
                        scan(j->logits_SV + index * j->vocab_size, j->vocab_size, w.maxima), 1.0f};
    int64_t *token_id = j->token_ids_S + index;
    if (!(fabsf(raw.peak) <= 3.402823466e38f)) { /* infinite, or no number */
        *token_id = NOT_FINITE;
        return;
    }
    float *top_logprobs = j->top_logprobs_SK + index * j->max_logprobs;
    if (row->num_logprobs > 0) /* while the maxima are the logits' */
        likeliest(&raw, &w, row->num_logprobs, j->top_ids_SK + index * j->max_logprobs, top_logprobs);
    scored s = raw;
    if (needs_adjusting(row)) {
        adjust(row, raw.logits, &w, raw.size);
        s.logits = w.logits;
        s.peak = scan(w.logits, s.size, w.maxima);
    }
    *token_id = first_peak(s.logits, w.maxima, s.peak);
    if (row->inverse_temperature > 0.0f) {
        s.inverse_temperature = row->inverse_temperature;
        for (int64_t i = 0; i * CHUNK < s.size; i++) w.maxima[i] = score_of(&s, w.maxima[i]);
        *token_id = draw(row, &s, &w, least_score(row, &s, &w), *token_id);
    }
    if (row->num_logprobs >= 0) {
        float log_total = (float)log((double)mass(&raw) / WEIGHT_SCALE);
        j->logprobs_S[index] = raw.logits[*token_id] - raw.peak - log_total;
        for (int32_t i = 0; i < row->num_logprobs && i < raw.size; i++)
            top_logprobs[i] = top_logprobs[i] - raw.peak - log_total;
    }
}

/* Arguments as in sample.py. */
void OP(sample)(const float *logits_SV, const sampling_row *rows_S, int64_t num_rows, int64_t vocab_size,
                int64_t max_logprobs, char *memory, int64_t *token_ids_S, float *logprobs_S, int64_t *top_ids_SK,
                float *top_logprobs_SK) {
    job j = {logits_SV, rows_S, vocab_size, max_logprobs, memory, token_ids_S, logprobs_S, top_ids_SK, top_logprobs_SK};
    pool_run(num_rows, sample_row, &j);
}
