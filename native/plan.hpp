// How one call of copy_blocks walks over memory pages and slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lines.hpp"

namespace kvstore {

// One row of the `segments` argument: where a (layer, plane) lies in the pages of the engine's
// memory and in a slot. Strides are in bytes.
struct Segment {
  std::int64_t mem_address, page_stride, token_stride, head_stride, channel_stride;
  std::int64_t slot_offset, slot_token_stride, slot_head_stride, slot_channel_stride;
  std::int64_t heads, channels;
};
constexpr std::size_t kSegmentFields = 11;
static_assert(sizeof(Segment) == kSegmentFields * sizeof(std::int64_t));

// The facts about a call that all its segments share.
struct Shape {
  bool to_slots = false;
  bool checksum = false;
  std::int64_t page_tokens = 0;
  std::int64_t elem_size = 0;
  std::int64_t pages = 0;  // pages of a block
  std::int64_t min_page = 0;  // smallest and largest page number in use (skipped ones aside)
  std::int64_t max_page = 0;
};

constexpr std::int64_t kTile = 16;         // rows and columns of runs below a line copied together
constexpr std::size_t kLongRun = 1024;     // runs below it are copied as grids
constexpr std::size_t kMostAhead = 32;     // strips

struct Loop {
  std::int64_t count = 1, mem = 0, slot = 0;  // strides in bytes on both sides
};

// Segments that are alike as nested loops over items: grids of runs, which are copied in strips.
struct SegmentPlan {
  std::uint64_t mem_address = 0, slot_offset = 0;
  std::int64_t page_stride = 0;
  Grid grid;
  std::size_t strips = 1;  // of an item
  std::int64_t rows = 1;   // of a strip, the last one may have less
  std::size_t run = 0;     // bytes of a strip's runs; less than the grid's: parts of a single run
  std::int64_t mem_step = 0, slot_step = 0;  // from strip to strip
  bool swap = false;                         // the order of strips is 1, 0, 3, 2 ...
  Loop outer[5];        // loops over items, outermost first
  int depth = 0;        // loops in use
  int page_level = -1;  // the loop over pages, -1: one page
};

struct Plan {
  std::vector<SegmentPlan> segments;  // in slot order, as far as they do not lie interleaved
  bool to_slots = false;
  std::uint64_t block_bytes = 0;  // moved per block
  std::uint64_t object_bytes = 0;  // end of the last segment in the slot
  // The runs follow each other in the slot without a gap, in whole 64-byte lines, so that the
  // hash of the slot can be computed while copying.
  bool linear = false;
  // How many strips ahead of the copy sources are prefetched, and looked up first of all: what
  // the processor needs to find a page, and to see that another stream begins, takes longest.
  std::size_t near = 1, far = 1;
};

// Throws std::invalid_argument for segments that make no sense: sizes below 1, negative slot
// offsets or strides, addresses that overflow, and holes if a checksum is wanted.
Plan make_plan(const Segment* segments, std::size_t count, const Shape& shape);

// Walks over the strips of one block in the order of the plan, past skipped pages (-1).
class Cursor {
 public:
  Cursor(const Plan& plan, const std::int64_t* pages, std::uint64_t slot)
      : pages_(pages), slot_base_(slot), segment_(plan.segments.data()),
        end_(segment_ + plan.segments.size()), to_slots_(plan.to_slots) {
    settle();
  }

  bool done() const { return segment_ == end_; }
  Strip next();

 private:
  void advance();
  void settle();

  const std::int64_t* pages_;
  std::uint64_t slot_base_;
  const SegmentPlan* segment_;
  const SegmentPlan* end_;
  bool to_slots_;
  std::int64_t index_[5] = {};
  std::size_t strip_ = 0;  // of the item
  std::uint64_t mem_ = 0, slot_ = 0;
};

}  // namespace kvstore
