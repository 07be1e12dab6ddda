#include "asked.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace kvstore {
namespace {

constexpr std::size_t kMostGroups = 20'000;
constexpr std::size_t kRemembered = 17;  // blocks for each that there is room for
constexpr std::size_t kSlice = 512;  // blocks told of at a time: half a millisecond
constexpr std::size_t kFewest = 1 << 12, kMost = 1 << 19;

// How many of the edges are not above it.
template <class T>
int above(const std::vector<T>& edges, T value) {
  return static_cast<int>(std::upper_bound(edges.begin(), edges.end(), value) - edges.begin());
}

}  // namespace

Asked::Asked(std::vector<int> uses, int turns, std::vector<int> fresh, std::vector<double> edges)
    : uses_(std::move(uses)),
      turns_(turns),
      fresh_(std::move(fresh)),
      edges_(std::move(edges)),
      kinds_(turns_ * (static_cast<int>(fresh_.size()) + 1)),
      limit_(kFewest) {
  if (uses_.empty() || uses_.back() > 255 || turns_ < 1 || turns_ > 255 || classes() > 60'000) {
    throw std::invalid_argument("give some uses, and turns");
  }
  const auto places = static_cast<std::size_t>(classes()) * static_cast<std::size_t>(ages());
  seen.assign(2 * places, 0.0);
  worth_of.assign(places, 0.0);
  double begin = 0.0;
  for (const double end : edges_) {
    middles_.push_back((begin + end) / 2);
    begin = end;
  }
  middles_.push_back(1.5 * begin);
}

double Asked::worth(int cls, double waited) const {
  const double* const worth = &worth_of[static_cast<std::size_t>(cls) * middles_.size()];
  const auto next = static_cast<std::size_t>(above(middles_, waited));
  if (next == 0 || next == middles_.size()) return worth[next == 0 ? 0 : next - 1];
  const double length = middles_[next] - middles_[next - 1];
  const double share = length > 0 ? (waited - middles_[next - 1]) / length : 0.0;
  return worth[next - 1] + share * (worth[next] - worth[next - 1]);
}

void Asked::hold(std::size_t blocks) {
  limit_ = std::max(limit_, std::min(kMost, kRemembered * blocks));
}

const Group* Asked::group_of(Name block, Number& known) const {
  if (known == kNone || known_[known].name != block) known = find(block);
  return known == kNone ? nullptr : &groups_[known_[known].group];
}

std::size_t Asked::place(int cls, double waited) const {
  return static_cast<std::size_t>(cls * ages() + above(edges_, waited));
}

// So many blocks of a group were used now, or forgotten.
void Asked::count(const Group& group, double blocks, bool used, double now) {
  const std::size_t at = place(group.cls, now - group.at);
  seen[used ? at : worth_of.size() + at] += blocks / static_cast<double>(group.size);
}

void Asked::leave(Number number, bool used, double now) {
  Group& group = groups_[number];
  count(group, 1, used, now);
  if (--group.left == 0 && !group.waits) groups_.give_back(number);
}

void Asked::unlink(const Known& known) {
  (known.older == kNone ? oldest_ : known_[known.older].newer) = known.newer;
  (known.newer == kNone ? newest_ : known_[known.newer].older) = known.older;
}

void Asked::append(Number number) {
  known_[number].older = newest_;
  known_[number].newer = kNone;
  (newest_ == kNone ? oldest_ : known_[newest_].newer) = number;
  newest_ = number;
}

void Asked::forget_oldest(double now) {
  const Number number = oldest_;
  leave(known_[number].group, false, now);
  unlink(known_[number]);
  known_.unlist(number);
  known_.give_back(number);
  --size_;
}

Number Asked::begin_group(int cls, const Asking& asking) {
  const Number number = groups_.take();
  Group& group = groups_[number];
  group.at = asking.now;
  group.request = asking.request;
  group.cls = static_cast<std::uint16_t>(cls);
  (last_ == kNone ? first_ : groups_[last_].next) = number;
  last_ = number;
  if (++waiting_ > kMostGroups) {
    const Number oldest = std::exchange(first_, groups_[first_].next);
    Group& old = groups_[oldest];
    --waiting_;
    old.waits = false;
    if (old.left > 0) {
      count(old, old.left, false, asking.now);
    } else {
      groups_.give_back(oldest);
    }
  }
  return number;
}

Asking Asked::ask(std::vector<Name> names, Name parent, double now) {
  return {std::move(names), parent, now, ++requests_, std::vector<Number>(uses_.size() + 1, kNone)};
}

bool Asked::go_on(Asking& asking) {
  const auto& names = asking.names;
  std::size_t most = kSlice;
  while (asking.kind < 0 && most > 0) {
    const Number known = asking.old < names.size() ? find(names[asking.old]) : kNone;
    if (known != kNone) {
      asking.turn = std::min(known_[known].turn + 1, turns_);
      ++asking.old;
      --most;
      continue;
    }
    const Number before = asking.old == 0 ? find(asking.parent) : kNone;
    if (before != kNone) asking.turn = known_[before].turn;
    asking.kind = (asking.turn - 1) * (static_cast<int>(fresh_.size()) + 1) +
                  above(fresh_, static_cast<int>(names.size() - asking.old));
  }
  for (; most > 0 && asking.told < names.size(); --most, ++asking.told) {
    const Name name = names[asking.told];
    Number number = find(name);
    if (number != kNone) {
      unlink(known_[number]);
      leave(known_[number].group, true, asking.now);
    } else {
      number = known_.take();
      known_[number].name = name;
      known_[number].parent = asking.parent;
      known_[number].turn = static_cast<std::uint8_t>(asking.turn);
      known_.list(number);
      ++size_;
    }
    append(number);
    Known& known = known_[number];
    if (known.uses < uses_.back()) ++known.uses;  // no more are told apart
    const int often = above(uses_, static_cast<int>(known.uses));
    Number& group = asking.groups[static_cast<std::size_t>(often)];
    if (group == kNone || groups_[group].request != asking.request) {
      group = begin_group(often * kinds_ + asking.kind, asking);
    }
    ++groups_[group].left;
    ++groups_[group].size;
    known.group = group;
    asking.parent = name;
    if (size_ > limit_) forget_oldest(asking.now);
  }
  return asking.kind < 0 || asking.told < names.size();
}

std::vector<double> Asked::waited(double now) const {
  const auto forgotten = seen.begin() + static_cast<std::ptrdiff_t>(worth_of.size());
  std::vector<double> result(forgotten, seen.end());
  for (Number number = first_; number != kNone; number = groups_[number].next) {
    const Group& group = groups_[number];
    if (group.left > 0) {
      result[place(group.cls, now - group.at)] +=
          static_cast<double>(group.left) / static_cast<double>(group.size);
    }
  }
  return result;
}

}  // namespace kvstore
