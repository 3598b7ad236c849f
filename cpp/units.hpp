// How codes of a few bits lie in bytes, and which of them a kernel reads at once.
#pragma once

#include "kernels.hpp"
#include "lanes.hpp"

namespace kvfold::ISA {
namespace {

// Codes of BITS bits as ops/codes/packing.py lays them: in a unit, number i is in word i % 4, at place i / 4.
template <int BITS>
struct Unit {
    static constexpr int WORD = BITS == 3 ? 2 : BITS;           // bits of a code that lie in the words
    static constexpr int NUMBERS = 128 / WORD;                  // of a whole unit
    static constexpr int VECTORS = NUMBERS / LANES;
    static constexpr int BYTES = BITS == 3 ? 24 : 16;
    static constexpr int TOGETHER = VECTORS < 4 ? VECTORS : 4;  // vectors of values that are summed in registers
    static constexpr int HALF = 16 / WORD;                      // codes in half a word
};

// Floats of whole cache lines that hold so many.
inline int64_t lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// Tokens of one page that lie in a block: a block may begin and end within a page.
struct Run {
    int64_t page, place, at, held;  // its page, its first slot among all, its first slot in the block, and its tokens
};

}  // namespace
}  // namespace kvfold::ISA
