#include "plan.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "lines.hpp"
#include "xxh3.hpp"

namespace kvstore {
namespace {

using Wide = __int128;  // products of two 64-bit arguments do not overflow in it

constexpr Wide kMaxAddress = Wide{1} << 60;
constexpr std::int64_t kMaxCount = std::int64_t{1} << 31;

[[noreturn]] void reject(const std::string& message) { throw std::invalid_argument(message); }

void check_segment(const Segment& s, const Shape& shape) {
  if (s.heads < 1 || s.channels < 1 || s.heads > kMaxCount || s.channels > kMaxCount) {
    reject("segments: heads and channels must be between 1 and 2**31");
  }
  if (s.slot_offset < 0 || s.slot_token_stride < 0 || s.slot_head_stride < 0 ||
      s.slot_channel_stride < 0) {
    reject("segments: slot_offset and slot strides must not be negative");
  }
  if (s.mem_address == 0) reject("segments: mem_address must not be null");
  if (s.page_stride > kMaxAddress || s.page_stride < -kMaxAddress) {
    reject("segments: page_stride overflows");
  }

  // The lowest and the highest address of an element, relative to the page.
  Wide low = 0, high = 0;
  const auto span = [&](std::int64_t count, std::int64_t stride) {
    const Wide last = Wide{count - 1} * stride;
    (last < 0 ? low : high) += last;
  };
  span(shape.page_tokens, s.token_stride);
  span(s.heads, s.head_stride);
  span(s.channels, s.channel_stride);
  const Wide page_a = Wide{shape.min_page} * s.page_stride;
  const Wide page_b = Wide{shape.max_page} * s.page_stride;
  low += s.mem_address + std::min(page_a, page_b);
  high += s.mem_address + std::max(page_a, page_b) + shape.elem_size;
  if (low < 1 || high > kMaxAddress) reject("segments: mem_address and strides overflow");
}

// The byte after the last one of the segment in the slot.
std::uint64_t slot_end(const Segment& s, const Shape& shape) {
  const Wide end = Wide{s.slot_offset} +
                   (Wide{shape.pages} * shape.page_tokens - 1) * s.slot_token_stride +
                   Wide{s.heads - 1} * s.slot_head_stride +
                   Wide{s.channels - 1} * s.slot_channel_stride + shape.elem_size;
  if (end > kMaxAddress) reject("segments: slot_offset and slot strides overflow");
  return static_cast<std::uint64_t>(end);
}

std::uint64_t segment_bytes(const Segment& s, const Shape& shape) {
  const Wide bytes =
      Wide{shape.pages} * shape.page_tokens * s.heads * s.channels * shape.elem_size;
  if (bytes > kMaxAddress) reject("segments: sizes overflow");
  return static_cast<std::uint64_t>(bytes);
}

// Makes `run` as long as the contiguous dimensions allow and removes them from `loops`.
void coalesce_run(std::vector<Loop>& loops, std::int64_t& run) {
  for (bool grown = true; grown;) {
    grown = false;
    for (std::size_t i = 0; i < loops.size() && !grown; ++i) {
      if (loops[i].mem == run && loops[i].slot == run) {
        run *= loops[i].count;
        loops.erase(loops.begin() + static_cast<std::ptrdiff_t>(i));
        grown = true;
      }
    }
  }
}

// Neighbouring loops that continue each other on both sides become one.
void merge_loops(std::vector<Loop>& loops) {
  for (std::size_t i = 1; i < loops.size();) {
    Loop& out = loops[i - 1];
    const Loop& in = loops[i];
    if (out.mem == in.count * in.mem && out.slot == in.count * in.slot) {
      out = {out.count * in.count, in.mem, in.slot};
      loops.erase(loops.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ++i;
    }
  }
}

// Whether items follow each other in the order of the slot, else of the memory. A checksum needs
// slot order, and runs of whole lines are fastest in it both ways: the slot is linear, while the
// pages are scattered anyway. Shorter runs share lines, so the destination decides.
bool order_by_slot(const Shape& shape, std::int64_t run) {
  return shape.checksum || shape.to_slots || run % static_cast<std::int64_t>(kLine) == 0;
}

SegmentPlan plan_segment(const Segment& s, const Shape& shape) {
  std::vector<Loop> loops;
  for (const Loop& loop : {Loop{shape.page_tokens, s.token_stride, s.slot_token_stride},
                           Loop{s.heads, s.head_stride, s.slot_head_stride},
                           Loop{s.channels, s.channel_stride, s.slot_channel_stride}}) {
    if (loop.count > 1) loops.push_back(loop);
  }
  SegmentPlan plan;
  plan.mem_address = static_cast<std::uint64_t>(s.mem_address);
  plan.slot_offset = static_cast<std::uint64_t>(s.slot_offset);
  plan.page_stride = s.page_stride;
  std::int64_t run = shape.elem_size;
  coalesce_run(loops, run);
  plan.run = static_cast<std::size_t>(run);

  const bool by_slot = order_by_slot(shape, run);
  const auto distance = [&](const Loop& loop) {
    return std::llabs(by_slot ? loop.slot : loop.mem);
  };
  std::stable_sort(loops.begin(), loops.end(), [&](const Loop& a, const Loop& b) {
    return distance(a) > distance(b);
  });
  merge_loops(loops);

  plan.tiled = plan.run < kLine;
  if (plan.tiled && !loops.empty()) {
    plan.tile_inner = loops.back();
    loops.pop_back();
    if (!loops.empty()) {
      // The other dimension of the tile is the one that is nearest to linear in the source.
      const auto nearest = std::min_element(
          loops.begin(), loops.end(), [&](const Loop& a, const Loop& b) {
            return by_slot ? std::llabs(a.mem) < std::llabs(b.mem) : a.slot < b.slot;
          });
      plan.tile_outer = *nearest;
      loops.erase(nearest);
    }
  }
  plan.lines = std::max<std::size_t>(1, plan.run / kLine);

  if (shape.pages > 1) {
    const Loop page{shape.pages, s.page_stride, shape.page_tokens * s.slot_token_stride};
    const auto place = std::find_if(loops.begin(), loops.end(), [&](const Loop& loop) {
      return distance(loop) <= distance(page);
    });
    plan.page_level = static_cast<int>(place - loops.begin());
    loops.insert(place, page);
  }
  if (!loops.empty() && plan.page_level != static_cast<int>(loops.size()) - 1) {
    plan.inner = loops.back();
    loops.pop_back();
  }
  plan.depth = static_cast<int>(loops.size());
  std::copy(loops.begin(), loops.end(), plan.outer);
  return plan;
}

// Whether the items of the segment are whole lines that follow each other in the slot.
bool is_linear(const SegmentPlan& plan) {
  if (plan.tiled || plan.run % kLine != 0) return false;
  auto expected = static_cast<std::int64_t>(plan.run);
  const auto follows = [&](const Loop& loop) {
    const bool fits = loop.count == 1 || loop.slot == expected;
    expected *= loop.count;
    return fits;
  };
  bool linear = follows(plan.inner);
  for (int level = plan.depth - 1; level >= 0; --level) {
    linear = follows(plan.outer[level]) && linear;
  }
  return linear;
}

}  // namespace

Plan make_plan(const Segment* segments, std::size_t count, const Shape& shape) {
  Plan plan;
  plan.to_slots = shape.to_slots;
  std::vector<Segment> ordered(segments, segments + count);
  std::stable_sort(ordered.begin(), ordered.end(), [](const Segment& a, const Segment& b) {
    return a.slot_offset < b.slot_offset;
  });
  plan.linear = true;
  plan.segments.reserve(count);
  for (const Segment& s : ordered) {
    check_segment(s, shape);
    const std::uint64_t bytes = segment_bytes(s, shape);
    plan.object_bytes = std::max(plan.object_bytes, slot_end(s, shape));
    plan.segments.push_back(plan_segment(s, shape));
    const SegmentPlan& last = plan.segments.back();
    plan.linear = plan.linear && last.slot_offset == plan.block_bytes && is_linear(last);
    plan.block_bytes += bytes;
    if (plan.block_bytes > static_cast<std::uint64_t>(kMaxAddress)) {
      reject("segments: sizes overflow");
    }
  }
  plan.linear = plan.linear && plan.object_bytes > kShortHash;
  if (shape.checksum && plan.block_bytes != plan.object_bytes) {
    reject("segments leave holes in the slot (or overlap), so it has no checksum");
  }
  return plan;
}

void Cursor::advance_outer() {
  for (int level = segment_->depth - 1; level >= 0; --level) {
    if (++index_[level] < segment_->outer[level].count) return;
    index_[level] = 0;
  }
  ++segment_;
}

// Finds the position for the current indices, or for the next ones whose page is not skipped.
void Cursor::settle() {
  for (; segment_ != end_; advance_outer()) {
    const SegmentPlan& s = *segment_;
    const std::int64_t page = pages_[s.page_level < 0 ? 0 : index_[s.page_level]];
    if (page < 0) continue;
    std::int64_t mem = page * s.page_stride, slot = 0;
    for (int level = 0; level < s.depth; ++level) {
      if (level != s.page_level) mem += index_[level] * s.outer[level].mem;
      slot += index_[level] * s.outer[level].slot;
    }
    mem_ = s.mem_address + static_cast<std::uint64_t>(mem);
    slot_ = slot_base_ + s.slot_offset + static_cast<std::uint64_t>(slot);
    inner_left_ = s.inner.count;
    return;
  }
}

}  // namespace kvstore
