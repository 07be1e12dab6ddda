// Copies between memory ranges, and between an engine's pages and slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "plan.hpp"
#include "xxh3.hpp"

namespace kvstore {

// Copies `size` bytes between ranges that do not overlap.
void linear_copy(std::uint8_t* dst, const std::uint8_t* src, std::size_t size, unsigned threads);

// Copies `blocks` blocks. Row b of `pages` (plan's pages per block each) names the pages of the
// block whose slot is at slots[b]. Writes the XXH3 of each slot to `hashes` unless it is null.
void copy_blocks(const Plan& plan, const std::int64_t* pages, std::size_t pages_per_block,
                 const std::uint64_t* slots, std::size_t blocks, unsigned threads,
                 std::uint64_t* hashes);

// One block of a linear plan, none of whose pages is skipped, on its way through a buffer that is
// smaller than it and stays in the caches: piece by piece, each a whole number of strips.
class BlockStream {
 public:
  static constexpr std::size_t kLeast = 1 << 16;  // bytes that every buffer has

  // Whether a plan can be streamed at all.
  static bool fits(const Plan& plan);

  BlockStream(Plan plan, std::vector<std::int64_t> pages)
      : plan_(std::move(plan)), pages_(std::move(pages)), cursor_(plan_, pages_.data(), 0) {}
  BlockStream(const BlockStream&) = delete;
  BlockStream& operator=(const BlockStream&) = delete;

  // How large the next piece is in a buffer of so many bytes (kLeast or more); 0 at the end.
  std::size_t next(std::size_t capacity);
  // Copies that piece between the pages and `buffer`, and hashes it. After `next`.
  void take(std::uint8_t* buffer);
  // The XXH3 of the block, at the end.
  std::uint64_t digest() const { return xxh3_finish(state_, plan_.object_bytes, last_); }

 private:
  Plan plan_;
  std::vector<std::int64_t> pages_;
  Cursor cursor_;
  std::vector<Strip> strips_;  // of the piece, and one beyond it
  std::size_t count_ = 0;      // of the piece
  std::size_t done_ = 0, piece_ = 0;  // bytes before the piece, and of it
  Xxh3State state_;
  std::uint8_t last_[kLine] = {};
};

}  // namespace kvstore
