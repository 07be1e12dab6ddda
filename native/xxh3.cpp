#include "xxh3.hpp"

#include <algorithm>
#include <cstring>

#include "lines.hpp"
#include "xxhash.hpp"

namespace kvstore {

static_assert(kShortHash == XXH3_MIDSIZE_MAX && kLine == XXH_STRIPE_LEN);

Xxh3State::Xxh3State() : acc XXH3_INIT_ACC {}

std::uint64_t xxh3_finish(const Xxh3State& state, std::uint64_t total, const std::uint8_t* last) {
  Xxh3State s = state;
  const std::uint8_t* const secret = XXH3_kSecret;
  const std::uint8_t* const end = secret + sizeof XXH3_kSecret - XXH_STRIPE_LEN;
  if (total % kLine == 0) {
    // The last stripe must count with its own key only, so take back what the kernel added.
    alignas(64) std::uint64_t added[8] = {};
    XXH3_accumulate_512(added, last, secret + XXH_SECRET_CONSUME_RATE * (s.stripe - 1));
    for (int i = 0; i < 8; ++i) s.acc[i] -= added[i];
  } else if (s.stripe == kStripesPerBlock) {
    XXH3_scrambleAcc(s.acc, end);
  }
  XXH3_accumulate_512(s.acc, last, end - XXH_SECRET_LASTACC_START);
  return XXH3_finalizeLong_64b(s.acc, secret, total);
}

std::uint64_t xxh3_64(const std::uint8_t* data, std::size_t size) {
  if (size <= kShortHash) return XXH3_64bits(data, size);
  Xxh3State state;
  run_kernel(line_kernels().hash, &state, nullptr, data, size / kLine, data + kAhead);
  return xxh3_finish(state, size, data + size - kLine);
}

void Xxh3Stream::update(std::uint8_t* dst, const std::uint8_t* src, std::size_t size) {
  if (size == 0) return;
  if (total_ < kShortHash) {
    std::memcpy(head_ + total_, src, std::min<std::size_t>(size, kShortHash - total_));
  }
  const std::size_t whole = size / kLine * kLine;
  if (whole != 0) {
    const LineKernels& kernels = line_kernels();
    const auto kernel = dst == nullptr      ? kernels.hash
                        : is_line_start(dst) ? kernels.hash_stream
                                             : kernels.hash_store;
    run_kernel(kernel, &state_, dst, src, whole / kLine, src + kAhead);
    std::memcpy(recent_, src + whole - kLine, kLine);
  }
  std::memcpy(recent_ + kLine, src + whole, size - whole);
  if (dst != nullptr) {
    std::memcpy(dst + whole, src + whole, size - whole);
    store_fence();
  }
  total_ += size;
}

std::uint64_t Xxh3Stream::digest() const {
  if (total_ <= kShortHash) return XXH3_64bits(head_, total_);
  return xxh3_finish(state_, total_, recent_ + total_ % kLine);
}

}  // namespace kvstore
