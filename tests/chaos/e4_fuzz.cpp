// Decodes frames of e4 that were damaged in all ways, each in memory of its exact size: built with the
// address and undefined-behaviour sanitizers, which end the program at the first byte out of bounds.
// Prints how many came back as they were, were refused, and came back as something else.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../native/e4.hpp"

using namespace kvstore;

namespace {

// Memory on the heap whose end is that of the data, at the alignment that objects have.
struct Exact {
  explicit Exact(std::size_t size) : size(size), data(new (std::align_val_t{64}) std::uint8_t[size]) {}
  ~Exact() { ::operator delete[](data, std::align_val_t{64}); }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  std::size_t size;
  std::uint8_t* data;
};

}  // namespace

int main(int argc, char** argv) {
  const long rounds = argc > 1 ? std::atol(argv[1]) : 1000;
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  long same = 0, refused = 0, other = 0;
  for (long round = 0; round < rounds;) {
    const std::size_t values = 1 + random() % 9000;
    const E4Shape shape(values);
    Exact plain(2 * values), coded(shape.total), back(2 * values);
    for (std::size_t i = 0; i < values; ++i) {
      const float number = normal(random) * (random() % 997 == 0 ? 1e-9F : 1.F);
      std::uint32_t bits;
      std::memcpy(&bits, &number, sizeof bits);
      const auto value = static_cast<std::uint16_t>(bits >> 16);
      std::memcpy(plain.data + 2 * i, &value, sizeof value);
    }
    const auto told =
        e4_encode(coded.data, reinterpret_cast<const std::uint16_t*>(plain.data), values);
    if (!told) continue;
    for (int damage = 0; damage < 50; ++damage, ++round) {
      Exact frame(shape.total);
      std::memcpy(frame.data, coded.data, shape.total);
      std::size_t escapes = told->escapes;
      switch (damage % 5) {
        case 0: break;
        case 1: frame.data[random() % shape.total] ^= 1 << (random() % 8); break;
        case 2: escapes = random() % (shape.escapes + 1); break;
        case 3:  // Noise among the escapes.
          escapes = shape.escapes;
          for (std::size_t i = shape.places; i < shape.total; ++i) frame.data[i] = random();
          break;
        default:  // Places in order, some of them beyond the end.
          escapes = shape.escapes;
          for (std::size_t i = 0; i < escapes; ++i) {
            const auto place = static_cast<std::uint32_t>(i * (1 + values / 8) + random() % 3);
            std::memcpy(frame.data + shape.places + i * sizeof place, &place, sizeof place);
          }
      }
      const auto sum = e4_decode(back.data, frame.data, values, escapes);
      if (!sum) {
        ++refused;
      } else if (*sum == told->checksum) {
        if (std::memcmp(back.data, plain.data, plain.size) != 0) return 1;
        ++same;
      } else {
        ++other;
      }
    }
  }
  std::printf("%ld %ld %ld\n", same, refused, other);
  return 0;
}
