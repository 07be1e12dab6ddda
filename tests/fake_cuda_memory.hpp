// What the fake driver knows of memory, and its errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>

namespace {

using Address = std::uint64_t;
enum Status {
  kOk = 0, kInvalidValue = 1, kNoMemory = 2, kInvalidDevice = 101, kInvalidContext = 201,
  kInvalidHandle = 400, kNotReady = 600, kIllegalAddress = 700, kAlreadyRegistered = 712,
  kNotRegistered = 713, kUnknown = 999,
};

int cuGetErrorName(int status, const char** text) {
  switch (status) {
    case kInvalidValue: *text = "CUDA_ERROR_INVALID_VALUE"; return kOk;
    case kNoMemory: *text = "CUDA_ERROR_OUT_OF_MEMORY"; return kOk;
    case kInvalidDevice: *text = "CUDA_ERROR_INVALID_DEVICE"; return kOk;
    case kInvalidContext: *text = "CUDA_ERROR_INVALID_CONTEXT"; return kOk;
    case kInvalidHandle: *text = "CUDA_ERROR_INVALID_HANDLE"; return kOk;
    case kIllegalAddress: *text = "CUDA_ERROR_ILLEGAL_ADDRESS"; return kOk;
    case kUnknown: *text = "CUDA_ERROR_UNKNOWN"; return kOk;
    default: *text = nullptr; return kInvalidValue;
  }
}
int cuGetErrorString(int status, const char** text) {
  if (cuGetErrorName(status, text) == kOk) *text = "a fake failure";
  return *text == nullptr ? kInvalidValue : kOk;
}

enum Kind { kPageable = 0, kDevice = 1, kPinned = 2, kSpanning = -1 };
struct Range { Address end; Kind kind; bool allocated; };

std::mutex g_mutex;
std::map<Address, Range> g_ranges;

Kind kind_of(Address address, std::uint64_t size) {  // under g_mutex
  auto next = g_ranges.upper_bound(address);
  if (next != g_ranges.begin()) {
    const auto& range = *std::prev(next);
    if (address < range.second.end) {
      return address + size <= range.second.end ? range.second.kind : kSpanning;
    }
  }
  return next != g_ranges.end() && next->first < address + size ? kSpanning : kPageable;
}

int add_range(Address address, std::uint64_t size, Kind kind, bool allocated) {
  if (size == 0 || address == 0) return kInvalidValue;
  auto next = g_ranges.upper_bound(address);
  if (next != g_ranges.begin() && std::prev(next)->second.end > address) return kAlreadyRegistered;
  if (next != g_ranges.end() && next->first < address + size) return kAlreadyRegistered;
  g_ranges[address] = {address + size, kind, allocated};
  return kOk;
}

}  // namespace
