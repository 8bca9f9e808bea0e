// Products by events: sums of the weight rows of active inputs.
//
// The outputs are cut into tiles of LANES channels. A task lists the active inputs of its rows once and groups ROWS rows with
// lists of similar length. Then, tile by tile, it adds up each group with all sums in registers. The neurons follow while the
// sums are in the cache, so that real values reach memory only if they are asked for. The lists are stored in the order of
// reading, and the next tile's weights are prefetched during the sums of the current one.
//
// Float32 sums run over planes, taps, then channels, in ascending order, with one rounding per addition. Integer sums are
// exact.

#pragma once

#include "packed_epilogue.h"

namespace {

constexpr int64_t BLOCK_ROWS = 512;      // rows whose sums of one tile stay in the cache between product and neuron
constexpr int64_t LIST_BYTES = 8 << 20;  // for the lists of a task
constexpr int64_t TASK_ROWS = 4096;
constexpr int LIST_SLACK = 32;           // entries that may be overwritten behind the end of a list

// Writes base + UNIT * i for every set bit i; may overwrite up to LIST_SLACK entries behind the end, which it returns.
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

// A pixel, counted through all images: its column and row in the image, and its row counted through all images.
struct Place {
    int64_t pixel, x, y, row, width, height;

    Place(const Frames& in, int64_t p)
        : pixel(p), x(p % in.width), y(p / in.width % in.height), row(p / in.width), width(in.width), height(in.height) {}
    void operator++() {
        pixel++;
        if (++x < width) return;
        x = 0;
        row++;
        if (++y == height) y = 0;
    }
};

typedef uint16_t Entries __attribute__((vector_size(2 * LIST_SLACK)));

// The active inputs of all rows that a task's windows reach, listed row by row: thus the three pixels of a window in one row
// are adjacent. An entry is (column * channels + channel) * UNIT, modulo 2^16.
template <int UNIT>
struct RowLists {
    const Frames& in;
    int64_t row, rows, column, columns;  // the listed part of every frame; rows are counted through all images
    const int64_t* starts;               // [steps, rows, planes, columns + 1]
    const uint16_t* entries;

    RowLists(const Frames& frames, int64_t first, int64_t last, Buffer<int64_t>& start_buffer, Buffer<uint16_t>& entry_buffer)
        : in(frames) {
        const int64_t end = (last - 1) / in.width;
        row = std::max<int64_t>(first / in.width - 1, 0);
        rows = std::min(end + 2, in.images * in.height) - row;
        const bool within = first / in.width == end;  // the task lies within one row
        column = within ? std::max<int64_t>(first % in.width - 1, 0) : 0;
        columns = (within ? std::min((last - 1) % in.width + 2, in.width) : in.width) - column;
        int64_t* start = start_buffer.reserve(in.steps * rows * in.planes * (columns + 1));
        uint16_t* entry = entry_buffer.reserve(in.steps * rows * in.planes * columns * in.channels + 2 * LIST_SLACK);
        starts = start;
        entries = entry;
        for (int64_t t = 0; t < in.steps; t++)
            for (int64_t r = 0; r < rows; r++)
                for (int64_t plane = 0; plane < in.planes; plane++) {
                    const uint64_t* words = in.words + t * in.step + ((row + r) * in.width + column) * in.stride() +
                                            plane * in.plane();
                    for (int64_t x = 0; x < columns; x++, words += in.stride()) {
                        *start++ = entry - entries;
                        uint32_t base = uint32_t((column + x) * in.channels) * UNIT;
                        for (int64_t word = 0; word < in.plane(); word++, base += UNIT * 64)
                            entry = list_bits<UNIT>(words[word], base, entry);
                    }
                    *start++ = entry - entries;
                }
    }
    // Lists the inputs of a pixel's window, in ascending order; may overwrite up to LIST_SLACK entries behind the end, which it
    // returns.
    uint16_t* list(int64_t step, const Place& at, uint16_t* to) const {
        const int64_t left = std::max<int64_t>(at.x - 1, 0) - column, right = std::min(at.x + 2, in.width) - column;
        for (int64_t plane = 0; plane < in.planes; plane++)
            for (int64_t dy = -1; dy <= 1; dy++) {
                if (at.y + dy < 0 || at.y + dy >= in.height) continue;
                const int64_t* start = starts + ((step * rows + at.row + dy - row) * in.planes + plane) * (columns + 1);
                const uint16_t* from = entries + start[left];
                const uint16_t shift = uint16_t(uint32_t((3 * (dy + 1) - (at.x - 1)) * in.channels) * UNIT);
                const int64_t count = start[right] - start[left];
                for (int64_t i = 0; i < count; i += LIST_SLACK) {
                    Entries some;
                    std::memcpy(&some, from + i, sizeof some);
                    some += shift;
                    std::memcpy(to + i, &some, sizeof some);
                }
                to += count;
            }
        return to;
    }
};

// The active inputs of single pixels; an entry is channel * UNIT.
template <int UNIT>
struct PixelLists {
    const Frames& in;

    PixelLists(const Frames& frames, int64_t, int64_t, Buffer<int64_t>&, Buffer<uint16_t>&) : in(frames) {}
    uint16_t* list(int64_t step, const Place& at, uint16_t* to) const {
        const uint64_t* words = in.words + step * in.step + at.pixel * in.stride();
        for (int64_t plane = 0; plane < in.planes; plane++)
            for (int64_t word = 0; word < in.plane(); word++) to = list_bits<UNIT>(*words++, uint32_t(64 * word) * UNIT, to);
        return to;
    }
};

// How weights of a type are summed: the vector type of partial sums (several hold LANES), the type of sums in memory, and the
// most additions before partial sums must go there.
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
// Weights -127..127 in 16 bits: the sum of 256 stays below 2^15.
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

// Stores partial sums, or adds them to those of earlier entries.
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

// sums[row] = the sum of the listed weight rows, for ROWS rows of `pairs` pairs of entries each, interleaved: for each pair,
// all rows.
template <class Weight, int UNIT>
inline void add_up(const Weight* weights, const uint32_t* lists, int64_t pairs, const int32_t* rows,
                   typename Adding<Weight>::Sum* sums) {
    typedef typename Adding<Weight>::Partial Partial;
    typedef typename Adding<Weight>::Sum Sum;
    constexpr int LENGTH = sizeof(Partial) / sizeof(Partial{}[0]), COUNT = LANES / LENGTH;
    const auto row = [=](uint32_t entry) {
        const char* from = reinterpret_cast<const char*>(weights) + size_t(entry) * (sizeof(Weight) * LANES / UNIT);
        return reinterpret_cast<const Weight*>(from);
    };
    // For sums that take several parts: adding in `sums` would be wrong, as a block's last row may be repeated to fill a group.
    alignas(64) Sum totals[ROWS][LANES];
    constexpr int64_t MOST = Adding<Weight>::MOST / 2;
    const bool at_once = pairs <= MOST;
    int64_t i = 0;
    do {
        Partial sum[ROWS][COUNT] = {};
        const int64_t first = i, last = std::min(pairs, first + std::min(MOST, pairs));
        // Two entries at a time, because loads limit this loop.
        for (; i < last; i++, lists += ROWS)
            for (int r = 0; r < ROWS; r++) {
                const uint32_t two = lists[r];
                const Weight *one = row(two & 0xffff), *other = row(two >> 16);
                for (int v = 0; v < COUNT; v++) add_row(sum[r][v], one + v * LENGTH);
                for (int v = 0; v < COUNT; v++) add_row(sum[r][v], other + v * LENGTH);
            }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < COUNT; v++)
                keep((at_once ? sums + rows[r] * LANES : totals[r]) + v * LENGTH, sum[r][v], first > 0);
    } while (i < pairs);
    for (int r = 0; r < ROWS && !at_once; r++) std::memcpy(sums + rows[r] * LANES, totals[r], sizeof totals[r]);
}

// Sorts rows by their counts, ascending.
void sort_rows(const int32_t* counts, int64_t n, int64_t most, int32_t* starts, int32_t* rows) {
    std::fill(starts, starts + most + 2, 0);
    for (int64_t r = 0; r < n; r++) starts[counts[r] + 1]++;
    for (int64_t c = 0; c < most; c++) starts[c + 1] += starts[c];
    for (int64_t r = 0; r < n; r++) rows[starts[counts[r]]++] = int32_t(r);
}

// Interleaves the lists of ROWS rows, pair by pair; consecutive rows' lists are `stride` entries apart. May write up to seven
// pairs behind the end.
inline uint32_t* interleave(const uint16_t* lists, int64_t stride, const int32_t* rows, int64_t pairs, uint32_t* to) {
    const uint16_t* list[ROWS];
    for (int r = 0; r < ROWS; r++) list[r] = lists + rows[r] * stride;
#if defined(__AVX2__)
    if constexpr (ROWS == 8) {
        for (int64_t i = 0; i < pairs; i += 8) {
            __m256i of[8], two[8], four[8];
            for (int r = 0; r < 8; r++) of[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(list[r] + 2 * i));
            for (int r = 0; r < 4; r++) {
                two[2 * r] = _mm256_unpacklo_epi32(of[2 * r], of[2 * r + 1]);
                two[2 * r + 1] = _mm256_unpackhi_epi32(of[2 * r], of[2 * r + 1]);
            }
            for (int r = 0; r < 2; r++)
                for (int j = 0; j < 2; j++) {
                    four[4 * r + 2 * j] = _mm256_unpacklo_epi64(two[4 * r + j], two[4 * r + 2 + j]);
                    four[4 * r + 2 * j + 1] = _mm256_unpackhi_epi64(two[4 * r + j], two[4 * r + 2 + j]);
                }
            __m256i* at = reinterpret_cast<__m256i*>(to + 8 * i);
            for (int j = 0; j < 4; j++) {
                _mm256_storeu_si256(at + j, _mm256_permute2x128_si256(four[j], four[4 + j], 0x20));
                _mm256_storeu_si256(at + 4 + j, _mm256_permute2x128_si256(four[j], four[4 + j], 0x31));
            }
        }
        return to + 8 * pairs;
    }
#endif
    for (int64_t i = 0; i < 2 * pairs; i += 2)
        for (int r = 0; r < ROWS; r++) std::memcpy(to++, list[r] + i, 4);
    return to;
}

// Prefetches memory piece by piece.
struct Ahead {
    const char* next;
    const char* end;
    int64_t piece;

    Ahead(const void* from, int64_t bytes, int64_t pieces)
        : next(static_cast<const char*>(from)), end(next + bytes), piece(ceil_divide(bytes, pieces)) {}
    void fetch() {
        for (const char* until = std::min(end, next + piece); next < until; next += 64) __builtin_prefetch(next, 0, 2);
    }
};

template <class Sum>
struct Task {
    Buffer<int64_t> row_starts;
    Buffer<uint16_t> row_entries, lists;
    Buffer<uint32_t> pairs;
    Buffer<int32_t> counts, starts, rows, groups;
    Buffer<Sum> sums;
};

template <class Lists, int UNIT, class Weight, class Sum>
void run_task(Task<Sum>& task, const Frames& in, int radius, const Weight* weights, const Epilogue& e, int64_t first,
              int64_t last, int64_t block) {
    const bool streams = e.streams(in.pixels() * in.steps);
    const int64_t inputs = in.channels * (2 * radius + 1) * (2 * radius + 1), steps = in.steps;
    const int64_t stride = in.planes * inputs + 2 * LIST_SLACK, block_rows = block * steps;
    const int64_t blocks = (last - first + block - 1) / block, groups_a_block = (block_rows + ROWS - 1) / ROWS;
    const int64_t all_groups = blocks * groups_a_block;
    const Lists found(in, first, last, task.row_starts, task.row_entries);
    uint16_t* lists = task.lists.reserve(block_rows * stride);
    uint32_t* pairs = task.pairs.reserve(all_groups * ROWS * (in.planes * inputs + 2) / 2 + 7 * ROWS);
    int32_t* counts = task.counts.reserve(block_rows);
    int32_t* starts = task.starts.reserve(in.planes * inputs + 2);
    int32_t* rows = task.rows.reserve(all_groups * ROWS);
    int32_t* groups = task.groups.reserve(all_groups);
    Sum* sums = task.sums.reserve(block_rows * LANES);

    const uint16_t zeros = uint16_t(inputs * UNIT);
    uint32_t* to = pairs;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t start = first + b * block, pixels = std::min(block, last - start), n = pixels * steps;
        int32_t* order = rows + b * groups_a_block * ROWS;
        int64_t most = 0;
        for (int64_t t = 0, row = 0; t < steps; t++) {
            Place at(in, start);
            for (int64_t q = 0; q < pixels; q++, row++, ++at) {
                uint16_t* list = lists + row * stride;
                counts[row] = int32_t(found.list(t, at, list) - list);
                most = std::max<int64_t>(most, counts[row]);
            }
        }
        sort_rows(counts, n, most, starts, order);
        // The last row is repeated to fill a group.
        std::fill(order + n, order + ceil_divide(n, ROWS) * ROWS, order[n - 1]);
        for (int64_t i = 0; i < n; i += ROWS) {
            const int64_t longest = (counts[order[i + ROWS - 1]] + 1) / 2;
            // The weights have a row of zeros behind the last input.
            for (int64_t r = i; r < i + ROWS; r++) {
                uint16_t* list = lists + order[r] * stride;
                std::fill(list + counts[order[r]], list + 2 * longest, zeros);
            }
            to = interleave(lists, stride, order + i, longest, to);
            groups[b * groups_a_block + i / ROWS] = int32_t(longest);
        }
    }
    const int64_t tile_size = (inputs + 1) * LANES;
    for (int64_t tile = 0; tile < e.tiles(); tile++) {
        const Weight* of_tile = weights + tile * tile_size;
        const uint32_t* list = pairs;
        Ahead ahead(of_tile + tile_size, tile + 1 < e.tiles() ? tile_size * sizeof(Weight) : 0, all_groups);
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t start = first + b * block, pixels = std::min(block, last - start);
            for (int64_t g = b * groups_a_block; g < b * groups_a_block + ceil_divide(pixels * steps, ROWS); g++) {
                ahead.fetch();
                add_up<Weight, UNIT>(of_tile, list, groups[g], rows + g * ROWS, sums);
                list += groups[g] * ROWS;
            }
            finish<Sum>(e, tile, steps, start, pixels, {sums, LANES, pixels * LANES}, streams);
        }
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
    constexpr int UNIT = sizeof(Weight) * LANES / 8;  // entries are row offsets in units of 8 bytes if these fit 16 bits
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < tasks; i++) {
        static thread_local Task<typename Adding<Weight>::Sum> task;
        const int64_t first = i * share, last = std::min(first + share, pixels);
        if (first >= last) continue;
        const auto go = [&](auto run) { run(task, in, int(radius), weights, e, first, last, block); };
        typedef typename Adding<Weight>::Sum Sum;
        const bool small = (inputs + 1) * UNIT <= 65536;
        if (radius)
            go(small ? run_task<RowLists<UNIT>, UNIT, Weight, Sum> : run_task<RowLists<1>, 1, Weight, Sum>);
        else
            go(small ? run_task<PixelLists<UNIT>, UNIT, Weight, Sum> : run_task<PixelLists<1>, 1, Weight, Sum>);
    }
}

}  // namespace
