// XXH3, 64 bits, seed 0, default secret, of data that may be copied on the way.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore {

// Inputs up to this length have formulas of their own and need all their bytes at once.
constexpr std::size_t kShortHash = 240;

// The accumulators of the long hash. `stripe` counts the 64-byte stripes added to the current
// block; a full one is scrambled only when the next stripe arrives, because the specification
// treats the last stripe of the input differently and the input may end there.
struct Xxh3State {
  Xxh3State();
  alignas(64) std::uint64_t acc[8];
  unsigned stripe = 0;
};

std::uint64_t xxh3_64(const std::uint8_t* data, std::size_t size);

// The hash of an input of `total` > kShortHash bytes whose total / 64 whole stripes went through
// the line kernels into `state`. `last` are the last 64 bytes of the input.
std::uint64_t xxh3_finish(const Xxh3State& state, std::uint64_t total, const std::uint8_t* last);

// Hash of an input that arrives in pieces; each piece but the last is a multiple of 64 bytes.
class Xxh3Stream {
 public:
  // False once a piece with a ragged end was added: nothing may follow it.
  bool open() const { return total_ % 64 == 0; }
  // Adds `size` bytes of `src`; also copies them to `dst` unless that is null.
  void update(std::uint8_t* dst, const std::uint8_t* src, std::size_t size);
  std::uint64_t digest() const;

 private:
  Xxh3State state_;
  std::uint64_t total_ = 0;
  std::uint8_t head_[kShortHash] = {};  // the first bytes, for inputs that stay short
  std::uint8_t recent_[128] = {};       // the last whole stripe, then the ragged end
};

}  // namespace kvstore
