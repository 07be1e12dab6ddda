// What the processor can do, read once when the module is imported.
#pragma once

#include <string>
#include <vector>

namespace kvstore {

// Those of avx2, avx512 and sha that dispatch may use: what the processor has, limited by the
// environment variable KVSTORE_CPU (a comma-separated list; "portable" selects none).
const std::vector<std::string>& cpu_features();

bool cpu_has(const char* feature);

}  // namespace kvstore
