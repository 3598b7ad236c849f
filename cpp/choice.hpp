// What is remembered of units of tokens, and the choice among them; N = (row, KV head).
#pragma once

#include "kernels.hpp"

namespace kvfold {

enum class Reduce { each, sum, max };  // whether each head of a group has a list of its own, or all share one

struct UnitChoice {
    int64_t rows, g, width;
    const float* scores;           // (rows, g, width)
    const int64_t *units, *room;   // (rows,) units there are, and units to choose at most
    Reduce reduce;
    int64_t sinks, recent;  // units that are always read, the last one beside
    int64_t most;
    int threads;
    int32_t *numbers, *counts;  // (rows * lists, most) ascending, then -1; (rows * lists,)
};

// As `UnitChoice`, but what heads make of a unit together is the sum, or the maximum, of each one's softmax over the units
// that are not read anyhow: those are the first, the last and those before it.
struct UnitVote {
    int64_t lists, heads, width;
    const float* scores;                          // (lists, heads, width)
    const int64_t *units, *room, *first, *before;  // (lists,)
    Reduce reduce;                                // sum or max
    float scale;
    int64_t most;
    int threads;
    int32_t *numbers, *counts;  // (lists, most) ascending, then -1; (lists,)
};

struct RaiseBounds {
    int64_t rows, count, d, room, unit;
    void* held;        // (rows, room, 2 d)
    const void* keys;  // (rows, count, d), of the same kind, or floats that bfloat16 is to hold
    Kind held_kind, kind;
    const bool* valid;     // (rows, count)
    const int64_t* start;  // (rows,) tokens that came before
    int threads;
};

// Units that are chosen, as the pages of each list, or as its slots among all of the pool; the first of a row lie elsewhere.
struct PageLists {
    Rows on;  // what the lists are of: table, lengths and page_size count
    bool slots;
    int64_t lists, most, each;  // lists of all rows, side by side; numbers of each; pages, or slots, of a unit
    const int32_t* numbers;     // (lists, most) ascending, then -1
    const int64_t* before;      // (rows,) pages, or slots
    int32_t *listed, *lengths;  // (lists, most * each), then -1; (lists,) slots
};

struct Candidate {
    float score;
    int32_t unit;
};

// The number that is in place `most`, counted from 1, from the highest on.
float highest_of(float* numbers, int64_t most, int64_t count);

void list_pages(const PageLists& on);
void raise_bounds(const RaiseBounds& on);

}  // namespace kvfold
