// Chained SHA-256 keys of token blocks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore {

constexpr std::size_t kKeyBytes = 32;

// keys[i] = SHA-256(keys[i-1] || tokens of block i as little-endian 32-bit words), where
// keys[-1] = parent. Writes `blocks` keys of 32 bytes each.
void chain_keys(const std::uint8_t* parent, const std::uint32_t* tokens, std::size_t blocks,
                std::uint32_t block_tokens, std::uint8_t* keys);

}  // namespace kvstore
