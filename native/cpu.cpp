#include "cpu.hpp"

#include <algorithm>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace kvstore {
namespace {

std::vector<std::string> detect() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512");
  // Compilers older than GCC 14 do not know the name "sha" here, so ask cpuid.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool sha = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && ((ebx >> 29) & 1) != 0;
  if (sha && __builtin_cpu_supports("sse4.1")) found.push_back("sha");
#endif
  if (const char* list = std::getenv("KVSTORE_CPU"); list != nullptr && *list != '\0') {
    const std::string listed = "," + std::string(list) + ",";
    const auto missing = [&](const std::string& name) {
      return listed.find("," + name + ",") == std::string::npos;
    };
    found.erase(std::remove_if(found.begin(), found.end(), missing), found.end());
  }
  return found;
}

}  // namespace

const std::vector<std::string>& cpu_features() {
  static const std::vector<std::string> features = detect();
  return features;
}

bool cpu_has(const char* feature) {
  const auto& all = cpu_features();
  return std::find(all.begin(), all.end(), feature) != all.end();
}

}  // namespace kvstore
