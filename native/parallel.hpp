// Divides independent pieces of work among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace kvstore {

// Below this many bytes starting threads costs more than they save.
constexpr std::uint64_t kParallelBytes = 4 << 20;

// Calls work(i) for each i < count; `work` must not throw. Threads take the next piece when they
// are done with one, so a slow core does not delay the others. The threads live for this call
// only: nothing is shared between calls, and nothing survives a fork.
template <class Work>
void parallel(unsigned threads, std::size_t count, std::uint64_t total_bytes, const Work& work) {
  std::atomic<std::size_t> next{0};
  const auto worker = [&]() noexcept {
    for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  };
  std::vector<std::thread> helpers;
  if (total_bytes >= kParallelBytes) {
    const std::size_t wanted = std::min<std::size_t>(threads, count);
    helpers.reserve(wanted);
    try {
      while (helpers.size() + 1 < wanted) helpers.emplace_back(worker);
    } catch (const std::system_error&) {
      // No more threads to be had: those that run, and this one, do all the work.
    }
  }
  worker();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace kvstore
