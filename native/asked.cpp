#include "asked.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace kvstore {
namespace {

constexpr std::size_t kMostGroups = 20'000;
constexpr std::size_t kRemembered = 17;  // blocks for each that there is room for
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
  if (uses_.empty() || turns_ < 1) throw std::invalid_argument("give some uses, and turns");
  const auto places = static_cast<std::size_t>(classes()) * static_cast<std::size_t>(ages());
  seen.assign(2 * places, 0.0);
  worth_of.assign(places, 0.0);
}

void Asked::hold(std::size_t blocks) {
  limit_ = std::max(limit_, std::min(kMost, kRemembered * blocks));
}

std::shared_ptr<Known> Asked::find(Name name) {
  const auto* found = known_.find(name);
  return found == nullptr ? nullptr : **found;
}

std::size_t Asked::place(int cls, double waited) const {
  return static_cast<std::size_t>(cls * ages() + above(edges_, waited));
}

// So many blocks of a group were used now, or forgotten.
void Asked::leave(const Group& group, double blocks, bool used, double now) {
  const std::size_t at = place(group.cls, now - group.at);
  seen[used ? at : worth_of.size() + at] += blocks / static_cast<double>(group.size);
}

void Asked::forget_oldest(double now) {
  const std::shared_ptr<Known> known = std::move(order_.front());
  order_.pop_front();
  known_.of(known->name).erase(known->name);
  --known->group->left;
  leave(*known->group, 1, false, now);
  known->group = nullptr;
}

void Asked::ask(const std::vector<Name>& names, Name parent, double now) {
  std::shared_ptr<Known> last;
  std::size_t old = 0;
  for (; old < names.size(); ++old) {
    std::shared_ptr<Known> known = find(names[old]);
    if (known == nullptr) break;
    last = std::move(known);
  }
  int turn = 1;
  if (last != nullptr) {
    turn = last->turn + 1;
  } else if (const std::shared_ptr<Known> before = find(parent)) {
    turn = before->turn;
  }
  const int kind = (std::min(turn, turns_) - 1) * (static_cast<int>(fresh_.size()) + 1) +
                   above(fresh_, static_cast<int>(names.size() - old));
  std::vector<std::shared_ptr<Group>> mine(uses_.size() + 1);
  for (const Name name : names) {
    if (const auto* found = known_.find(name)) {
      order_.splice(order_.end(), order_, *found);
      Group& group = *order_.back()->group;
      --group.left;
      leave(group, 1, true, now);
    } else {
      order_.push_back(std::make_shared<Known>(Known{name, parent, turn, 0, nullptr}));
      known_.of(name)[name] = std::prev(order_.end());
    }
    Known& known = *order_.back();
    known.uses = std::min(known.uses + 1, uses_.back());  // no more are told apart
    const auto often = static_cast<std::size_t>(above(uses_, known.uses));
    std::shared_ptr<Group>& group = mine[often];
    if (group == nullptr) {
      group = std::make_shared<Group>(Group{static_cast<int>(often) * kinds_ + kind, now});
      groups_.push_back(group);
    }
    ++group->left;
    ++group->size;
    known.group = group;
    parent = name;
    if (order_.size() > limit_) forget_oldest(now);
  }
  for (; groups_.size() > kMostGroups; groups_.pop_front()) {
    const Group& group = *groups_.front();
    if (group.left > 0) leave(group, static_cast<double>(group.left), false, now);
  }
}

std::vector<double> Asked::waited(double now) const {
  const auto forgotten = seen.begin() + static_cast<std::ptrdiff_t>(worth_of.size());
  std::vector<double> result(forgotten, seen.end());
  for (const auto& group : groups_) {
    if (group->left > 0) {
      result[place(group->cls, now - group->at)] +=
          static_cast<double>(group->left) / static_cast<double>(group->size);
    }
  }
  return result;
}

}  // namespace kvstore
