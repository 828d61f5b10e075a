/* The address rule of serve/latents.py for a whole batch: one thread for each row's block of eight values.

   Compiled by NVRTC for the device, with --fmad=false, and by a C compiler for the tests: integers of fixed width, and
   single additions and multiplications of float32 that round to nearest, give the same bits everywhere. */

typedef unsigned long long u64;
typedef unsigned int u32;

#ifdef __CUDACC__
#define KERNEL extern "C" __global__
#define DEVICE __device__
#define HIGH(a, b) __umul64hi(a, b)
#define FLOAT_OF(bits) __uint_as_float(bits)
#define BITS_OF(value) __float_as_uint(value)
#else
#define KERNEL
#define DEVICE static
#define HIGH(a, b) ((u64)(((unsigned __int128)(a) * (b)) >> 64))
typedef union {
    float value;
    u32 bits;
} Float;
#define FLOAT_OF(given) (((Float){.bits = (given)}).value)
#define BITS_OF(given) (((Float){.value = (given)}).bits)
#endif

/* Philox4x64-10: words 0 to 3 of the block whose counter's two low words are given; the others are 0. */
DEVICE void philox(u64 low, u64 high, u64 key, u64 word[4]) {
    u64 k0 = key, k1 = 0, c0 = low, c1 = high, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        const u64 first = 0xD2E7470EE14C6C93ull, second = 0xCA5A826395121157ull;
        const u64 h0 = HIGH(first, c0), l0 = first * c0, h1 = HIGH(second, c2), l1 = second * c2;
        c0 = h1 ^ c1 ^ k0;
        c1 = l1;
        c2 = h0 ^ c3 ^ k1;
        c3 = l0;
        k0 += 0x9E3779B97F4A7C15ull;
        k1 += 0xBB67AE8584CAA73Bull;
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
}

/* A uniform word as a normal value, beyond whose truncation lies the probability ``tail``. */
DEVICE float normal(u32 word, float tail, const float *knots, const float *slopes) {
    float position = (float)(int)(word & 0x7FFFFFFFu) + 0.5f;
    if (tail != 0.0f) {
        position = position * (1.0f - 2.0f * tail);
        position = position + tail * 4294967296.0f;
    }
    const u32 bits = BITS_OF(position);
    int index = (int)(bits >> FRACTION_BITS) - FIRST_KNOT;
    index = index < 0 ? 0 : index >= KNOTS ? KNOTS - 1 : index;
    const float fraction = (float)(int)(bits & ((1u << FRACTION_BITS) - 1));
    const float scaled = slopes[index] * fraction;
    return FLOAT_OF(BITS_OF(scaled + knots[index]) | (word & 0x80000000u));
}

/* What is wanted of a row: ROW in device_latents.py. A label below 0 is drawn. */
typedef struct {
    u64 seed, index;
    long long label;
    float tail;
} Row;

/* Thread ``number``: block ``number % blocks`` of row ``number / blocks``. */
DEVICE void draw_block(u64 number, u64 size, u64 blocks, u64 labels, const Row *wanted, const float *knots, const float *slopes,
                       float *latents, long long *chosen) {
    const u64 row = number / blocks, block = number % blocks;
    const Row own = wanted[row];
    u64 word[4];
    const u64 base = own.index * blocks, low = base + block + 1;  /* numpy steps the counter before it draws */
    const u64 high = HIGH(own.index, blocks) + (low < base);
    philox(low, high, own.seed, word);
    for (int part = 0; part < 8; part++) {
        const u64 column = block * 8 + part;
        const u32 half = (u32)(word[part / 2] >> (part % 2 * 32));
        if (column < size)
            latents[row * size + column] = normal(half, own.tail, knots, slopes);
        else if (column == size && labels)
            chosen[row] = own.label < 0 ? (long long)((u64)half * labels >> 32) : own.label;
    }
}

KERNEL void draw(u64 rows, u64 size, u64 blocks, u64 labels, const Row *wanted, const float *knots, const float *slopes,
                 float *latents, long long *chosen) {
#ifdef __CUDACC__
    const u64 number = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (number < rows * blocks)
        draw_block(number, size, blocks, labels, wanted, knots, slopes, latents, chosen);
#else
    for (u64 number = 0; number < rows * blocks; number++)
        draw_block(number, size, blocks, labels, wanted, knots, slopes, latents, chosen);
#endif
}
