// Lossless coding of bfloat16 numbers in 12 bits each: see docs/formats.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace kvstore {

// Where the sections of a coded object of `values` numbers lie, from its first byte on. All follows
// from that count; `escapes` is how many numbers there may be that the exponent codes cannot say.
struct E4Shape {
  explicit E4Shape(std::size_t values);
  std::size_t values, escapes;
  std::size_t bases, codes, rests, places, exponents, total;  // offsets in bytes
};

struct E4Coded {
  std::size_t escapes;
  std::uint64_t checksum;  // XXH3 of the numbers' bytes
};

// Codes `values` numbers into the sections at `dst`, or gives up: there are too many escapes.
std::optional<E4Coded> e4_encode(std::uint8_t* dst, const std::uint16_t* src, std::size_t values);

// The reverse, with the XXH3 of what it brought; nothing where the escapes at `src` are not in
// order, or are not of these values.
std::optional<std::uint64_t> e4_decode(std::uint8_t* dst, const std::uint8_t* src,
                                       std::size_t values, std::size_t escapes);

}  // namespace kvstore
