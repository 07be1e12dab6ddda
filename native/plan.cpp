#include "plan.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>

#include "lines.hpp"
#include "xxh3.hpp"

namespace kvstore {
namespace {

using Wide = __int128;  // products of two 64-bit arguments do not overflow in it

constexpr Wide kMaxAddress = Wide{1} << 60;
constexpr std::int64_t kMaxCount = std::int64_t{1} << 31;
constexpr auto kLineBytes = static_cast<std::int64_t>(kLine);
// Large enough that the processor's own prefetching pays, small enough that two strips stay in
// the first-level cache.
constexpr std::int64_t kStrip = 8192;

[[noreturn]] void reject(const std::string& message) { throw std::invalid_argument(message); }

// The loops over the tokens of a page, heads and channels.
std::array<Loop, 3> loops_of(const Segment& s, const Shape& shape) {
  return {{{shape.page_tokens, s.token_stride, s.slot_token_stride},
           {s.heads, s.head_stride, s.slot_head_stride},
           {s.channels, s.channel_stride, s.slot_channel_stride}}};
}

// The byte after the last one of the segment in the slot.
std::uint64_t checked_end(const Segment& s, const Shape& shape) {
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

  // The lowest and the highest address of an element.
  const Wide page_a = Wide{shape.min_page} * s.page_stride;
  const Wide page_b = Wide{shape.max_page} * s.page_stride;
  Wide low = s.mem_address + std::min(page_a, page_b);
  Wide high = s.mem_address + std::max(page_a, page_b) + shape.elem_size;
  Wide slot_end = Wide{s.slot_offset} + shape.elem_size +
                  Wide{shape.pages - 1} * shape.page_tokens * s.slot_token_stride;
  for (const Loop& loop : loops_of(s, shape)) {
    const Wide last = Wide{loop.count - 1} * loop.mem;
    (last < 0 ? low : high) += last;
    slot_end += Wide{loop.count - 1} * loop.slot;
  }
  if (low < 1 || high > kMaxAddress) reject("segments: mem_address and strides overflow");
  if (slot_end > kMaxAddress) reject("segments: slot_offset and slot strides overflow");
  return static_cast<std::uint64_t>(slot_end);
}

std::uint64_t segment_bytes(const Segment& s, const Shape& shape) {
  const Wide bytes =
      Wide{shape.pages} * shape.page_tokens * s.heads * s.channels * shape.elem_size;
  if (bytes > kMaxAddress) reject("segments: sizes overflow");
  return static_cast<std::uint64_t>(bytes);
}

// Makes `run` as long as the contiguous dimensions allow and removes them from `loops`.
void coalesce_run(std::vector<Loop>& loops, std::int64_t& run) {
  for (auto loop = loops.begin(); loop != loops.end();) {
    if (loop->mem == run && loop->slot == run) {
      run *= loop->count;
      loops.erase(loop);
      loop = loops.begin();
    } else {
      ++loop;
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
// slot order. Short runs of whole lines are fastest in the order of the source: reads profit from
// neighbours, streamed lines go anywhere. Long ones have enough in themselves, and the pages are
// scattered anyway. Runs that share lines are written in the order of the destination.
bool order_by_slot(const Shape& shape, std::int64_t run) {
  if (shape.checksum) return true;
  if (run % kLineBytes != 0) return shape.to_slots;
  return !shape.to_slots || run >= static_cast<std::int64_t>(kLongRun);
}

// Into how many equal parts to divide `total`: `least` or some more, or `least` unequal ones.
std::int64_t equal_parts(std::int64_t total, std::int64_t least, std::int64_t step) {
  const std::int64_t most = std::min(2 * least, least + 8 * step);
  for (std::int64_t parts = least; parts <= most; parts += step) {
    if (total % parts == 0) return parts;
  }
  return least;
}

std::int64_t divided(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Divides the items of a segment into strips: grids between rows, single runs between lines.
void cut(SegmentPlan& plan, const Loop& rows, bool swap) {
  const Grid& grid = plan.grid;
  const auto run = static_cast<std::int64_t>(grid.run);
  std::int64_t strips = divided(grid.rows * grid.columns * run, kStrip);
  if (grid.rows > 1) {
    if (run < kLineBytes) strips = std::min(strips, divided(grid.rows, kTile));
    strips = equal_parts(grid.rows, std::min(strips, grid.rows), 1);
    plan.rows = divided(grid.rows, strips);
    plan.strips = static_cast<std::size_t>(divided(grid.rows, plan.rows));
    plan.mem_step = plan.rows * rows.mem;
    plan.slot_step = plan.rows * rows.slot;
  } else if (run >= kStrip / 2) {
    // Pairs of strips that follow each other in memory, the second one first: so a gather never
    // reads up to where its run ends, and the processor's prefetching beyond it is not in vain.
    const std::int64_t lines = divided(run, kLineBytes);
    strips = equal_parts(lines, (strips + 1) / 2 * 2, 2);
    plan.mem_step = plan.slot_step = divided(lines, strips) * kLineBytes;
    plan.run = static_cast<std::size_t>(plan.mem_step);
    plan.strips = static_cast<std::size_t>(divided(run, plan.mem_step));
    plan.swap = swap;
  }
}

// The segments from `first` on that are alike and equally far apart on both sides, as a loop.
Loop planes_from(const std::vector<Segment>& segments, std::size_t first) {
  Loop planes;
  for (std::size_t i = first + 1; i < segments.size(); ++i, ++planes.count) {
    const Segment &a = segments[i - 1], &b = segments[i];
    const Loop apart{0, b.mem_address - a.mem_address, b.slot_offset - a.slot_offset};
    const auto shape = [](const Segment& s) {
      return std::tie(s.page_stride, s.token_stride, s.head_stride, s.channel_stride,
                      s.slot_token_stride, s.slot_head_stride, s.slot_channel_stride, s.heads,
                      s.channels);
    };
    if (shape(a) != shape(b)) break;
    if (planes.count == 1) planes.mem = apart.mem, planes.slot = apart.slot;
    if (planes.mem != apart.mem || planes.slot != apart.slot) break;
  }
  return planes;
}

SegmentPlan plan_segment(const Segment& s, const Loop& planes, const Shape& shape) {
  std::vector<Loop> loops{planes};
  for (const Loop& loop : loops_of(s, shape)) loops.push_back(loop);
  const auto once = [](const Loop& loop) { return loop.count == 1; };
  loops.erase(std::remove_if(loops.begin(), loops.end(), once), loops.end());
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

  const Loop page{shape.pages, s.page_stride, shape.page_tokens * s.slot_token_stride};
  const bool below_line = run < kLineBytes;
  const auto inside = [&] {  // the first loop inside that over the pages
    return std::find_if(loops.begin(), loops.end(), [&](const Loop& loop) {
      return shape.pages == 1 || below_line || distance(loop) <= distance(page);
    });
  };
  // One or two loops make up a grid. Its columns advance least in the order that was chosen, its
  // rows on the other side, unless a checksum needs the order.
  Loop rows, columns;
  if (run < static_cast<std::int64_t>(kLongRun) && inside() != loops.end()) {
    rows = loops.back();
    loops.pop_back();
    if ((below_line || rows.count * run < kStrip) && inside() != loops.end()) {
      columns = rows;
      const auto nearest =
          std::min_element(inside(), loops.end(), [&](const Loop& a, const Loop& b) {
            return by_slot && !shape.checksum ? std::llabs(a.mem) < std::llabs(b.mem)
                                              : a.slot < b.slot;
          });
      rows = *nearest;
      loops.erase(nearest);
    }
  }
  const bool to_slots = shape.to_slots;
  plan.grid = {rows.count, columns.count, plan.run,
               to_slots ? rows.slot : rows.mem, to_slots ? rows.mem : rows.slot,
               to_slots ? columns.slot : columns.mem, to_slots ? columns.mem : columns.slot};
  cut(plan, rows, to_slots && !shape.checksum);

  if (shape.pages > 1) {
    const auto place = inside();
    plan.page_level = static_cast<int>(place - loops.begin());
    loops.insert(place, page);
  }
  plan.depth = static_cast<int>(loops.size());
  std::copy(loops.begin(), loops.end(), plan.outer);
  return plan;
}

// Whether the items of the segment are whole lines that follow each other in the slot.
bool is_linear(const SegmentPlan& plan, bool to_slots) {
  auto expected = static_cast<std::int64_t>(plan.grid.run);
  bool linear = plan.grid.run % kLine == 0;
  const auto follows = [&](std::int64_t count, std::int64_t slot) {
    linear = linear && (count == 1 || slot == expected);
    expected *= count;
  };
  const Grid& grid = plan.grid;
  follows(grid.columns, to_slots ? grid.dst_column : grid.src_column);
  follows(grid.rows, to_slots ? grid.dst_row : grid.src_row);
  for (int level = plan.depth - 1; level >= 0; --level) {
    follows(plan.outer[level].count, plan.outer[level].slot);
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
  for (const Segment& s : ordered) {
    plan.object_bytes = std::max(plan.object_bytes, checked_end(s, shape));
    plan.block_bytes += segment_bytes(s, shape);
    if (plan.block_bytes > static_cast<std::uint64_t>(kMaxAddress)) {
      reject("segments: sizes overflow");
    }
  }
  plan.linear = true;
  std::uint64_t end = 0;  // in the slot, as long as there are no holes
  std::size_t strips = 0;
  for (std::size_t i = 0; i < count;) {
    const Segment& s = ordered[i];
    const Loop planes = planes_from(ordered, i);
    plan.segments.push_back(plan_segment(s, planes, shape));
    const SegmentPlan& last = plan.segments.back();
    plan.linear = plan.linear && last.slot_offset == end && is_linear(last, shape.to_slots);
    end += segment_bytes(s, shape) * static_cast<std::uint64_t>(planes.count);
    std::size_t items = last.strips;
    for (const Loop& loop : last.outer) items *= static_cast<std::size_t>(loop.count);
    strips += items;
    i += static_cast<std::size_t>(planes.count);
  }
  plan.linear = plan.linear && plan.object_bytes > kShortHash;
  const std::uint64_t strip = std::max<std::uint64_t>(1, plan.block_bytes / strips);
  plan.near = std::clamp<std::size_t>(kStrip / strip, 1, kMostAhead / 2);
  plan.far = std::clamp<std::size_t>(2 * kStrip / strip, plan.near, kMostAhead);
  if (shape.checksum && plan.block_bytes != plan.object_bytes) {
    reject("segments leave holes in the slot (or overlap), so it has no checksum");
  }
  return plan;
}

Strip Cursor::next() {
  const SegmentPlan& s = *segment_;
  std::size_t strip = strip_;
  if (s.swap && (strip ^ 1) < s.strips) strip ^= 1;
  const auto n = static_cast<std::int64_t>(strip);
  auto* mem = reinterpret_cast<std::uint8_t*>(mem_ + static_cast<std::uint64_t>(n * s.mem_step));
  auto* slot = reinterpret_cast<std::uint8_t*>(slot_ + static_cast<std::uint64_t>(n * s.slot_step));
  Strip result{to_slots_ ? slot : mem, to_slots_ ? mem : slot, &s.grid, s.rows, s.run};
  if (s.run < s.grid.run) {
    result.run = std::min(s.run, s.grid.run - strip * s.run);
  } else {
    result.rows = std::min(s.rows, s.grid.rows - n * s.rows);
  }
  if (++strip_ == s.strips) {
    strip_ = 0;
    advance();
    settle();
  }
  return result;
}

void Cursor::advance() {
  for (int level = segment_->depth - 1; level >= 0; --level) {
    if (++index_[level] < segment_->outer[level].count) return;
    index_[level] = 0;
  }
  ++segment_;
}

// Finds the position for the current indices, or for the next ones whose page is not skipped.
void Cursor::settle() {
  for (; segment_ != end_; advance()) {
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
    return;
  }
}

}  // namespace kvstore
