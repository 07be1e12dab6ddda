// Python bindings of `Asked`, and of the eviction policy that goes by it.
#pragma once

#include <nanobind/nanobind.h>

namespace kvstore {

void bind_forecast(nanobind::module_& m);

}  // namespace kvstore
