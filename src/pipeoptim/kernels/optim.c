/* Steps of optimizers and predictions of weights, each in one pass over memory.
 *
 * The entry points for them take an array of jobs (one per parameter) and a number of threads. Jobs are cut into chunks that
 * threads take in turn, so a thread that is held up does not hold up the others. All arithmetic is elementwise and the same
 * in the middle of a tensor and at its ends: results do not depend on threads, chunks or alignment. Compile without
 * contraction to fused multiply-adds, or the same formula in two functions may round differently.
 */
#include "vector.h"
#include <stdlib.h>

#define CHUNK 65536      /* floats per piece of work, at least */
#define LARGE_CHUNK 262144 /* for much work: a stream of memory that goes on is fetched ahead, one that begins is not */
#define INLINE static inline __attribute__((always_inline))

/* A portable library holds these functions once per kind of processor, under names that end with it. */
#ifndef VARIANT
#define VARIANT native
#endif
#define JOINED(name, variant) pipeoptim_##name##_##variant
#define JOIN(name, variant) JOINED(name, variant)
#define ENTRY(name) JOIN(name, VARIANT)

/* How a prediction is written: into a buffer, which the caches keep or not, or over the gradient it was made from. What has just
 * been read goes back to memory beside the next reads, so this is the fastest, though it is as many passes. */
enum into { CACHED = 0, STREAMED = 1, OVER_GRADIENT = 2 };

enum form { NO_PREDICTION = 0, BY_RULE = 1, BY_DISPLACEMENT = 2, BY_TERMS = 3, DRY = 4 };

struct factor { float scale, inverse; };

/* A step has two halves: where a parameter lies, which stays from step to step, and how to step, which many parameters share. */
struct adam_place {
    int64_t n;
    float *w, *m, *v, *out; /* m: NULL where the gradient itself is divided by the root (Adagrad, RMSprop) */
};

struct adam_how {
    const struct factor *factors; /* BY_TERMS: what each term multiplies, and its 1/divisor of the root */
    int32_t form, into, count, unused;
    float sign, coupled, b1, b1c, b2, b2c, decay, rate, inverse, eps; /* the step */
    float lose, scale, ahead;                                         /* the prediction */
    float of_value, of_mean, of_weight;                               /* DRY: the gradient, from what is given as one, m and w */
};

struct sgd_place {
    int64_t n;
    float *w, *b, *out; /* b: NULL without momentum */
};

struct sgd_how {
    int32_t form, into;
    float sign, coupled, mu, damp, along_g, along_b, lr; /* the step */
    float lose, from_g, from_b, ahead;                   /* the prediction */
    float of_value, of_mean, of_weight;                  /* DRY: as in adam_how, from b and w */
};

struct term {
    const float *value, *root; /* root: NULL for a linear term */
    float scale, inverse, eps, padding;
};

struct move {
    int64_t n;
    const float *w;
    float *out;
    const struct term *terms;
    int32_t count, into;
    float lose, padding;
};

/* -- arithmetic of one vector -------------------------------------------------------------------------------------------- */

INLINE vec quotient(vec value, vec square, float inverse, float eps) { return value / (root(square) * inverse + eps); }

/* Without decay everything stays as it is bit for bit, and a weight that is infinite brings no NaN. */
INLINE vec less(vec w, float part) { return part == 0 ? w : w - w * part; }
INLINE vec more(vec g, vec w, float part) { return part == 0 ? g : g + w * part; }

/* The gradient of an update to come, as far as it is known: with of_value 1 and nothing else it is `value`, bit for bit. */
INLINE vec estimated(vec value, vec mean, vec w, float of_value, float of_mean, float of_weight) {
    vec g = value * of_value;
    if (of_mean != 0) g = g + mean * of_mean;
    return more(g, w, of_weight);
}

INLINE void adam_moments(const struct adam_how *a, int momentum, vec g, vec w, vec *m, vec *v) {
    g = more(g * a->sign, w, a->coupled);
    *m = momentum ? *m * a->b1 + g * a->b1c : g;
    *v = *v * a->b2 + g * g * a->b2c;
}

INLINE vec adam_step(const struct adam_how *a, int form, int momentum, vec g, vec *m, vec *v, vec *w) {
    vec old = *w;
    adam_moments(a, momentum, g, old, m, v);
    vec q = quotient(*m, *v, a->inverse, a->eps);
    vec now = *w = less(old, a->decay) - q * a->rate;
    if (form == BY_DISPLACEMENT) return now + (now - old) * a->ahead;
    vec out = less(now, a->lose);
    if (form == BY_RULE) return out - q * a->scale;
    for (int32_t k = 0; k < a->count; k++) out = out - quotient(*m, *v, a->factors[k].inverse, a->eps) * a->factors[k].scale;
    return out;
}

/* Where a step would lead that is not carried out; the operations are those of the step, so with its numbers it is the step's weight. */
INLINE vec adam_dry(const struct adam_how *a, int momentum, vec value, vec m, vec v, vec w) {
    vec g = estimated(value, m, w, a->of_value, a->of_mean, a->of_weight), out = less(w, a->lose);
    adam_moments(a, momentum, g, w, &m, &v);
    return out - quotient(m, v, a->inverse, a->eps) * a->scale;
}

INLINE vec sgd_step(const struct sgd_how *a, int form, int momentum, vec g, vec *b, vec *w) {
    vec old = *w, d = more(g * a->sign, old, a->coupled), along = d;
    if (momentum) {
        *b = *b * a->mu + d * a->damp;
        along = d * a->along_g + *b * a->along_b;
    }
    vec now = *w = old - along * a->lr;
    if (form == BY_DISPLACEMENT) return now + (now - old) * a->ahead;
    vec out = less(now, a->lose) - g * a->from_g;
    return momentum ? out - *b * a->from_b : out;
}

INLINE vec sgd_dry(const struct sgd_how *a, int momentum, vec value, vec b, vec w) {
    vec g = estimated(value, b, w, a->of_value, a->of_mean, a->of_weight), out = less(w, a->lose);
    if (a->from_g != 0) out = out - g * a->from_g;
    if (!momentum) return out;
    return out - (b * a->mu + more(g * a->sign, w, a->coupled) * a->damp) * a->from_b;
}

INLINE vec moved(const struct move *a, int64_t i, int64_t part) {
    vec w = part ? load_part(a->w + i, part, 0) : load(a->w + i), out = less(w, a->lose);
    for (int32_t k = 0; k < a->count; k++) {
        const struct term *t = a->terms + k;
        vec value = part ? load_part(t->value + i, part, 0) : load(t->value + i);
        if (t->root) value = quotient(value, part ? load_part(t->root + i, part, 1) : load(t->root + i), t->inverse, t->eps);
        out = out - value * t->scale;
    }
    return out;
}

/* -- one range of one job -------------------------------------------------------------------------------------------------- */

INLINE void put(float *p, vec x, int64_t part, int streamed) {
    if (part) store_part(p, x, part);
    else if (streamed) stream(p, x);
    else store(p, x);
}

INLINE void adam_at(const struct adam_place *p, const float *grad, const struct adam_how *a, int64_t i, int64_t part, int form,
                    int momentum, int streamed) {
    vec g = part ? load_part(grad + i, part, 0) : load(grad + i), w = part ? load_part(p->w + i, part, 0) : load(p->w + i);
    vec m = !momentum ? all(0) : part ? load_part(p->m + i, part, 0) : load(p->m + i);
    vec v = part ? load_part(p->v + i, part, 1) : load(p->v + i);
    vec out = adam_step(a, form, momentum, g, &m, &v, &w);
    if (momentum) put(p->m + i, m, part, 0);
    put(p->v + i, v, part, 0);
    put(p->w + i, w, part, 0);
    if (form) put(p->out + i, out, part, streamed);
}

INLINE void sgd_at(const struct sgd_place *p, const float *grad, const struct sgd_how *a, int64_t i, int64_t part, int form,
                   int momentum, int streamed) {
    vec g = part ? load_part(grad + i, part, 0) : load(grad + i), w = part ? load_part(p->w + i, part, 0) : load(p->w + i);
    vec b = !momentum ? all(0) : part ? load_part(p->b + i, part, 0) : load(p->b + i);
    vec out = sgd_step(a, form, momentum, g, &b, &w);
    if (momentum) put(p->b + i, b, part, 0);
    put(p->w + i, w, part, 0);
    if (form) put(p->out + i, out, part, streamed);
}

INLINE void adam_dry_at(const struct adam_place *p, const float *value, const struct adam_how *a, int64_t i, int64_t part,
                        int momentum, int streamed) {
    vec g = part ? load_part(value + i, part, 0) : load(value + i), w = part ? load_part(p->w + i, part, 0) : load(p->w + i);
    vec m = !momentum ? all(0) : part ? load_part(p->m + i, part, 0) : load(p->m + i);
    vec v = part ? load_part(p->v + i, part, 1) : load(p->v + i);
    put(p->out + i, adam_dry(a, momentum, g, m, v, w), part, streamed);
}

INLINE void sgd_dry_at(const struct sgd_place *p, const float *value, const struct sgd_how *a, int64_t i, int64_t part,
                       int momentum, int streamed) {
    vec g = part ? load_part(value + i, part, 0) : load(value + i), w = part ? load_part(p->w + i, part, 0) : load(p->w + i);
    vec b = !momentum ? all(0) : part ? load_part(p->b + i, part, 0) : load(p->b + i);
    put(p->out + i, sgd_dry(a, momentum, g, b, w), part, streamed);
}

/* Walk from `i` to `end`: a part up to the first aligned address of `out`, whole vectors, and the last part. Fetching ahead is
 * left to the hardware: asking for lines by hand was slower, at every distance that was tried. */
#define WALK(AT, out, streamed)                                                                                               \
    do {                                                                                                                      \
        int64_t head = (streamed) ? before_aligned((out) + i, end - i) : 0;                                                   \
        if (head) { int64_t part = head; AT; i += head; }                                                                     \
        for (; i + LANES <= end; i += LANES) { const int64_t part = 0; AT; }                                                  \
        if (i < end) { int64_t part = end - i; AT; }                                                                          \
    } while (0)

#define ADAM(form, momentum, streamed) WALK(adam_at(p, g, a, i, part, form, momentum, streamed), p->out, streamed)
#define ADAM_EITHER(form, streamed)                                                                                           \
    do { if (p->m) ADAM(form, 1, streamed); else ADAM(form, 0, streamed); } while (0)

#define ADAM_DRY(streamed)                                                                                                    \
    do {                                                                                                                      \
        if (p->m) WALK(adam_dry_at(p, g, a, i, part, 1, streamed), p->out, streamed);                                         \
        else WALK(adam_dry_at(p, g, a, i, part, 0, streamed), p->out, streamed);                                              \
    } while (0)

/* Copies: the compiler sees that nothing written through pointers changes them. */
static void adam_range(const struct adam_place *place, const float *g, const struct adam_how *how, int64_t i, int64_t end) {
    struct adam_place at = *place, *p = &at;
    const struct adam_how copy = *how, *a = &copy;
    int streamed = CAN_STREAM && a->into == STREAMED;
    if (a->into == OVER_GRADIENT) at.out = (float *)g;
    switch (a->form) {
    case NO_PREDICTION: ADAM_EITHER(NO_PREDICTION, 0); break;
    case BY_RULE: if (streamed) ADAM_EITHER(BY_RULE, 1); else ADAM_EITHER(BY_RULE, 0); break;
    case BY_DISPLACEMENT: if (streamed) ADAM_EITHER(BY_DISPLACEMENT, 1); else ADAM_EITHER(BY_DISPLACEMENT, 0); break;
    case DRY: if (streamed) ADAM_DRY(1); else ADAM_DRY(0); break;
    default: ADAM_EITHER(BY_TERMS, 0);
    }
}

#define SGD(form, momentum, streamed) WALK(sgd_at(p, g, a, i, part, form, momentum, streamed), p->out, streamed)
#define SGD_EITHER(form, streamed)                                                                                            \
    do { if (p->b) SGD(form, 1, streamed); else SGD(form, 0, streamed); } while (0)

#define SGD_DRY(streamed)                                                                                                     \
    do {                                                                                                                      \
        if (p->b) WALK(sgd_dry_at(p, g, a, i, part, 1, streamed), p->out, streamed);                                          \
        else WALK(sgd_dry_at(p, g, a, i, part, 0, streamed), p->out, streamed);                                               \
    } while (0)

static void sgd_range(const struct sgd_place *place, const float *g, const struct sgd_how *how, int64_t i, int64_t end) {
    struct sgd_place at = *place, *p = &at;
    const struct sgd_how copy = *how, *a = &copy;
    int streamed = CAN_STREAM && a->into == STREAMED;
    if (a->into == OVER_GRADIENT) at.out = (float *)g;
    switch (a->form) {
    case NO_PREDICTION: SGD_EITHER(NO_PREDICTION, 0); break;
    case BY_RULE: if (streamed) SGD_EITHER(BY_RULE, 1); else SGD_EITHER(BY_RULE, 0); break;
    case DRY: if (streamed) SGD_DRY(1); else SGD_DRY(0); break;
    default: if (streamed) SGD_EITHER(BY_DISPLACEMENT, 1); else SGD_EITHER(BY_DISPLACEMENT, 0);
    }
}

#define MOVE(streamed) WALK(put(a->out + i, moved(a, i, part), part, streamed), a->out, streamed)

static void move_range(const struct move *job, int64_t i, int64_t end) {
    struct term one;
    struct move known = *job, *a = &known;
    int streamed = CAN_STREAM && job->into == STREAMED;
    if (job->count == 1) { /* the usual case: let the compiler see what it is */
        one = job->terms[0];
        a->terms = &one;
        a->count = 1;
        if (one.root) { if (streamed) MOVE(1); else MOVE(0); }
        else { one.root = NULL; if (streamed) MOVE(1); else MOVE(0); }
        return;
    }
    if (streamed) MOVE(1); else MOVE(0);
}

/* -- all jobs ------------------------------------------------------------------------------------------------------------- */

/* RANGE sees the number of the job as `j` and its part as `i` and `end`. */
#define ALL(count, jobs, threads, RANGE)                                                                                      \
    do {                                                                                                                      \
        int64_t *first = malloc((size_t)((count) + 1) * sizeof *first), total = 0;                                            \
        if (!first) return 1;                                                                                                 \
        first[0] = 0;                                                                                                         \
        for (int64_t j = 0; j < (count); j++) total += (jobs)[j].n;                                                           \
        int64_t chunk = total > 16 * LARGE_CHUNK * (int64_t)threads ? LARGE_CHUNK : CHUNK;                                    \
        for (int64_t j = 0; j < (count); j++) first[j + 1] = first[j] + ((jobs)[j].n + chunk - 1) / chunk;                    \
        if (total < CHUNK) threads = 1; /* waking threads would take longer */                                                \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)")                                                         \
        {                                                                                                                     \
            int64_t j = 0; /* chunks come in rising order, so this only moves forward */                                     \
            _Pragma("omp for schedule(dynamic, 1)")                                                                           \
            for (int64_t c = 0; c < first[count]; c++) {                                                                      \
                while (first[j + 1] <= c) j++;                                                                                \
                int64_t i = (c - first[j]) * chunk, end = i + chunk < (jobs)[j].n ? i + chunk : (jobs)[j].n;                  \
                RANGE;                                                                                                        \
            }                                                                                                                 \
            fence();                                                                                                          \
        }                                                                                                                     \
        free(first);                                                                                                          \
        return 0;                                                                                                             \
    } while (0)

/* which: of each job the number of its `how`. */
#define STEPS(name)                                                                                                           \
    int ENTRY(name)(int64_t count, const struct name##_place *places, const float *const *grads, const int32_t *which,   \
                         const struct name##_how *hows, int32_t threads) {                                                    \
        ALL(count, places, threads, name##_range(places + j, grads[j], hows + which[j], i, end));                             \
    }

STEPS(adam)
STEPS(sgd)

int ENTRY(move)(int64_t count, const struct move *jobs, int32_t threads) {
    ALL(count, jobs, threads, move_range(jobs + j, i, end));
}

/* -- the size of a gradient to come ----------------------------------------------------------------------------------------- */

struct estimate {
    int64_t n;
    const float *value, *mean, *w; /* a part whose factor is 0 is not read */
    float of_value, of_mean, of_weight, padding;
};

#define SQUARES 8 /* sums side by side: the compiler's vectors hold them, and however wide those are the additions are the same */

/* `mean` and `weight`: whether these parts are there. A part times 0 would be no number where a gradient is infinite. */
INLINE double square_at(const struct estimate *a, int64_t i, int mean, int weight) {
    float g = a->value[i] * a->of_value;
    if (mean) g += a->mean[i] * a->of_mean;
    if (weight) g += a->w[i] * a->of_weight;
    return (double)g * g;
}

INLINE double squares_with(const struct estimate *a, int64_t i, int64_t end, int mean, int weight) {
    double sums[SQUARES] = {0}, sum = 0;
    for (; i + SQUARES <= end; i += SQUARES)
        for (int l = 0; l < SQUARES; l++) sums[l] += square_at(a, i + l, mean, weight);
    for (; i < end; i++) sum += square_at(a, i, mean, weight);
    for (int l = 0; l < SQUARES; l++) sum += sums[l];
    return sum;
}

static double squares_of(const struct estimate *a, int64_t i, int64_t end) {
    if (a->of_mean != 0) return a->of_weight != 0 ? squares_with(a, i, end, 1, 1) : squares_with(a, i, end, 1, 0);
    return a->of_weight != 0 ? squares_with(a, i, end, 0, 1) : squares_with(a, i, end, 0, 0);
}

/* The sum of the squares of all estimates. Pieces of one size, added up in their order: threads do not change the result. */
int ENTRY(squares)(int64_t count, const struct estimate *jobs, double *total, int32_t threads) {
    int64_t *first = malloc((size_t)(count + 1) * sizeof *first), elements = 0;
    if (!first) return 1;
    first[0] = 0;
    for (int64_t j = 0; j < count; j++) elements += jobs[j].n, first[j + 1] = first[j] + (jobs[j].n + CHUNK - 1) / CHUNK;
    double *sums = malloc((size_t)(first[count] + 1) * sizeof *sums);
    if (!sums) return free(first), 1;
    if (elements < CHUNK) threads = 1;
    _Pragma("omp parallel num_threads(threads) if (threads > 1)")
    {
        int64_t j = 0;
        _Pragma("omp for schedule(dynamic, 1)")
        for (int64_t c = 0; c < first[count]; c++) {
            while (first[j + 1] <= c) j++;
            int64_t i = (c - first[j]) * CHUNK, end = i + CHUNK < jobs[j].n ? i + CHUNK : jobs[j].n;
            sums[c] = squares_of(jobs + j, i, end);
        }
    }
    *total = 0;
    for (int64_t c = 0; c < first[count]; c++) *total += sums[c];
    free(sums);
    free(first);
    return 0;
}

/* Add to counts of steps, one number each, and say what they are now; a count that is NULL stays 0. */
void ENTRY(count)(int64_t count, float *const *steps, float by, float *now) {
    for (int64_t j = 0; j < count; j++) now[j] = steps[j] ? (*steps[j] += by) : 0;
}

/* Bring what lies at these addresses into the caches, all at once; an address where nothing lies any more does no harm. */
void ENTRY(fetch)(int64_t count, const char *const *addresses) {
    for (int64_t j = 0; j < count; j++) __builtin_prefetch(addresses[j]);
}

/* -- small samples of many tensors ------------------------------------------------------------------------------------------ */

struct run { int64_t start, length; }; /* neighbouring elements */

struct sample {
    const float *from;
    const struct run *runs;
    float *out;
    int64_t count;
};

/* All is asked for before any of it is used: it comes from far apart, and fetches can overlap. */
void ENTRY(take)(int64_t count, const struct sample *jobs) {
    for (int64_t j = 0; j < count; j++)
        for (int64_t r = 0; r < jobs[j].count; r++) __builtin_prefetch(jobs[j].from + jobs[j].runs[r].start);
    for (int64_t j = 0; j < count; j++) {
        float *out = jobs[j].out;
        for (int64_t r = 0; r < jobs[j].count; r++) {
            const struct run run = jobs[j].runs[r];
            memcpy(out, jobs[j].from + run.start, (size_t)run.length * sizeof(float));
            out += run.length;
        }
    }
}

/* For each part (up to its end) the squares and the product of `predicted - before` and `now - before`, in double. */
void ENTRY(products)(const float *before, const float *predicted, const float *now, int64_t parts, const int64_t *ends, double *sums) {
    int64_t i = 0;
    for (int64_t p = 0; p < parts; p++) {
        double expected = 0, together = 0, real = 0;
        for (; i < ends[p]; i++) {
            double a = (double)(predicted[i] - before[i]), b = (double)(now[i] - before[i]);
            expected += a * a, together += a * b, real += b * b;
        }
        sums[3 * p] = expected, sums[3 * p + 1] = together, sums[3 * p + 2] = real;
    }
}

/* The sizes of the structures, so that the caller can check that it packs the same. */
void ENTRY(sizes)(int64_t *sizes) {
    sizes[0] = sizeof(struct adam_place), sizes[1] = sizeof(struct adam_how), sizes[2] = sizeof(struct sgd_place);
    sizes[3] = sizeof(struct sgd_how), sizes[4] = sizeof(struct move), sizes[5] = sizeof(struct term);
    sizes[6] = sizeof(struct estimate);
}
