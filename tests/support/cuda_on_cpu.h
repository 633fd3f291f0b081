// Just enough of CUDA to run a kernel on the CPU: every thread of a block is a fiber, and a barrier switches to the next.
// Lets a test execute cuda.cu itself, its indexing, vector accesses and block sums, where there is no GPU.
#include <cstdio>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define __shared__ static

struct Index { unsigned x; };
static Index threadIdx, blockIdx;

namespace fibers {
constexpr int STACK = 1 << 17, MOST = 1024;
static ucontext_t scheduler, contexts[MOST];
static bool finished[MOST];
static int barriers[MOST];
static char stacks[MOST][STACK];
static float exchanged[MOST];
static double exchanged_double[MOST];
static void (*body)();

static void wait() {
    const unsigned self = threadIdx.x;
    barriers[self]++;
    swapcontext(&contexts[self], &scheduler);
}

static void entry() {
    body();
    finished[threadIdx.x] = true;
}

// Runs `threads` fibers from barrier to barrier. All must meet at every barrier, as CUDA asks.
static void run_block(int threads) {
    for (int i = 0; i < threads; i++) {
        finished[i] = false;
        barriers[i] = 0;
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = stacks[i];
        contexts[i].uc_stack.ss_size = STACK;
        contexts[i].uc_link = &scheduler;
        makecontext(&contexts[i], entry, 0);
    }
    for (int left = threads; left;) {
        for (int i = 0; i < threads; i++) {
            if (finished[i]) continue;
            threadIdx.x = i;
            swapcontext(&scheduler, &contexts[i]);
            if (finished[i]) left--;
        }
        for (int i = 1; i < threads; i++)
            if (finished[i] != finished[0] || barriers[i] != barriers[0]) {
                fprintf(stderr, "threads of a block do not meet at a barrier\n");
                abort();
            }
    }
}
}  // namespace fibers

static void __syncthreads() { fibers::wait(); }

static float __shfl_down_sync(unsigned, float value, int distance) {
    fibers::exchanged[threadIdx.x] = value;
    fibers::wait();
    const unsigned from = threadIdx.x + distance;
    const float found = from / 32 == threadIdx.x / 32 ? fibers::exchanged[from] : value;
    fibers::wait();
    return found;
}

static double __shfl_down_sync(unsigned, double value, int distance) {
    fibers::exchanged_double[threadIdx.x] = value;
    fibers::wait();
    const unsigned from = threadIdx.x + distance;
    const double found = from / 32 == threadIdx.x / 32 ? fibers::exchanged_double[from] : value;
    fibers::wait();
    return found;
}

// Global memory, at whole vectors only, as the GPU's.
template <int BYTES> static void load_bytes(const void *from, void *to) {
    if (uintptr_t(from) % BYTES) {
        fprintf(stderr, "a load of %d bytes is off its boundary\n", BYTES);
        abort();
    }
    memcpy(to, from, BYTES);
}
template <int BYTES> static void store_bytes(const void *from, void *to) {
    if (uintptr_t(to) % BYTES) {
        fprintf(stderr, "a store of %d bytes is off its boundary\n", BYTES);
        abort();
    }
    memcpy(to, from, BYTES);
}
