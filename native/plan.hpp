// How one call of copy_blocks walks over memory pages and slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

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
  std::int64_t pages = 0;  // pages of a block
  std::int64_t page_tokens = 0;
  std::int64_t elem_size = 0;
  std::int64_t min_page = 0;  // smallest and largest page number in use (skipped ones aside)
  std::int64_t max_page = 0;
};

struct Loop {
  std::int64_t count = 1, mem = 0, slot = 0;  // strides in bytes on both sides
};

// A segment as nested loops over items. An item is one run of bytes that is contiguous on both
// sides, or a two-dimensional tile of short runs.
struct SegmentPlan {
  std::uint64_t mem_address = 0, slot_offset = 0;
  std::int64_t page_stride = 0;
  std::size_t run = 0;
  bool tiled = false;
  Loop tile_outer, tile_inner;  // inner: the one that advances least in the destination
  Loop outer[3];                // outermost first
  int depth = 0;                // loops in use
  int page_level = -1;          // the loop over pages, -1: one page
  Loop inner;                   // innermost, never over pages
  std::size_t lines = 1;        // what an item counts for in prefetching
};

struct Plan {
  std::vector<SegmentPlan> segments;  // in slot order
  bool to_slots = false;
  std::uint64_t block_bytes = 0;  // moved per block
  std::uint64_t object_bytes = 0;  // end of the last segment in the slot
  // The runs follow each other in the slot without a gap, in whole 64-byte lines, so that the
  // hash of the slot can be computed while copying.
  bool linear = false;
};

// Throws std::invalid_argument for segments that make no sense: sizes below 1, negative slot
// offsets or strides, addresses that overflow, and holes if a checksum is wanted.
Plan make_plan(const Segment* segments, std::size_t count, const Shape& shape);

// Walks over the items of one block in the order of the plan, past skipped pages (-1).
class Cursor {
 public:
  Cursor(const Plan& plan, const std::int64_t* pages, std::uint64_t slot)
      : pages_(pages), slot_base_(slot), segment_(plan.segments.data()),
        end_(segment_ + plan.segments.size()) {
    settle();
  }

  bool done() const { return segment_ == end_; }
  const SegmentPlan& segment() const { return *segment_; }
  std::uint8_t* mem() const { return reinterpret_cast<std::uint8_t*>(mem_); }
  std::uint8_t* slot() const { return reinterpret_cast<std::uint8_t*>(slot_); }

  void next() {
    if (--inner_left_ > 0) {
      mem_ += static_cast<std::uint64_t>(segment_->inner.mem);
      slot_ += static_cast<std::uint64_t>(segment_->inner.slot);
    } else {
      advance_outer();
      settle();
    }
  }

 private:
  void advance_outer();
  void settle();

  const std::int64_t* pages_;
  std::uint64_t slot_base_;
  const SegmentPlan* segment_;
  const SegmentPlan* end_;
  std::int64_t index_[3] = {};
  std::int64_t inner_left_ = 0;
  std::uint64_t mem_ = 0, slot_ = 0;
};

}  // namespace kvstore
