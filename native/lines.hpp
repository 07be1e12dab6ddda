// Kernels over 64-byte lines: copy with non-temporal stores, hash, or both in one pass.
#pragma once

#include <cstddef>
#include <cstdint>

#include "xxh3.hpp"

namespace kvstore {

constexpr std::size_t kLine = 64;
constexpr unsigned kStripesPerBlock = 16;  // of XXH3 with its default secret
constexpr std::size_t kAhead = 4096;       // how far linear data is prefetched

// Runs of bytes in rows and columns, the same on both sides; a single run is a grid of 1 x 1.
struct Grid {
  std::int64_t rows = 1, columns = 1;
  std::size_t run = 0;  // bytes
  std::int64_t dst_row = 0, src_row = 0, dst_column = 0, src_column = 0;  // strides in bytes
};

// The part of a grid that is copied at a time: so many rows of it, or bytes of a single run.
struct Strip {
  std::uint8_t* dst;
  const std::uint8_t* src;
  const Grid* grid;
  std::int64_t rows;
  std::size_t run;
};

struct LineKernels {
  // Processes a strip whose runs are whole lines. For each line it also prefetches the one that
  // lies at the same place of a strip at `ahead`: anywhere, a prefetch does not fault. Kernels
  // that do not hash ignore `state`, the one that does not copy `dst`.
  using Kernel = void (*)(Xxh3State* state, const Strip& strip, const std::uint8_t* ahead);
  Kernel stream;       // copy; all of dst must lie at multiples of 64
  Kernel hash;         // hash
  Kernel hash_stream;  // copy and hash; dst as for stream
  Kernel hash_store;   // copy and hash with ordinary stores, any dst
};

// A kernel over a single run of `lines` lines.
void run_kernel(LineKernels::Kernel kernel, Xxh3State* state, std::uint8_t* dst,
                const std::uint8_t* src, std::size_t lines, const std::uint8_t* ahead);

// The kernels for this processor.
const LineKernels& line_kernels();

// Orders the non-temporal stores of this thread before everything that follows.
void store_fence();

inline bool is_line_start(const std::uint8_t* p) {
  return reinterpret_cast<std::uintptr_t>(p) % kLine == 0;
}

}  // namespace kvstore
