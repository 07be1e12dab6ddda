// Records that are known by numbers, and found by names: 4 bytes beside each, and 4 to 8 in tables.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

namespace kvstore {

// A hash that names a block, or an object; 0 is none.
using Name = std::uint64_t;
// Of a record.
using Number = std::uint32_t;
constexpr Number kNone = ~Number{0};

// A `T` has a `name`, and `next`, which is used here. None moves as they grow in number, and names
// lie in many small tables, none of which takes long to grow.
template <class T>
class Records {
 public:
  T& operator[](Number number) { return all_[number]; }
  const T& operator[](Number number) const { return all_[number]; }
  bool has(std::size_t number) const { return number < all_.size(); }

  Number take() {
    if (free_ == kNone) {
      all_.emplace_back();
      return static_cast<Number>(all_.size() - 1);
    }
    const Number number = std::exchange(free_, all_[free_].next);
    all_[number].next = kNone;
    return number;
  }
  void give_back(Number number) {
    all_[number] = T();
    all_[number].next = std::exchange(free_, number);
  }

  // One that is listed.
  Number find(Name name) const {
    const Table& table = tables_[name >> 56];
    if (table.heads.empty()) return kNone;
    Number number = table.heads[name & (table.heads.size() - 1)];
    while (number != kNone && all_[number].name != name) number = all_[number].next;
    return number;
  }
  void list(Number number) {
    Table& table = tables_[all_[number].name >> 56];
    if (table.listed++ == table.heads.size()) grow(table);
    put(table, number);
  }
  // Does nothing to one that is not listed.
  void unlist(Number number) {
    Table& table = tables_[all_[number].name >> 56];
    if (table.heads.empty()) return;
    Number* link = &table.heads[all_[number].name & (table.heads.size() - 1)];
    while (*link != kNone && *link != number) link = &all_[*link].next;
    if (*link == kNone) return;
    *link = std::exchange(all_[number].next, kNone);
    --table.listed;
  }

 private:
  struct Table {
    std::vector<Number> heads;  // a power of two, or none
    std::size_t listed = 0;
  };

  void put(Table& table, Number number) {
    Number& head = table.heads[all_[number].name & (table.heads.size() - 1)];
    all_[number].next = std::exchange(head, number);
  }
  void grow(Table& table) {
    std::vector<Number> old(table.heads.empty() ? 4 : 2 * table.heads.size(), kNone);
    old.swap(table.heads);
    for (Number number : old) {
      while (number != kNone) put(table, std::exchange(number, all_[number].next));
    }
  }

  std::deque<T> all_;
  Number free_ = kNone;
  std::array<Table, 256> tables_;
};

}  // namespace kvstore
