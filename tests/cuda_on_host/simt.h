// Enough of CUDA to run kernels on the CPU: every thread of a block is a fiber, and fibers change only where lanes wait for each other.
// That proves indexing, alignment, bounds (under the sanitizers) and the placing of warp and block barriers, bit for bit; not speed, nor
// memory ordering within a barrier's interval, though fibers run in a different order each round.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr int lanes = 32;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "FAILED: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::exit(1);
}

class Block {
 public:
  static Block*& running() {
    static Block* block = nullptr;
    return block;
  }

  void run(int threads, unsigned round, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    running() = this;
    fibers_.resize(threads);
    warps_.assign((threads + lanes - 1) / lanes, {});
    block_ = {};
    for (int t = 0; t < threads; ++t) start(t);
    int left = threads;
    while (left > 0) {
      bool moved = false;
      for (int i = 0; i < threads; ++i) {
        const int t = round % 2 ? threads - 1 - i : i;  // a missing barrier shows in one order or the other
        Fiber& fiber = fibers_[t];
        if (fiber.done || !ready(fiber)) continue;
        threadIdx = dim3(t);
        current_ = t;
        swapcontext(&scheduler_, &fiber.context);
        moved = true;
        if (fiber.done) --left;
      }
      if (!moved) fail("lanes wait for lanes that never come");
    }
  }

  // Leaves the fiber until all of its warp (or block) have come here.
  void wait(bool whole_block) {
    Fiber& fiber = fibers_[current_];
    Barrier& barrier = whole_block ? block_ : warps_[current_ / lanes];
    const int members = whole_block ? int(fibers_.size()) : lanes;
    fiber.barrier = &barrier;
    fiber.generation = barrier.generation;
    if (++barrier.arrived == members) barrier.arrived = 0, ++barrier.generation;
    while (!ready(fiber)) swapcontext(&fiber.context, &scheduler_);
  }

  // The value that another lane of the warp brings to this same call.
  template <typename T>
  T exchange(T value, int source) {
    static_assert(sizeof(T) <= 8);
    T result;
    exchange(&value, sizeof(T), [&](const auto& slot) { std::memcpy(&result, slot(source), sizeof(T)); });
    return result;
  }

  // A bit for each lane of the warp.
  unsigned ballot(bool predicate) {
    unsigned mask = 0;
    exchange(&predicate, sizeof predicate, [&](const auto& slot) {
      for (int lane = 0; lane < lanes; ++lane) mask |= unsigned(*slot(lane) != 0) << lane;
    });
    return mask;
  }

  int lane() const { return current_ % lanes; }

 private:
  // All lanes bring a value, then all may read those of the others.
  template <typename Read>
  void exchange(const void* value, size_t size, const Read& read) {
    const int first = current_ / lanes * lanes;
    std::memcpy(fibers_[current_].slot, value, size);
    wait(false);
    read([&](int lane) -> const char* { return fibers_[first + lane].slot; });
    wait(false);
  }

  struct Barrier {
    int arrived = 0, generation = 0;
  };
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(32 << 10);
    Barrier* barrier = nullptr;
    int generation = 0;
    bool done = false;
    char slot[8];
  };

  static bool ready(const Fiber& fiber) { return fiber.barrier == nullptr || fiber.barrier->generation != fiber.generation; }

  static void body() {
    Block* block = running();
    (*block->kernel_)();
    block->fibers_[block->current_].done = true;
    swapcontext(&block->fibers_[block->current_].context, &block->scheduler_);
  }

  void start(int t) {
    Fiber& fiber = fibers_[t];
    fiber.barrier = nullptr;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::body, 0);
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Barrier> warps_;
  Barrier block_;
  ucontext_t scheduler_;
  int current_ = 0;
};

// The launcher of core/launch.h, on the CPU. `processors` decides how often kernels loop.
class Launcher {
 public:
  explicit Launcher(int processors) : processors_(processors) {}
  int processors() const { return processors_; }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, Arguments&&... arguments) {
    static Block block;
    gridDim = grid, blockDim = dim3(unsigned(threads));
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y);
        block.run(threads, round_++, [&] { kernel(arguments...); });
      }
  }

  template <typename T>
  T* scratch(int64_t count) {
    scratch_.push_back(std::unique_ptr<char[]>(new char[count * sizeof(T)]));
    std::memset(scratch_.back().get(), 0xa5, count * sizeof(T));
    return reinterpret_cast<T*>(scratch_.back().get());
  }

 private:
  int processors_;
  unsigned round_ = 0;
  std::vector<std::unique_ptr<char[]>> scratch_;
};

}  // namespace simt

inline void __syncwarp() { simt::Block::running()->wait(false); }
inline void __syncthreads() { simt::Block::running()->wait(true); }
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return simt::Block::running()->exchange(value, source % simt::lanes);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simt::Block::running()->exchange(value, simt::Block::running()->lane() ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = simt::Block::running()->lane();
  return simt::Block::running()->exchange(value, lane >= distance ? lane - distance : lane);
}
inline unsigned __ballot_sync(unsigned, bool predicate) { return simt::Block::running()->ballot(predicate); }
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

// Sums and products of floats are exact in double where the kernels use these.
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float toward_zero(double exact) {
  const float nearest = float(exact);
  return std::fabs(double(nearest)) > std::fabs(exact) ? std::nextafterf(nearest, 0.f) : nearest;
}
inline float __fmaf_rz(float a, float b, float c) { return toward_zero(double(a) * double(b) + double(c)); }
inline float __fadd_rz(float a, float b) { return toward_zero(double(a) + double(b)); }
