// A pool of threads whose caller never waits for a worker that has not begun.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvfold {

using Task = void (*)(const void* context, int64_t index);

// Runs task(context, i) once for every i below count, on the caller and at most threads - 1 others, in any order.
// Throws the first of what tasks threw, when all have ended.
void for_each(int64_t count, int threads, Task task, const void* context);

// Memory of the calling thread for so many floats, on a cache line; what an earlier call gave is gone.
float* scratch(size_t floats);

// Memory on a cache line that any thread may give back. Throws std::bad_alloc.
void* take(size_t bytes);
void give_back(void* memory);

// Workers that were started so far in this process.
int workers();

}  // namespace kvfold
