// Implicit GEMM on tensor cores: what binary and integer layers share. K counts words of 32 bits: 32 signs or 4 bytes of a pixel.
#pragma once

#include <algorithm>
#include <bit>

#include "../core/divider.h"
#include "../core/warp.cuh"

namespace quantize::packed {

struct MmaTraits {
  static constexpr int threads = 128, warps_down = 2, warps_across = 2;
  static constexpr int step_words = 16, mma_words = 8;  // of K: of a step of the pipeline, of an instruction
  static constexpr int pitch = 20;                      // words of a row in shared memory: 8 rows of 16 bytes meet all banks once
  static constexpr int stages = 3;
};

// Rows of output pixels by columns of output channels; a warp's share in fragments of 16 and of 8.
template <int down, int across>
struct TileShape {
  static constexpr int warp_m = down, warp_n = across;
  static constexpr int m = MmaTraits::warps_down * warp_m * 16, n = MmaTraits::warps_across * warp_n * 8;
  static constexpr int stage = (m + n) * MmaTraits::pitch, dots_pitch = n + 1;
  static constexpr int memory = std::max(MmaTraits::stages * stage, m* dots_pitch);
};
using WideTile = TileShape<4, 4>;
using SmallTile = TileShape<1, 2>;

struct TileDividers {
  Divider out_pixels, out_width, tap_words, kernel_width;
};

// ---- Instructions; on the CPU, lanes exchange what the hardware would.

// `words` of them from global to shared memory, or zeros.
template <int words>
QUANTIZE_DEVICE void copy_words(uint32_t* target, const uint32_t* source, bool inside) {
#ifdef __CUDA_ARCH__
  const uint32_t address = uint32_t(__cvta_generic_to_shared(target));
  const int bytes = inside ? words * 4 : 0;
  if constexpr (words == 4)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
  else if constexpr (words == 2)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
#else
  for (int i = 0; i < words; ++i) target[i] = inside ? source[i] : 0;
#endif
}
QUANTIZE_DEVICE void commit_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until all but the last `left` groups have arrived.
template <int left>
QUANTIZE_DEVICE void wait_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#endif
}

// Four matrices of 8 rows by 4 words. Lanes 8j to 8j + 7 name the rows of matrix j; lane 4r + i gets word i of row r of each.
QUANTIZE_DEVICE void load_matrices(uint32_t (&words)[4], const uint32_t* row) {
#ifdef __CUDA_ARCH__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#else
  __shared__ const uint32_t* rows[MmaTraits::threads];
  const int lane = threadIdx.x % Warp::lanes;
  rows[threadIdx.x] = row;
  __syncwarp();
  for (int j = 0; j < 4; ++j) words[j] = rows[threadIdx.x - lane + 8 * j + lane / 4][lane % 4];
  __syncwarp();
#endif
}

// Products of 16 x 8 outputs over 8 words of K, added to c. Words of a: rows lane / 4 and 8 below, then the same of K's second half, word
// lane % 4 of each half; of b: column lane / 4 likewise. c: rows lane / 4 and 8 below, columns lane % 4 * 2 and the next.
#ifndef __CUDA_ARCH__
template <typename Dot>
QUANTIZE_DEVICE void multiply_on_host(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Dot& dot) {
  __shared__ uint32_t all[MmaTraits::threads][6];
  const int lane = threadIdx.x % Warp::lanes;
  auto* warp = all + threadIdx.x - lane;
  std::copy_n(a, 4, warp[lane]);
  warp[lane][4] = b0, warp[lane][5] = b1;
  __syncwarp();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 8; ++k)
      c[i] += dot(warp[lane / 4 * 4 + k % 4][k / 4 * 2 + i / 2], warp[(lane % 4 * 2 + i % 2) * 4 + k % 4][4 + k / 4]);
  __syncwarp();
}
#endif

// popcount(a & b) of 256 bits.
QUANTIZE_DEVICE void multiply_bits(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDA_ARCH__
  asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  multiply_on_host(c, a, b0, b1, [](uint32_t x, uint32_t y) { return std::popcount(x & y); });
#endif
}

// A word's four unsigned bytes by four signed ones, added up.
QUANTIZE_DEVICE int32_t dot_bytes(uint32_t a, uint32_t b, int32_t sum) {
#ifdef __CUDA_ARCH__
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
  return sum;
#else
  for (int i = 0; i < 32; i += 8) sum += int(a >> i & 255) * int8_t(b >> i & 255);
  return sum;
#endif
}

// a * b of 32 bytes, a's unsigned, b's signed.
QUANTIZE_DEVICE void multiply_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDA_ARCH__
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  multiply_on_host(c, a, b0, b1, [](uint32_t x, uint32_t y) { return dot_bytes(x, y, 0); });
#endif
}

// ---- A block's products.

// A thread's place in a warp's fragments.
template <typename Tile>
struct Fragments {
  int lane = threadIdx.x % Warp::lanes;
  int row = threadIdx.x / Warp::lanes / MmaTraits::warps_across * Tile::warp_m * 16;
  int column = threadIdx.x / Warp::lanes % MmaTraits::warps_across * Tile::warp_n * 8;

  // to(row, column, i, j, e) of each number c[i][j][e] that the thread has.
  template <typename To>
  QUANTIZE_DEVICE void each(const To& to) const {
#pragma unroll
    for (int i = 0; i < Tile::warp_m; ++i)
#pragma unroll
      for (int j = 0; j < Tile::warp_n; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) to(row + i * 16 + e / 2 * 8 + lane / 4, column + j * 8 + lane % 4 * 2 + e % 2, i, j, e);
  }
};

// `words` of K through `memory`, Tile::memory words of shared memory of which none is in use, and none is when it returns. V: words of a
// copy, 1, 2 or 4. place(k) is what inputs(row, place) and weights(column, place) are asked of, V words there; they answer with a pointer,
// or null for zeros. anything: some global memory. multiply(i, a, b): the fragment i of rows, and word pairs b[j] of the fragments of
// columns.
template <typename Tile, int V, typename Place, typename Inputs, typename Weights, typename Multiply>
QUANTIZE_DEVICE void multiply_tile(uint32_t* memory, int words, const uint32_t* anything, const Place& place, const Inputs& inputs,
                                   const Weights& weights, const Multiply& multiply) {
  using T = MmaTraits;
  constexpr int copies = T::step_words / V, apart = T::threads / copies;  // of a row; rows copied at once
  static_assert(Tile::m % apart == 0 && Tile::n % apart == 0);
  const int own_row = threadIdx.x / copies, own_word = threadIdx.x % copies * V;
  const auto load = [&](int step) {
    uint32_t* target = memory + step % T::stages * Tile::stage + own_row * T::pitch + own_word;
    const int k = step * T::step_words + own_word;
    const bool some = k < words;
    const auto at = place(some ? k : 0);
#pragma unroll
    for (int i = 0; i < Tile::m / apart; ++i) {
      const uint32_t* source = some ? inputs(own_row + i * apart, at) : nullptr;
      copy_words<V>(target + i * apart * T::pitch, source ? source : anything, source != nullptr);
    }
#pragma unroll
    for (int i = 0; i < Tile::n / apart; ++i) {
      const uint32_t* source = some ? weights(own_row + i * apart, at) : nullptr;
      copy_words<V>(target + (Tile::m + i * apart) * T::pitch, source ? source : anything, source != nullptr);
    }
  };
  const Fragments<Tile> own;
  const int steps = (words + T::step_words - 1) / T::step_words;
#pragma unroll
  for (int step = 0; step < T::stages - 1; ++step) {
    if (step < steps) load(step);
    commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    wait_copies<T::stages - 2>();
    __syncthreads();  // and all are through with the stage that is loaded next
    if (step + T::stages - 1 < steps) load(step + T::stages - 1);
    commit_copies();
    const uint32_t* stage = memory + step % T::stages * Tile::stage;
    const uint32_t* a_row = stage + (own.row + own.lane % 16) * T::pitch + own.lane / 16 * 4;
    const uint32_t* b_row = stage + (Tile::m + own.column + own.lane / 16 * 8 + own.lane % 8) * T::pitch + own.lane / 8 % 2 * 4;
#pragma unroll
    for (int k = 0; k < T::step_words; k += T::mma_words) {
      if (step * T::step_words + k >= words) break;
      uint32_t b[Tile::warp_n / 2][4];
#pragma unroll
      for (int j = 0; j < Tile::warp_n / 2; ++j) load_matrices(b[j], b_row + j * 16 * T::pitch + k);
#pragma unroll
      for (int i = 0; i < Tile::warp_m; ++i) {
        uint32_t a[4];
        load_matrices(a, a_row + i * 16 * T::pitch + k);
        multiply(i, a, b);
      }
    }
  }
  wait_copies<0>();
  __syncthreads();
}

}  // namespace quantize::packed
