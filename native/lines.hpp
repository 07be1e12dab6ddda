// Kernels over 64-byte lines: copy with non-temporal stores, hash, or both in one pass.
#pragma once

#include <cstddef>
#include <cstdint>

#include "xxh3_core.hpp"

namespace kvstore {

constexpr std::size_t kLine = 64;
// How far ahead of the copy the source is prefetched: enough to hide the latency of DRAM, and
// little enough to survive in the first-level cache until it is read.
constexpr std::size_t kPrefetchBytes = 4096;

struct LineKernels {
  // Processes `lines` lines of `src`. For each line it also prefetches one line of `ahead`, which
  // may point anywhere: a prefetch does not fault. Kernels that do not hash ignore `state`,
  // the one that does not copy `dst`, and `stream` also `ahead`.
  using Kernel = void (*)(Xxh3State* state, std::uint8_t* dst, const std::uint8_t* src,
                          std::size_t lines, const std::uint8_t* ahead);
  Kernel stream;        // copy; dst must be a multiple of 64
  Kernel stream_ahead;  // the same with prefetching
  Kernel hash;          // hash
  Kernel hash_stream;   // copy and hash; dst must be a multiple of 64
  Kernel hash_store;    // copy and hash with ordinary stores, any dst
};

// The kernels for this processor.
const LineKernels& line_kernels();

// Orders the non-temporal stores of this thread before everything that follows.
void store_fence();

inline bool is_line_start(const std::uint8_t* p) {
  return reinterpret_cast<std::uintptr_t>(p) % kLine == 0;
}

}  // namespace kvstore
