// Products, neurons, pooling and attention on packed spikes: one bit each, 64 channels a word, lowest channel first.
//
// Levels 0..D are D such planes a pixel, one after the other, and add a weight row for every one that is set.
//
// A product with spikes is a sum of weight rows. The outputs are cut into tiles of LANES channels whose weights fit the
// first-level cache. A task lists the active inputs of its rows once, sorts rows of like length into groups of ROWS, and
// then, tile by tile, adds up a group at a time with every sum in registers. The neuron follows while the sums are in the
// cache, so that real values reach memory only where they are asked for.
//
// Sums run over planes, taps, then channels, in ascending order, one rounding an addition.

#include "packed_epilogue.h"

namespace {

constexpr int64_t BLOCK_ROWS = 256;      // rows whose sums of one tile stay in the cache between product and neuron
constexpr int64_t LIST_BYTES = 8 << 20;  // room for the lists of a task
constexpr int64_t TASK_ROWS = 4096;
constexpr int LIST_SLACK = 32;           // entries that a list may be overwritten by, behind its end

// Spikes [steps, images, height, width, planes, words of channels]; one step is `step` words from the next.
struct Frames {
    const uint64_t* words;
    int64_t step, steps, images, height, width, channels, planes;
    int64_t plane() const { return (channels + 63) / 64; }
    int64_t stride() const { return planes * plane(); }
    int64_t pixels() const { return images * height * width; }
};

// Writes base + UNIT * i for every set bit i; may write up to LIST_SLACK entries behind the end that it returns.
template <int UNIT>
inline uint16_t* list_bits(uint32_t bits, uint32_t base, uint16_t* to) {
#if defined(__AVX512VBMI2__)
    alignas(64) static constexpr uint16_t STEPS[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                       16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    const __m512i steps = _mm512_mullo_epi16(_mm512_load_si512(STEPS), _mm512_set1_epi16(UNIT));
    const __m512i entries = _mm512_add_epi16(_mm512_set1_epi16(short(base)), steps);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(bits, entries));
    return to + __builtin_popcount(bits);
#else
    for (; bits; bits &= bits - 1) *to++ = uint16_t(base + UNIT * __builtin_ctz(bits));
    return to;
#endif
}

// The active inputs of one output pixel: entry tap * channels + channel, times UNIT.
template <int UNIT>
int64_t list_inputs(const Frames& in, int radius, int64_t step, int64_t pixel, uint16_t* list) {
    const int64_t x = radius ? pixel % in.width : 0, y = radius ? pixel / in.width % in.height : 0;
    const uint64_t* centre = in.words + step * in.step + pixel * in.stride();
    uint16_t* to = list;
    for (int64_t plane = 0; plane < in.planes; plane++, centre += in.plane()) {
        uint32_t base = 0;
        for (int64_t dy = -radius; dy <= radius; dy++)
            for (int64_t dx = -radius; dx <= radius; dx++, base += UNIT * uint32_t(in.channels)) {
                if (radius && (y + dy < 0 || y + dy >= in.height || x + dx < 0 || x + dx >= in.width)) continue;
                const uint64_t* words = centre + (dy * in.width + dx) * in.stride();
                for (int64_t c = 0; c < in.channels; c += 32) {
                    const uint32_t bits = uint32_t(words[c / 64] >> (c % 64));
                    to = list_bits<UNIT>(bits, base + UNIT * uint32_t(c), to);
                }
            }
    }
    return to - list;
}

// sums[row] = the sum of the listed weight rows, for ROWS rows whose lists have `count` entries each, an even number.
template <int UNIT>
inline void add_up(const float* weights, const uint16_t* lists, int64_t list_stride, const int32_t* rows, int64_t count,
                   float* sums) {
    const uint16_t* list[ROWS];
    Vector sum[ROWS][VECTORS] = {};
    for (int r = 0; r < ROWS; r++) list[r] = lists + rows[r] * list_stride;
    const auto row = [=](uint32_t entry) {
        return reinterpret_cast<const float*>(reinterpret_cast<const char*>(weights) + size_t(entry) * (4 * LANES / UNIT));
    };
    // Two entries at a time: loads are what limits this loop.
    for (int64_t i = 0; i < count; i += 2)
        for (int r = 0; r < ROWS; r++) {
            uint32_t two;
            std::memcpy(&two, list[r] + i, 4);
            const float *one = row(two & 0xffff), *other = row(two >> 16);
            for (int v = 0; v < VECTORS; v++) sum[r][v] += load(one + v * WIDTH);
            for (int v = 0; v < VECTORS; v++) sum[r][v] += load(other + v * WIDTH);
        }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) store(sums + rows[r] * LANES + v * WIDTH, sum[r][v]);
}

// Rows in ascending order of their counts.
void sort_rows(const int32_t* counts, int64_t n, int64_t most, int32_t* starts, int32_t* rows) {
    std::fill(starts, starts + most + 2, 0);
    for (int64_t r = 0; r < n; r++) starts[counts[r] + 1]++;
    for (int64_t c = 0; c < most; c++) starts[c + 1] += starts[c];
    for (int64_t r = 0; r < n; r++) rows[starts[counts[r]]++] = int32_t(r);
}

struct Task {
    Buffer<uint16_t> lists;
    Buffer<int32_t> counts, starts, rows, groups;
    Buffer<float> sums;
};

template <int UNIT>
void run_task(Task& task, const Frames& in, int radius, const float* weights, const Epilogue& e, int64_t first,
              int64_t last, int64_t block) {
    const bool streams = e.streams(in.pixels() * in.steps);
    const int64_t inputs = in.channels * (2 * radius + 1) * (2 * radius + 1), steps = in.steps;
    const int64_t stride = in.planes * inputs + LIST_SLACK, block_rows = block * steps;
    const int64_t blocks = (last - first + block - 1) / block, groups_a_block = (block_rows + ROWS - 1) / ROWS;
    uint16_t* lists = task.lists.reserve((last - first) * steps * stride);
    int32_t* counts = task.counts.reserve(block_rows);
    int32_t* starts = task.starts.reserve(in.planes * inputs + 2);
    int32_t* rows = task.rows.reserve(blocks * groups_a_block * ROWS);
    int32_t* groups = task.groups.reserve(blocks * groups_a_block);
    float* sums = task.sums.reserve(block_rows * LANES);

    for (int64_t b = 0; b < blocks; b++) {
        const int64_t start = first + b * block, pixels = std::min(block, last - start), n = pixels * steps;
        uint16_t* list = lists + b * block_rows * stride;
        int32_t* order = rows + b * groups_a_block * ROWS;
        int64_t most = 0;
        for (int64_t t = 0; t < steps; t++)
            for (int64_t q = 0; q < pixels; q++) {
                const int64_t row = t * pixels + q;
                counts[row] = int32_t(list_inputs<UNIT>(in, radius, t, start + q, list + row * stride));
                most = std::max<int64_t>(most, counts[row]);
            }
        sort_rows(counts, n, most, starts, order);
        for (int64_t i = 0; i < n; i += ROWS) {
            const int64_t end = std::min(i + ROWS, n), longest = (counts[order[end - 1]] + 1) / 2 * 2;
            for (int64_t j = i; j < end; j++) {
                uint16_t* mine = list + order[j] * stride;
                // The weights have a row of zeros behind the last input.
                std::fill(mine + counts[order[j]], mine + longest, uint16_t(inputs * UNIT));
            }
            std::fill(order + end, order + i + ROWS, order[end - 1]);
            groups[b * groups_a_block + i / ROWS] = int32_t(longest);
        }
    }
    for (int64_t tile = 0; tile < e.tiles(); tile++)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t start = first + b * block, pixels = std::min(block, last - start);
            const uint16_t* list = lists + b * block_rows * stride;
            for (int64_t g = 0; g < (pixels * steps + ROWS - 1) / ROWS; g++)
                add_up<UNIT>(weights + tile * (inputs + 1) * LANES, list, stride, rows + (b * groups_a_block + g) * ROWS,
                             groups[b * groups_a_block + g], sums);
            finish(e, tile, steps, start, pixels, {sums, LANES, pixels * LANES}, streams);
        }
    if (streams) finish_streams();
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T, class Larger>
void pool(const T* in, T* out, int64_t frames, int64_t height, int64_t width, int64_t channels, int64_t threads, Larger larger) {
    const int64_t rows = (height + 1) / 2, columns = (width + 1) / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < frames * rows; row++) {
        const int64_t frame = row / rows, y = row % rows;
        for (int64_t x = 0; x < columns; x++) {
            T* to = out + (row * columns + x) * channels;
            const T* centre = in + ((frame * height + 2 * y) * width + 2 * x) * channels;
            std::copy(centre, centre + channels, to);
            for (int64_t dy = -1; dy <= 1; dy++)
                for (int64_t dx = -1; dx <= 1; dx++) {
                    if (2 * y + dy < 0 || 2 * y + dy >= height || 2 * x + dx < 0 || 2 * x + dx >= width) continue;
                    const T* from = centre + (dy * width + dx) * channels;
                    for (int64_t c = 0; c < channels; c++) to[c] = larger(to[c], from[c]);
                }
        }
    }
}

template <class T>
void expand(const uint64_t* words, T* out, int64_t rows, int64_t channels, int64_t threads) {
    const int64_t stride = ceil_divide(channels, 64);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t word = 0; word < stride; word++) {
            const uint64_t bits = words[row * stride + word];
            T* to = out + row * channels + word * 64;
            const int64_t count = std::min<int64_t>(64, channels - word * 64);
            if (count == 64)
                for (int64_t c = 0; c < 64; c++) to[c] = T(bits >> c & 1);
            else
                for (int64_t c = 0; c < count; c++) to[c] = T(bits >> c & 1);
        }
}

}  // namespace

extern "C" {

int64_t spike_lanes() { return LANES; }

void spike_product(const Frames* spikes, int64_t radius, const float* weights, const Epilogue* epilogue, int64_t threads) {
    const Frames& in = *spikes;
    const Epilogue& e = *epilogue;
    const int64_t channels = in.channels, steps = in.steps;
    const int64_t inputs = channels * (2 * radius + 1) * (2 * radius + 1), pixels = in.pixels();
    const int64_t block = std::max<int64_t>(1, BLOCK_ROWS / steps);
    const int64_t fitting = std::min(TASK_ROWS, LIST_BYTES / (2 * (in.planes * inputs + LIST_SLACK))) / steps / block;
    const int64_t most = std::max<int64_t>(1, fitting) * block;
    int64_t tasks = ceil_divide(pixels, most);
    tasks = std::min(pixels, ceil_divide(tasks, threads) * threads);
    const int64_t share = ceil_divide(pixels, tasks);
    constexpr int UNIT = 4 * LANES / 8;  // entries are row offsets in units of 8 bytes where 16 bits hold these
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < tasks; i++) {
        static thread_local Task task;
        const int64_t first = i * share, last = std::min(first + share, pixels);
        if (first >= last) continue;
        if ((inputs + 1) * UNIT <= 65536)
            run_task<UNIT>(task, in, int(radius), weights, e, first, last, block);
        else
            run_task<1>(task, in, int(radius), weights, e, first, last, block);
    }
}

// The epilogue alone: x is [frames, pixels, channels] with frames = steps, or one frame that is shown at every step (then
// step = 0); one frame is `step` values from the next.
void spike_neuron(const float* x, int64_t frames, int64_t step, int64_t steps, int64_t pixels, const Epilogue* epilogue,
                  int64_t threads) {
    const Epilogue& e = *epilogue;
    const int64_t channels = e.channels;
    constexpr int64_t BLOCK = 32;
    const bool streams = e.streams(pixels * steps);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < ceil_divide(pixels, BLOCK); block++) {
        static thread_local Buffer<float> copies;
        const int64_t first = block * BLOCK, count = std::min(BLOCK, pixels - first);
        for (int64_t tile = 0; tile < e.tiles(); tile++) {
            const float* from = x + first * channels + tile * LANES;
            const int64_t lanes = std::min<int64_t>(LANES, channels - tile * LANES);
            if (lanes == LANES) {
                finish(e, tile, steps, first, count, {from, channels, step}, streams);
                continue;
            }
            float* copy = copies.reserve(frames * count * LANES);
            for (int64_t t = 0; t < frames; t++)
                for (int64_t q = 0; q < count; q++)
                    std::memcpy(copy + (t * count + q) * LANES, from + t * step + q * channels, lanes * sizeof(float));
            finish(e, tile, steps, first, count, {copy, LANES, step ? count * LANES : 0}, streams);
        }
        if (streams) finish_streams();
    }
}

// Maximum over 3x3 windows, stride 2, padding 1, of `frames` frames: words of spikes by OR, or real values.
void spike_pool(const uint64_t* in, uint64_t* out, int64_t frames, int64_t height, int64_t width, int64_t words,
                int64_t threads) {
    pool(in, out, frames, height, width, words, threads, [](uint64_t a, uint64_t b) { return a | b; });
}

void real_pool(const float* in, float* out, int64_t frames, int64_t height, int64_t width, int64_t channels, int64_t threads) {
    pool(in, out, frames, height, width, channels, threads, [](float a, float b) { return a > b ? a : b; });
}

// q & neuron(sum over tokens of k & v), for rows [steps, images, tokens] of three times `words` words: q, k, v.
void spike_attention(const uint64_t* qkv, uint64_t* out, int64_t steps, int64_t images, int64_t tokens, int64_t words,
                     const float* inv_tau, const Neuron* neuron, int64_t threads) {
    const Dynamics<float> dynamics(*neuron);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t column = 0; column < images * words; column++) {
        const int64_t image = column / words, word = column % words;
        float h[64] = {};
        for (int64_t t = 0; t < steps; t++) {
            const int64_t row = (t * images + image) * tokens;
            // Counters of 64 channels, bit by bit: plane i holds bit i of every count.
            uint64_t planes[40] = {};
            int used = 0;
            for (int64_t token = 0; token < tokens; token++) {
                const uint64_t* at = qkv + (row + token) * 3 * words + word;
                uint64_t carry = at[words] & at[2 * words];
                for (int i = 0; carry; i++) {
                    const uint64_t both = planes[i] & carry;
                    planes[i] ^= carry;
                    carry = both;
                    used = std::max(used, i + 1);
                }
            }
            uint64_t fired = 0;
            for (int c = 0; c < 64; c++) {
                int64_t count = 0;
                for (int i = 0; i < used; i++) count |= int64_t(planes[i] >> c & 1) << i;
                h[c] = step(dynamics, float(count), h[c], dynamics.fires(h[c]), inv_tau[word * 64 + c]);
                fired |= uint64_t(dynamics.fires(h[c])) << c;
            }
            for (int64_t token = 0; token < tokens; token++)
                out[(row + token) * words + word] = qkv[(row + token) * 3 * words + word] & fired;
        }
    }
}

// Spikes as zeros and ones, row after row, without the padding of the words.
void spike_expand_float(const uint64_t* words, float* out, int64_t rows, int64_t channels, int64_t threads) {
    expand(words, out, rows, channels, threads);
}

void spike_expand_byte(const uint64_t* words, uint8_t* out, int64_t rows, int64_t channels, int64_t threads) {
    expand(words, out, rows, channels, threads);
}

int64_t spike_count(const uint64_t* words, int64_t count, int64_t threads) {
    int64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
    for (int64_t i = 0; i < count; i++) total += __builtin_popcountll(words[i]);
    return total;
}

}  // extern "C"
