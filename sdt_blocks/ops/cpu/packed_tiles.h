// Sums of bytes times 8-bit weights by the matrix units of a processor that has them (AMX): the same whole numbers as
// `multiply` in packed_dense.h, from the same rows and weights.

#pragma once

#include "packed_epilogue.h"

#if defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__linux__)
#define SDT_BLOCKS_TILES
#include <atomic>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t TILED_ROWS = 32;  // multiplied together: two tiles of values

// Sums of a digit, as the next lower digit of the weights counts them.
typedef uint32_t Unsigned __attribute__((vector_size(sizeof(Whole))));
inline Whole shifted(Whole sums) { return Whole(Unsigned(sums) << 8); }

#ifdef SDT_BLOCKS_TILES

// Whether the system lets this process use the matrix units.
inline bool has_tiles() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

// How many groups of four values a tile holds, for rows of `length` groups; 0 if there are no tiles, or if they would be narrow.
inline int64_t tile_depth(int64_t length) {
    for (int64_t depth = 16; has_tiles() && depth >= 8; depth--)
        if (length % depth == 0) return depth;
    return 0;
}

// The shapes of a thread's tiles while this lives: 0 to 3 hold sums, 4 and 5 values, 6 and 7 weights of `depth` groups of four.
// Without a depth no tiles are used.
class Tiles {
    struct alignas(64) Shapes {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };
    const bool used;

public:
    explicit Tiles(int64_t depth) : used(depth != 0) {
        if (!used) return;
        Shapes shapes;
        for (int i = 0; i < 8; i++) {
            const bool values = i == 4 || i == 5, weights = i > 5;
            shapes.row_bytes[i] = uint16_t(values ? 4 * depth : 64);
            shapes.rows[i] = uint8_t(weights ? depth : 16);
        }
        fence();
        _tile_loadconfig(&shapes);
    }
    ~Tiles() {
        if (used) _tile_release();
    }
    // Between other code and instructions on tiles, which do not tell the compiler what memory they read and write.
    static void fence() { std::atomic_signal_fence(std::memory_order_seq_cst); }
};

// The sums [rows, LANES] of rows `stride` bytes apart, a multiple of TILED_ROWS, for weights [PIECES, length, LANES, 4], by the
// thread's `Tiles` of this depth. As in `multiply`, several pieces are the weights' digits, highest first.
template <int PIECES>
void multiply_by_tiles(const uint8_t* values, int64_t stride, int64_t rows, const int8_t* weights, int64_t length, int64_t depth,
                       int32_t* sums) {
    static_assert(LANES == 32, "the lanes of two tiles");
    constexpr int64_t GROUP_BYTES = LANES * 4, SUM_BYTES = LANES * sizeof(int32_t);
    for (int64_t r = 0; r < rows; r += TILED_ROWS) {
        const uint8_t *upper = values + r * stride, *lower = upper + TILED_ROWS / 2 * stride;
        const int8_t* of = weights;
        int32_t *to = sums + r * LANES, *below = to + TILED_ROWS / 2 * LANES;
        for (int piece = 0; piece < PIECES; piece++) {
            for (int64_t i = 0; piece && i < TILED_ROWS * LANES; i += WIDTH) {
                Whole sum;
                std::memcpy(&sum, to + i, sizeof sum);
                sum = shifted(sum);
                std::memcpy(to + i, &sum, sizeof sum);
            }
            Tiles::fence();
            if (piece) {
                _tile_loadd(0, to, SUM_BYTES);
                _tile_loadd(1, to + 16, SUM_BYTES);
                _tile_loadd(2, below, SUM_BYTES);
                _tile_loadd(3, below + 16, SUM_BYTES);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t i = 0; i < length; i += depth, of += depth * GROUP_BYTES) {
                _tile_loadd(6, of, GROUP_BYTES);
                _tile_loadd(7, of + 64, GROUP_BYTES);
                _tile_loadd(4, upper + 4 * i, stride);
                _tile_loadd(5, lower + 4 * i, stride);
                _tile_dpbusd(0, 4, 6);
                _tile_dpbusd(1, 4, 7);
                _tile_dpbusd(2, 5, 6);
                _tile_dpbusd(3, 5, 7);
            }
            _tile_stored(0, to, SUM_BYTES);
            _tile_stored(1, to + 16, SUM_BYTES);
            _tile_stored(2, below, SUM_BYTES);
            _tile_stored(3, below + 16, SUM_BYTES);
            Tiles::fence();
        }
    }
}

#else

inline int64_t tile_depth(int64_t) { return 0; }
struct Tiles {
    explicit Tiles(int64_t) {}
};
// Never called without a depth.
template <int PIECES, class... Given> void multiply_by_tiles(const Given&...) {}

#endif

}  // namespace
