#include "copy.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <utility>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "lines.hpp"
#include "parallel.hpp"
#include "xxh3.hpp"

namespace kvstore {
namespace {

constexpr std::size_t kCopyPiece = 2 << 20;  // unit of work of a linear copy
constexpr std::size_t kTouched = 2;          // lines that tell of a new stream

// Bytes up to the next line start.
std::size_t bytes_to_line(const std::uint8_t* p) {
  return -reinterpret_cast<std::uintptr_t>(p) % kLine;
}

// Whether the runs of a strip are whole lines in the destination.
bool whole_lines(const Strip& strip) {
  const Grid& grid = *strip.grid;
  const auto strides = grid.dst_row | grid.dst_column | static_cast<std::int64_t>(strip.run);
  return is_line_start(strip.dst) && strides % static_cast<std::int64_t>(kLine) == 0;
}

// Whether the lines of one strip lie to its begin about as those of the other.
bool alike(const Strip& a, const Strip& b) {
  const Grid &x = *a.grid, &y = *b.grid;
  const std::size_t size_a = static_cast<std::size_t>(a.rows) * a.run;
  const std::size_t size_b = static_cast<std::size_t>(b.rows) * b.run;
  return size_a <= 2 * size_b && size_b <= 2 * size_a && x.columns == y.columns &&
         x.run == y.run && x.src_row == y.src_row && x.src_column == y.src_column;
}

void prefetch(const Strip& strip) {
  const Grid& grid = *strip.grid;
  if (strip.run < kLine) return __builtin_prefetch(strip.src, 0, 0);  // lines are shared
  for (std::int64_t row = 0; row < strip.rows; ++row) {
    for (std::int64_t column = 0; column < grid.columns; ++column) {
      const std::uint8_t* src = strip.src + row * grid.src_row + column * grid.src_column;
      for (std::size_t i = 0; i < strip.run; i += kLine) __builtin_prefetch(src + i, 0, 0);
    }
  }
}

#if defined(__x86_64__)  // SSE2 is part of the base architecture

// The lower or higher halves of two vectors, run by run in turn.
template <std::size_t kRun, bool kHigh>
__m128i zip(__m128i a, __m128i b) {
  if constexpr (kRun == 1) return kHigh ? _mm_unpackhi_epi8(a, b) : _mm_unpacklo_epi8(a, b);
  if constexpr (kRun == 2) return kHigh ? _mm_unpackhi_epi16(a, b) : _mm_unpacklo_epi16(a, b);
  if constexpr (kRun == 4) return kHigh ? _mm_unpackhi_epi32(a, b) : _mm_unpacklo_epi32(a, b);
}

// Copies a grid that is a matrix to be transposed, its runs side by side along one direction in the
// source and along the other in the destination: in vectors, and whole lines that are streamed.
// False: it is none. Meanwhile it prefetches what lies at the same places of a strip at `ahead`.
template <std::size_t kRun>
bool transpose(const Strip& strip, const std::uint8_t* ahead) {
  constexpr std::int64_t kWidth = kRun, kLanes = sizeof(__m128i) / kRun;
  constexpr std::int64_t kParts = kLine / sizeof(__m128i);
  Grid grid = *strip.grid;
  grid.rows = strip.rows;
  if (grid.src_column == kWidth && grid.dst_row == kWidth) {
    std::swap(grid.rows, grid.columns);
    std::swap(grid.src_row, grid.src_column);
    std::swap(grid.dst_row, grid.dst_column);
  }
  if (grid.src_row != kWidth || grid.dst_column != kWidth || grid.rows % kLanes != 0 ||
      grid.columns % (kParts * kLanes) != 0 || grid.dst_row % static_cast<std::int64_t>(kLine) != 0 ||
      !is_line_start(strip.dst)) {
    return false;
  }
  const std::ptrdiff_t lead = ahead - strip.src;
  for (std::int64_t row = 0; row < grid.rows; row += kLanes) {
    const std::int64_t turn = row / kLanes % kParts;  // each line of the source once
    for (std::int64_t column = 0; column < grid.columns; column += kParts * kLanes) {
      __m128i lines[kLanes][kParts];
      for (std::int64_t part = 0; part < kParts; ++part) {
        const std::uint8_t* src =
            strip.src + row * kWidth + (column + part * kLanes) * grid.src_column;
        __m128i lanes[kLanes], zipped[kLanes];
        for (std::int64_t i = 0; i < kLanes; ++i, src += grid.src_column) {
          if (part == turn) __builtin_prefetch(src + lead, 0, 3);
          lanes[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
        }
        for (std::int64_t done = 1; done < kLanes; done *= 2) {
          for (std::int64_t i = 0; i < kLanes / 2; ++i) {
            zipped[2 * i] = zip<kRun, false>(lanes[i], lanes[i + kLanes / 2]);
            zipped[2 * i + 1] = zip<kRun, true>(lanes[i], lanes[i + kLanes / 2]);
          }
          std::copy(zipped, zipped + kLanes, lanes);
        }
        for (std::int64_t i = 0; i < kLanes; ++i) lines[i][part] = lanes[i];
      }
      for (std::int64_t i = 0; i < kLanes; ++i) {
        auto* dst = reinterpret_cast<__m128i*>(strip.dst + (row + i) * grid.dst_row +
                                               column * kWidth);
        for (std::int64_t part = 0; part < kParts; ++part) {
          _mm_stream_si128(dst + part, lines[i][part]);
        }
      }
    }
  }
  return true;
}

#endif  // __x86_64__

// Copies a grid of short runs in small square tiles, so that the lines of the side that is walked
// across stay in the cache until they are used up. kRun is the size of a run, or 0 if it is known
// at run time only.
template <std::size_t kRun>
void copy_tiles(const Strip& strip, const Strip& ahead) {
  const std::size_t run = kRun != 0 ? kRun : strip.run;
  const Grid& grid = *strip.grid;
#if defined(__x86_64__)
  if constexpr (kRun == 1 || kRun == 2 || kRun == 4) {
    if (transpose<kRun>(strip, ahead.src)) return;
  }
#endif
  prefetch(ahead);
  for (std::int64_t row = 0; row < strip.rows; row += kTile) {
    const std::int64_t row_end = std::min(strip.rows, row + kTile);
    for (std::int64_t column = 0; column < grid.columns; column += kTile) {
      const std::int64_t column_end = std::min(grid.columns, column + kTile);
      for (std::int64_t i = row; i < row_end; ++i) {
        for (std::int64_t j = column; j < column_end; ++j) {
          std::memcpy(strip.dst + i * grid.dst_row + j * grid.dst_column,
                      strip.src + i * grid.src_row + j * grid.src_column, run);
        }
      }
    }
  }
}

void copy_short(const Strip& strip, const Strip& ahead) {
  switch (strip.run) {
    case 1: return copy_tiles<1>(strip, ahead);
    case 2: return copy_tiles<2>(strip, ahead);
    case 4: return copy_tiles<4>(strip, ahead);
    case 8: return copy_tiles<8>(strip, ahead);
    case 16: return copy_tiles<16>(strip, ahead);
    case 32: return copy_tiles<32>(strip, ahead);
    default: return copy_tiles<0>(strip, ahead);
  }
}

void copy_lines(LineKernels::Kernel kernel, Xxh3State* state, const Strip& strip,
                const Strip& ahead) {
  if (alike(strip, ahead)) return kernel(state, strip, ahead.src);
  prefetch(ahead);
  kernel(state, strip, strip.src);
}

void copy_strip(Strip strip, const Strip& ahead) {
  const auto kernel = line_kernels().stream;
  if (whole_lines(strip)) return copy_lines(kernel, nullptr, strip, ahead);
  // A partly written line costs more than streaming saves, unless the run is long.
  if (strip.run < kLongRun) {
    return copy_short(strip, ahead);
  }
  const std::size_t head = bytes_to_line(strip.dst), tail = (strip.run - head) % kLine;
  std::memcpy(strip.dst, strip.src, head);
  std::memcpy(strip.dst + strip.run - tail, strip.src + strip.run - tail, tail);
  strip.dst += head;
  strip.src += head;
  strip.run -= head + tail;
  copy_lines(kernel, nullptr, strip, ahead);
}

// Calls copy(strip, ahead) for all strips of a block; `ahead` is what to prefetch meanwhile.
// Many strips are made at a time: what is written between two copies and read again at once may
// have to wait for all streamed lines before it.
template <class Copy>
void for_strips(const Plan& plan, const std::int64_t* pages, std::uint64_t slot, Copy copy) {
  Strip strips[4 * kMostAhead];
  std::size_t at = 0, end = 0;
  for (Cursor cursor(plan, pages, slot);; ++at) {
    if (end - at <= plan.far && !cursor.done()) {
      std::copy(strips + at, strips + end, strips);
      end -= at;
      at = 0;
      while (end < std::size(strips) && !cursor.done()) strips[end++] = cursor.next();
    }
    if (at == end) return;
    const std::uint8_t* far = strips[std::min(at + plan.far, end - 1)].src;
    for (std::size_t i = 0; i < kTouched; ++i) __builtin_prefetch(far + kLine * i, 0, 2);
    copy(strips[at], strips[std::min(at + plan.near, end - 1)]);
  }
}

void copy_block(const Plan& plan, const std::int64_t* pages, std::uint64_t slot) {
  for_strips(plan, pages, slot, copy_strip);
}

// The same for a linear plan, hashing what it copies: the memory is read only once.
std::uint64_t copy_and_hash_block(const Plan& plan, const std::int64_t* pages,
                                  std::uint64_t slot) {
  const LineKernels& kernels = line_kernels();
  Xxh3State state;
  for_strips(plan, pages, slot, [&](const Strip& strip, const Strip& ahead) {
    copy_lines(whole_lines(strip) ? kernels.hash_stream : kernels.hash_store, &state, strip, ahead);
  });
  const auto* end = reinterpret_cast<const std::uint8_t*>(slot + plan.object_bytes);
  return xxh3_finish(state, plan.object_bytes, end - kLine);
}

}  // namespace

namespace {

std::size_t strip_bytes(const Strip& strip) {
  return static_cast<std::size_t>(strip.rows * strip.grid->columns) * strip.run;
}

}  // namespace

bool BlockStream::fits(const Plan& plan) {
  return plan.linear && std::all_of(plan.segments.begin(), plan.segments.end(), [](const auto& s) {
    return static_cast<std::size_t>(s.rows * s.grid.columns) * s.run <= kLeast;
  });
}

std::size_t BlockStream::next(std::size_t capacity) {
  strips_.erase(strips_.begin(), strips_.begin() + static_cast<std::ptrdiff_t>(count_));
  done_ += piece_;
  count_ = piece_ = 0;
  while (true) {
    if (count_ == strips_.size()) {
      if (cursor_.done()) break;
      strips_.push_back(cursor_.next());
    }
    const std::size_t size = strip_bytes(strips_[count_]);
    if (piece_ + size > capacity) break;
    piece_ += size;
    ++count_;
  }
  return piece_;
}

void BlockStream::take(std::uint8_t* buffer) {
  const LineKernels& kernels = line_kernels();
  for (std::size_t i = 0; i < count_; ++i) {
    Strip strip = strips_[i];
    // The side of the slot is counted from the begin of the block.
    if (plan_.to_slots) {
      strip.dst = buffer + (reinterpret_cast<std::uintptr_t>(strip.dst) - done_);
    } else {
      strip.src = buffer + (reinterpret_cast<std::uintptr_t>(strip.src) - done_);
    }
    // Into the buffer with ordinary stores, which leave it in the caches; past them into pages.
    const bool stream = !plan_.to_slots && whole_lines(strip);
    const std::size_t near = std::min(i + plan_.near, strips_.size() - 1);
    Strip ahead = strips_[near];
    if (!plan_.to_slots) ahead.src = strip.src;
    copy_lines(stream ? kernels.hash_stream : kernels.hash_store, &state_, strip, ahead);
  }
  if (piece_ != 0) std::memcpy(last_, buffer + piece_ - kLine, kLine);
  store_fence();
}

void linear_copy(std::uint8_t* dst, const std::uint8_t* src, std::size_t size, unsigned threads) {
  const std::size_t head = std::min(size, bytes_to_line(dst));
  const std::size_t body = (size - head) / kLine * kLine;
  std::memcpy(dst, src, head);
  std::memcpy(dst + head + body, src + head + body, size - head - body);
  dst += head;
  src += head;
  parallel(threads, (body + kCopyPiece - 1) / kCopyPiece, body, [&](std::size_t piece) {
    const std::size_t begin = piece * kCopyPiece;
    const std::size_t lines = std::min(kCopyPiece, body - begin) / kLine;
    run_kernel(line_kernels().stream, nullptr, dst + begin, src + begin, lines, src + begin);
    store_fence();
  });
}

void copy_blocks(const Plan& plan, const std::int64_t* pages, std::size_t pages_per_block,
                 const std::uint64_t* slots, std::size_t blocks, unsigned threads,
                 std::uint64_t* hashes) {
  parallel(threads, blocks, blocks * plan.block_bytes, [&](std::size_t block) {
    const std::int64_t* row = pages + block * pages_per_block;
    const auto skipped = std::find(row, row + pages_per_block, -1) != row + pages_per_block;
    if (hashes != nullptr && plan.linear && !skipped) {
      hashes[block] = copy_and_hash_block(plan, row, slots[block]);
    } else {
      copy_block(plan, row, slots[block]);
      if (hashes != nullptr) {
        const auto* object = reinterpret_cast<const std::uint8_t*>(slots[block]);
        hashes[block] = xxh3_64(object, plan.object_bytes);
      }
    }
    store_fence();
  });
}

}  // namespace kvstore
