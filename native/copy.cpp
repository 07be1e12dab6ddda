#include "copy.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "lines.hpp"
#include "parallel.hpp"
#include "xxh3.hpp"

namespace kvstore {
namespace {

// Runs from this length on use non-temporal stores wherever they begin; shorter ones only if
// they cover whole lines, because a partly written line costs more than it saves.
constexpr std::size_t kStreamRun = 1024;
constexpr std::size_t kCopyPiece = 2 << 20;  // unit of work of a linear copy
constexpr std::int64_t kTile = 16;

// Bytes up to the next line start.
std::size_t bytes_to_line(const std::uint8_t* p) {
  return -reinterpret_cast<std::uintptr_t>(p) % kLine;
}

// Runs ahead of the copy, over the same items, and says which lines of the source to prefetch:
// at the end of a run those at the start of the next, wherever they are.
class Prefetcher {
 public:
  Prefetcher(const Cursor& start, bool to_slots) : cursor_(start), to_slots_(to_slots) {
    if (cursor_.done()) return;  // all pages skipped
    enter();
    for (std::size_t lines = kPrefetchBytes / kLine; lines > 0 && !cursor_.done();) {
      const std::size_t n = std::min(lines, left_);
      touch(n);
      lines -= n;
    }
  }

  // How many lines from at() on belong to one item.
  std::size_t lines() const { return left_; }
  const std::uint8_t* at() const { return at_; }

  // Counts `n` <= lines() lines as prefetched.
  void advance(std::size_t n) {
    at_ += n * kLine;
    left_ -= n;
    if (left_ == 0) {
      cursor_.next();
      enter();
    }
  }

  // Prefetches `n` lines now.
  void touch(std::size_t n) {
    while (n > 0) {
      const std::size_t part = std::min(n, left_);
      for (std::size_t i = 0; i < part; ++i) __builtin_prefetch(at_ + i * kLine, 0, 3);
      advance(part);
      n -= part;
    }
  }

 private:
  void enter() {
    if (cursor_.done()) {
      // Nothing is left to prefetch: go over lines again that the copy is about to read.
      left_ = SIZE_MAX;
      at_ -= kPrefetchBytes;
      return;
    }
    left_ = cursor_.segment().lines;
    at_ = to_slots_ ? cursor_.mem() : cursor_.slot();
  }

  Cursor cursor_;
  bool to_slots_;
  std::size_t left_ = 0;
  const std::uint8_t* at_ = nullptr;
};

// Sends whole lines through a kernel, in the pieces in which the prefetcher is contiguous.
// `within` is the kernel for those where it only goes on in the run that is being copied.
void copy_lines(LineKernels::Kernel kernel, LineKernels::Kernel within, Xxh3State* state,
                std::uint8_t* dst, const std::uint8_t* src, std::size_t lines,
                Prefetcher& prefetcher) {
  while (lines > 0) {
    const std::size_t n = std::min(lines, prefetcher.lines());
    const bool same_run = prefetcher.at() == src + kPrefetchBytes;
    (same_run ? within : kernel)(state, dst, src, n, prefetcher.at());
    prefetcher.advance(n);
    dst += n * kLine;
    src += n * kLine;
    lines -= n;
  }
}

void copy_run(std::uint8_t* dst, const std::uint8_t* src, std::size_t run, Prefetcher& prefetcher) {
  if (run < kStreamRun && !(is_line_start(dst) && run % kLine == 0)) {
    std::memcpy(dst, src, run);
    prefetcher.touch(run / kLine);
    return;
  }
  const std::size_t head = bytes_to_line(dst);
  const std::size_t lines = (run - head) / kLine;
  const std::size_t tail = run - head - lines * kLine;
  if (head > 0) std::memcpy(dst, src, head);
  // Within a run the processor's own prefetching is faster; it is blind only to the next run.
  const LineKernels& kernels = line_kernels();
  copy_lines(kernels.stream_ahead, kernels.stream, nullptr, dst + head, src + head, lines,
             prefetcher);
  if (tail > 0) std::memcpy(dst + run - tail, src + run - tail, tail);
  if (lines < run / kLine) prefetcher.touch(1);  // the line split between head and tail
}

struct TileShape {
  Loop outer, inner;  // inner: linear in the destination, or nearest to it
  std::size_t unit;   // bytes of an element of the tile
};

// Copies a two-dimensional arrangement of short units in small square tiles, so that the lines
// of the side that is walked across stay in the cache until they are used up. kUnit is the size
// of a unit, or 0 if it is known at run time only.
template <std::size_t kUnit>
void copy_tile(std::uint8_t* dst, const std::uint8_t* src, const TileShape& shape, bool to_slots) {
  const std::size_t unit = kUnit != 0 ? kUnit : shape.unit;
  const Loop& out = shape.outer;
  const Loop& in = shape.inner;
  const std::int64_t dst_out = to_slots ? out.slot : out.mem;
  const std::int64_t src_out = to_slots ? out.mem : out.slot;
  const std::int64_t dst_in = to_slots ? in.slot : in.mem;
  const std::int64_t src_in = to_slots ? in.mem : in.slot;
  for (std::int64_t row = 0; row < out.count; row += kTile) {
    const std::int64_t row_end = std::min(out.count, row + kTile);
    for (std::int64_t column = 0; column < in.count; column += kTile) {
      const std::int64_t column_end = std::min(in.count, column + kTile);
      for (std::int64_t i = row; i < row_end; ++i) {
        for (std::int64_t j = column; j < column_end; ++j) {
          std::memcpy(dst + i * dst_out + j * dst_in, src + i * src_out + j * src_in, unit);
        }
      }
    }
  }
}

using TileCopy = void (*)(std::uint8_t*, const std::uint8_t*, const TileShape&, bool);

TileCopy tile_copy(std::size_t unit) {
  switch (unit) {
    case 1: return copy_tile<1>;
    case 2: return copy_tile<2>;
    case 4: return copy_tile<4>;
    case 8: return copy_tile<8>;
    case 16: return copy_tile<16>;
    case 32: return copy_tile<32>;
    default: return copy_tile<0>;
  }
}

void copy_block(const Plan& plan, const std::int64_t* pages, std::uint64_t slot) {
  Cursor cursor(plan, pages, slot);
  Prefetcher prefetcher(cursor, plan.to_slots);
  for (; !cursor.done(); cursor.next()) {
    const SegmentPlan& s = cursor.segment();
    std::uint8_t* dst = plan.to_slots ? cursor.slot() : cursor.mem();
    const std::uint8_t* src = plan.to_slots ? cursor.mem() : cursor.slot();
    if (s.tiled) {
      tile_copy(s.run)(dst, src, {s.tile_outer, s.tile_inner, s.run}, plan.to_slots);
      prefetcher.touch(1);
    } else {
      copy_run(dst, src, s.run, prefetcher);
    }
  }
}

// The same for a linear plan, hashing what it copies: the memory is read only once.
std::uint64_t copy_and_hash_block(const Plan& plan, const std::int64_t* pages,
                                  std::uint64_t slot) {
  const LineKernels& kernels = line_kernels();
  Xxh3State state;
  Cursor cursor(plan, pages, slot);
  Prefetcher prefetcher(cursor, plan.to_slots);
  const std::uint8_t* last_line = nullptr;
  for (; !cursor.done(); cursor.next()) {
    const std::size_t run = cursor.segment().run;
    std::uint8_t* dst = plan.to_slots ? cursor.slot() : cursor.mem();
    const std::uint8_t* src = plan.to_slots ? cursor.mem() : cursor.slot();
    const auto kernel = is_line_start(dst) ? kernels.hash_stream : kernels.hash_store;
    copy_lines(kernel, kernel, &state, dst, src, run / kLine, prefetcher);
    last_line = src + run - kLine;
  }
  return xxh3_finish(state, plan.object_bytes, last_line);
}

}  // namespace

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
    line_kernels().stream(nullptr, dst + begin, src + begin, lines, nullptr);
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

int prefault(std::uint8_t* address, std::size_t size, bool write) {
#if !defined(MADV_POPULATE_WRITE)
  constexpr int MADV_POPULATE_READ = 22, MADV_POPULATE_WRITE = 23;  // Linux 5.14
#endif
  const int advice = write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(address) / page * page;
  const auto end = reinterpret_cast<std::uintptr_t>(address) + size;
  void* start = reinterpret_cast<void*>(begin);
  // An empty range succeeds exactly where the kernel knows the advice.
  if (madvise(start, 0, advice) == 0) {
    while (madvise(start, end - begin, advice) != 0) {
      if (errno != EINTR && errno != EAGAIN) return errno;
    }
    return 0;
  }
  // Adding zero writes to the page but keeps a value that another thread stores meanwhile.
  for (std::uintptr_t p = reinterpret_cast<std::uintptr_t>(address); p < end;
       p = p / page * page + page) {
    __atomic_fetch_add(reinterpret_cast<std::uint8_t*>(p), 0, __ATOMIC_RELAXED);
  }
  return 0;
}

}  // namespace kvstore
