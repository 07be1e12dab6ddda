// Copies between memory ranges, and between an engine's pages and slots.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.hpp"

namespace kvstore {

// Copies `size` bytes between ranges that do not overlap.
void linear_copy(std::uint8_t* dst, const std::uint8_t* src, std::size_t size, unsigned threads);

// Copies `blocks` blocks. Row b of `pages` (plan's pages per block each) names the pages of the
// block whose slot is at slots[b]. Writes the XXH3 of each slot to `hashes` unless it is null.
void copy_blocks(const Plan& plan, const std::int64_t* pages, std::size_t pages_per_block,
                 const std::uint64_t* slots, std::size_t blocks, unsigned threads,
                 std::uint64_t* hashes);

}  // namespace kvstore
