// Products by events: sums of the weight rows of active inputs.
//
// The outputs are cut into tiles of LANES channels whose weights fit the first-level cache. A task lists the active inputs
// of its rows once, sorts rows of like length into groups of ROWS, and then, tile by tile, adds up a group at a time with
// every sum in registers. The neuron follows while the sums are in the cache, so that real values reach memory only where
// they are asked for.
//
// Sums of float32 run over planes, taps, then channels, in ascending order, one rounding an addition. Those of whole
// numbers are exact.

#pragma once

#include "packed_epilogue.h"

namespace {

constexpr int64_t BLOCK_ROWS = 256;      // rows whose sums of one tile stay in the cache between product and neuron
constexpr int64_t LIST_BYTES = 8 << 20;  // room for the lists of a task
constexpr int64_t TASK_ROWS = 4096;
constexpr int LIST_SLACK = 32;           // entries that a list may be overwritten by, behind its end

// Writes base + UNIT * i for every set bit i; may write up to LIST_SLACK entries behind the end that it returns.
template <int UNIT>
inline uint16_t* list_bits(uint64_t bits, uint32_t base, uint16_t* to) {
#if defined(__AVX512VBMI2__)
    alignas(64) static constexpr uint8_t PLACES[64] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
        32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    const __m512i set = _mm512_maskz_compress_epi8(bits, _mm512_load_si512(PLACES)), first = _mm512_set1_epi16(short(base));
    const auto entries = [=](__m256i places) {
        return _mm512_add_epi16(first, _mm512_mullo_epi16(_mm512_cvtepu8_epi16(places), _mm512_set1_epi16(UNIT)));
    };
    const int count = __builtin_popcountll(bits);
    _mm512_storeu_si512(to, entries(_mm512_castsi512_si256(set)));
    if (count > 32) _mm512_storeu_si512(to + 32, entries(_mm512_extracti64x4_epi64(set, 1)));
    return to + count;
#else
    for (; bits; bits &= bits - 1) *to++ = uint16_t(base + UNIT * __builtin_ctzll(bits));
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
                for (int64_t word = 0; word < in.plane(); word++)
                    to = list_bits<UNIT>(words[word], base + UNIT * uint32_t(64 * word), to);
            }
    }
    return to - list;
}

// How weights of a type are summed: the vector that holds LANES sums together with its likes, the type that sums reach
// memory in, and how many additions may come before they have to.
template <class Weight> struct Adding;
template <> struct Adding<float> {
    typedef Vector Partial;
    typedef float Sum;
    static constexpr int64_t MOST = std::numeric_limits<int64_t>::max() - 1;
};
template <> struct Adding<int32_t> {
    typedef Whole Partial;
    typedef int32_t Sum;
    static constexpr int64_t MOST = std::numeric_limits<int64_t>::max() - 1;
};
// Weights -127..127, at 16 bits: 256 of them stay below 2^15.
template <> struct Adding<int8_t> {
    typedef int16_t Partial __attribute__((vector_size(4 * WIDTH)));
    typedef int32_t Sum;
    static constexpr int64_t MOST = 256;
};

inline void add_row(Vector& sum, const float* row) { sum += load(row); }
inline void add_row(Whole& sum, const int32_t* row) {
    Whole weights;
    std::memcpy(&weights, row, sizeof weights);
    sum += weights;
}
inline void add_row(Adding<int8_t>::Partial& sum, const int8_t* row) {
#if defined(__AVX512BW__)
    sum += Adding<int8_t>::Partial(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    sum += Adding<int8_t>::Partial(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row))));
#else
    for (int i = 0; i < 2 * WIDTH; i++) sum[i] = int16_t(sum[i] + row[i]);
#endif
}

// Writes partial sums, or adds them to those of the entries before.
template <class Partial, class Sum>
inline void keep(Sum* to, Partial sum, bool add) {
    constexpr int COUNT = sizeof(Partial) / sizeof(sum[0]);
    typedef Sum Wide __attribute__((vector_size(COUNT * sizeof(Sum))));
    Wide wide = __builtin_convertvector(sum, Wide), before;
    if (add) {
        std::memcpy(&before, to, sizeof before);
        wide += before;
    }
    std::memcpy(to, &wide, sizeof wide);
}

// sums[row] = the sum of the listed weight rows, for ROWS rows whose lists have `count` entries each, an even number.
template <class Weight, int UNIT>
inline void add_up(const Weight* weights, const uint16_t* lists, int64_t list_stride, const int32_t* rows, int64_t count,
                   typename Adding<Weight>::Sum* sums) {
    typedef typename Adding<Weight>::Partial Partial;
    typedef typename Adding<Weight>::Sum Sum;
    constexpr int LENGTH = sizeof(Partial) / sizeof(Partial{}[0]), COUNT = LANES / LENGTH;
    const uint16_t* list[ROWS];
    for (int r = 0; r < ROWS; r++) list[r] = lists + rows[r] * list_stride;
    const auto row = [=](uint32_t entry) {
        const char* from = reinterpret_cast<const char*>(weights) + size_t(entry) * (sizeof(Weight) * LANES / UNIT);
        return reinterpret_cast<const Weight*>(from);
    };
    // Where sums do not reach memory at once: rows may come twice, the last of a block as often as it takes to fill a group.
    alignas(64) Sum totals[ROWS][LANES];
    const bool at_once = count <= Adding<Weight>::MOST;
    int64_t i = 0;
    do {
        Partial sum[ROWS][COUNT] = {};
        const int64_t first = i, last = std::min(count, first + std::min(Adding<Weight>::MOST, count));
        // Two entries at a time: loads are what limits this loop.
        for (; i < last; i += 2)
            for (int r = 0; r < ROWS; r++) {
                uint32_t two;
                std::memcpy(&two, list[r] + i, 4);
                const Weight *one = row(two & 0xffff), *other = row(two >> 16);
                for (int v = 0; v < COUNT; v++) add_row(sum[r][v], one + v * LENGTH);
                for (int v = 0; v < COUNT; v++) add_row(sum[r][v], other + v * LENGTH);
            }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < COUNT; v++)
                keep((at_once ? sums + rows[r] * LANES : totals[r]) + v * LENGTH, sum[r][v], first > 0);
    } while (i < count);
    for (int r = 0; r < ROWS && !at_once; r++) std::memcpy(sums + rows[r] * LANES, totals[r], sizeof totals[r]);
}

// Rows in ascending order of their counts.
void sort_rows(const int32_t* counts, int64_t n, int64_t most, int32_t* starts, int32_t* rows) {
    std::fill(starts, starts + most + 2, 0);
    for (int64_t r = 0; r < n; r++) starts[counts[r] + 1]++;
    for (int64_t c = 0; c < most; c++) starts[c + 1] += starts[c];
    for (int64_t r = 0; r < n; r++) rows[starts[counts[r]]++] = int32_t(r);
}

template <class Sum>
struct Task {
    Buffer<uint16_t> lists;
    Buffer<int32_t> counts, starts, rows, groups;
    Buffer<Sum> sums;
};

template <int UNIT, class Weight, class Sum>
void run_task(Task<Sum>& task, const Frames& in, int radius, const Weight* weights, const Epilogue& e, int64_t first,
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
    Sum* sums = task.sums.reserve(block_rows * LANES);

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
                add_up<Weight, UNIT>(weights + tile * (inputs + 1) * LANES, list, stride, rows + (b * groups_a_block + g) * ROWS,
                             groups[b * groups_a_block + g], sums);
            finish<Sum>(e, tile, steps, start, pixels, {sums, LANES, pixels * LANES}, streams);
        }
    if (streams) finish_streams();
}

template <class Weight>
void product_by_events(const Frames& in, int64_t radius, const Weight* weights, const Epilogue& e, int64_t threads) {
    const int64_t channels = in.channels, steps = in.steps;
    const int64_t inputs = channels * (2 * radius + 1) * (2 * radius + 1), pixels = in.pixels();
    const int64_t block = std::max<int64_t>(1, BLOCK_ROWS / steps);
    const int64_t fitting = std::min(TASK_ROWS, LIST_BYTES / (2 * (in.planes * inputs + LIST_SLACK))) / steps / block;
    const int64_t most = std::max<int64_t>(1, fitting) * block;
    int64_t tasks = ceil_divide(pixels, most);
    tasks = std::min(pixels, ceil_divide(tasks, threads) * threads);
    const int64_t share = ceil_divide(pixels, tasks);
    constexpr int UNIT = sizeof(Weight) * LANES / 8;  // entries are row offsets in units of 8 bytes where 16 bits hold these
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < tasks; i++) {
        static thread_local Task<typename Adding<Weight>::Sum> task;
        const int64_t first = i * share, last = std::min(first + share, pixels);
        if (first >= last) continue;
        if ((inputs + 1) * UNIT <= 65536)
            run_task<UNIT>(task, in, int(radius), weights, e, first, last, block);
        else
            run_task<1>(task, in, int(radius), weights, e, first, last, block);
    }
}


}  // namespace
