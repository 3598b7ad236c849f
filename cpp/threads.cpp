// Indices are handed out one by one: whoever is running takes the next. At the end the caller waits only for those
// that somebody has taken; a worker that the system has not woken yet finds nothing left, and nobody asks for it.

#include "threads.hpp"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

namespace kvfold {
namespace {

struct Job {
    Task task;
    const void* context;
    int64_t count;
    int room;                     // workers that may still join; guarded by the pool's mutex
    std::atomic<int64_t> next{0};
    std::atomic<int32_t> done{0};
    std::exception_ptr error;     // the first; guarded by the pool's mutex, read when all is done
};

struct Pool {
    std::mutex mutex;
    std::condition_variable some;
    std::list<std::shared_ptr<Job>> jobs;
    int started = 0;
};

Pool* pool = new Pool;  // never freed: its workers outlive what a process destroys at its end

constexpr int LOOKS = 2000;  // at the counter, some microseconds, before the caller goes to sleep

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A task that fails counts as done: the caller's context must outlive all that was taken, whatever comes of it.
void run(Job& job, Pool& mine_of) {
    int32_t mine = 0;
    for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count; mine++) {
        try {
            job.task(job.context, i);
        } catch (...) {
            std::lock_guard<std::mutex> lock(mine_of.mutex);
            if (!job.error) job.error = std::current_exception();
        }
    }
    if (mine && job.done.fetch_add(mine, std::memory_order_acq_rel) + mine == job.count) job.done.notify_all();
}

void work(Pool* mine) {
    std::unique_lock<std::mutex> lock(mine->mutex);
    for (;;) {
        std::shared_ptr<Job> job;
        for (auto& each : mine->jobs)
            if (each->room > 0 && each->next.load(std::memory_order_relaxed) < each->count) {
                job = each;
                break;
            }
        if (!job) {
            mine->some.wait(lock);
            continue;
        }
        job->room--;
        lock.unlock();
        run(*job, *mine);
        lock.lock();
    }
}

// A child has none of its parent's threads: it begins with a pool of its own. The mutex is held across the fork, so
// that no list is caught half-changed.
const int watched = pthread_atfork(
    [] { pool->mutex.lock(); }, [] { pool->mutex.unlock(); }, [] { pool = new Pool; });

struct Memory {
    float* at = nullptr;
    size_t floats = 0;
    ~Memory() { give_back(at); }
};

}  // namespace

void* take(size_t bytes) {
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory && bytes) throw std::bad_alloc();
    return memory;
}

void give_back(void* memory) { std::free(memory); }

float* scratch(size_t floats) {
    static thread_local Memory own;
    if (floats > own.floats) {
        give_back(own.at);
        own.floats = 0;
        own.at = nullptr;
        own.at = static_cast<float*>(take(floats * sizeof(float)));
        own.floats = floats;
    }
    return own.at;
}

int workers() {
    std::lock_guard<std::mutex> lock(pool->mutex);
    return pool->started;
}

void for_each(int64_t count, int threads, Task task, const void* context) {
    const int others = static_cast<int>(count < threads ? count : threads) - 1;
    if (others <= 0 || count > INT32_MAX) {
        for (int64_t i = 0; i < count; i++) task(context, i);
        return;
    }
    Pool* mine = pool;
    auto job = std::make_shared<Job>();
    job->task = task, job->context = context, job->count = count, job->room = others;
    std::list<std::shared_ptr<Job>> node{job};
    const auto at = node.begin();
    {
        std::lock_guard<std::mutex> lock(mine->mutex);
        mine->jobs.splice(mine->jobs.end(), node);
        while (mine->started < others) {
            try {
                std::thread(work, mine).detach();
            } catch (const std::exception&) {
                break;  // no thread is to be had: the caller does the work
            }
            mine->started++;
        }
    }
    for (int i = 0; i < others; i++) mine->some.notify_one();
    run(*job, *mine);
    {
        std::lock_guard<std::mutex> lock(mine->mutex);
        mine->jobs.erase(at);
    }
    for (int i = 0; i < LOOKS && job->done.load(std::memory_order_acquire) < count; i++) pause();
    for (int32_t done; (done = job->done.load(std::memory_order_acquire)) < count;) job->done.wait(done);
    if (job->error) std::rethrow_exception(job->error);
}

}  // namespace kvfold
