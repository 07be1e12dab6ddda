#include "xxh3.hpp"

#include <algorithm>

#include "lines.hpp"

namespace kvstore {
namespace {

constexpr std::uint64_t kPrimeMx1 = 0x165667919E3779F9u;
constexpr std::uint64_t kPrimeMx2 = 0x9FB21C651E98DF25u;
constexpr unsigned kLastStripeKey = 121;  // 192 - 64 - 7
constexpr unsigned kMergeKey = 11;

std::uint64_t read32(const std::uint8_t* p) {
  std::uint32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

std::uint64_t rotate_left(std::uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

// Both halves of the 128-bit product, folded.
std::uint64_t multiply_fold(std::uint64_t a, std::uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

std::uint64_t avalanche(std::uint64_t h) {
  h = (h ^ (h >> 37)) * kPrimeMx1;
  return h ^ (h >> 32);
}

std::uint64_t avalanche64(std::uint64_t h) {
  h = (h ^ (h >> 33)) * kPrime64_2;
  h = (h ^ (h >> 29)) * kPrime64_3;
  return h ^ (h >> 32);
}

std::uint64_t mix16(const std::uint8_t* data, const std::uint8_t* key) {
  return multiply_fold(read64(data) ^ read64(key), read64(data + 8) ^ read64(key + 8));
}

std::uint64_t hash_up_to_16(const std::uint8_t* data, std::size_t size) {
  if (size > 8) {
    const std::uint64_t low = read64(data) ^ read64(kSecret + 24) ^ read64(kSecret + 32);
    const std::uint64_t high =
        read64(data + size - 8) ^ read64(kSecret + 40) ^ read64(kSecret + 48);
    return avalanche(size + __builtin_bswap64(low) + high + multiply_fold(low, high));
  }
  if (size >= 4) {
    const std::uint64_t input = read32(data + size - 4) + (read32(data) << 32);
    std::uint64_t h = input ^ read64(kSecret + 8) ^ read64(kSecret + 16);
    h = (h ^ rotate_left(h, 49) ^ rotate_left(h, 24)) * kPrimeMx2;
    h = (h ^ ((h >> 35) + size)) * kPrimeMx2;
    return h ^ (h >> 28);
  }
  if (size > 0) {
    const std::uint64_t combined = (std::uint64_t{data[0]} << 16) |
                                   (std::uint64_t{data[size >> 1]} << 24) | data[size - 1] |
                                   (std::uint64_t{size} << 8);
    return avalanche64(combined ^ read32(kSecret) ^ read32(kSecret + 4));
  }
  return avalanche64(read64(kSecret + 56) ^ read64(kSecret + 64));
}

std::uint64_t hash_17_to_128(const std::uint8_t* data, std::size_t size) {
  std::uint64_t h = size * kPrime64_1;
  // Pairs of 16-byte pieces from both ends towards the middle.
  for (std::size_t i = 0; i <= (size - 1) / 32; ++i) {
    h += mix16(data + 16 * i, kSecret + 32 * i);
    h += mix16(data + size - 16 * (i + 1), kSecret + 32 * i + 16);
  }
  return avalanche(h);
}

std::uint64_t hash_129_to_240(const std::uint8_t* data, std::size_t size) {
  std::uint64_t h = size * kPrime64_1;
  for (std::size_t i = 0; i < 8; ++i) h += mix16(data + 16 * i, kSecret + 16 * i);
  h = avalanche(h);
  for (std::size_t i = 8; i < size / 16; ++i) {
    h += mix16(data + 16 * i, kSecret + 16 * (i - 8) + 3);
  }
  h += mix16(data + size - 16, kSecret + 136 - 17);
  return avalanche(h);
}

}  // namespace

std::uint64_t xxh3_finish(const Xxh3State& state, std::uint64_t total, const std::uint8_t* last) {
  Xxh3State s = state;
  if (total % 64 == 0) {
    // The last stripe must count with its own key only, so take back what the kernel added.
    std::uint64_t added[8] = {};
    accumulate(added, last, kSecret + 8 * (s.stripe - 1));
    for (int i = 0; i < 8; ++i) s.acc[i] -= added[i];
  } else if (s.stripe == kStripesPerBlock) {
    scramble(s.acc);
  }
  accumulate(s.acc, last, kSecret + kLastStripeKey);
  std::uint64_t h = total * kPrime64_1;
  for (int i = 0; i < 4; ++i) {
    const std::uint8_t* key = kSecret + kMergeKey + 16 * i;
    h += multiply_fold(s.acc[2 * i] ^ read64(key), s.acc[2 * i + 1] ^ read64(key + 8));
  }
  return avalanche(h);
}

std::uint64_t xxh3_64(const std::uint8_t* data, std::size_t size) {
  if (size <= 16) return hash_up_to_16(data, size);
  if (size <= 128) return hash_17_to_128(data, size);
  if (size <= kShortHash) return hash_129_to_240(data, size);
  Xxh3State state;
  line_kernels().hash(&state, nullptr, data, size / 64, data + kPrefetchBytes);
  return xxh3_finish(state, size, data + size - 64);
}

void Xxh3Stream::update(std::uint8_t* dst, const std::uint8_t* src, std::size_t size) {
  if (size == 0) return;
  if (total_ < kShortHash) {
    std::memcpy(head_ + total_, src, std::min<std::size_t>(size, kShortHash - total_));
  }
  const std::size_t whole = size / 64 * 64;
  if (whole != 0) {
    const LineKernels& kernels = line_kernels();
    const auto kernel = dst == nullptr      ? kernels.hash
                        : is_line_start(dst) ? kernels.hash_stream
                                             : kernels.hash_store;
    kernel(&state_, dst, src, whole / 64, src + kPrefetchBytes);
    std::memcpy(recent_, src + whole - 64, 64);
  }
  std::memcpy(recent_ + 64, src + whole, size - whole);
  if (dst != nullptr) {
    std::memcpy(dst + whole, src + whole, size - whole);
    store_fence();
  }
  total_ += size;
}

std::uint64_t Xxh3Stream::digest() const {
  if (total_ <= kShortHash) return xxh3_64(head_, total_);
  return xxh3_finish(state_, total_, recent_ + total_ % 64);
}

}  // namespace kvstore
