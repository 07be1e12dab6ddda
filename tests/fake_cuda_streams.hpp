// Streams of the fake driver, threads that do their work late, at random; and what events record.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>

namespace {

void nap() {
  thread_local std::mt19937 random(std::random_device{}());
  const unsigned draw = random() % 8;
  if (draw < 3) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
  if (draw == 3) std::this_thread::yield();
}

// One recording of an event. Whoever waits, waits for the one that was the latest then, whatever
// becomes of the event.
struct Point {
  std::mutex mutex;
  std::condition_variable changed;
  bool happened = false;

  void happen() {
    std::lock_guard<std::mutex> lock(mutex);
    happened = true;
    changed.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return happened; });
  }
};

struct Stream {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> work;
  bool busy = false, ending = false;
  std::thread thread;

  Stream() : thread([this] { run(); }) {}
  ~Stream() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      ending = true;
    }
    changed.notify_all();
    thread.join();
  }
  void add(std::function<void()> item) {
    std::lock_guard<std::mutex> lock(mutex);
    work.push_back(std::move(item));
    changed.notify_all();
  }
  void finish() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return work.empty() && !busy; });
  }
  void run() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      changed.wait(lock, [&] { return ending || !work.empty(); });
      if (work.empty()) return;
      auto item = std::move(work.front());
      work.pop_front();
      busy = true;
      lock.unlock();
      nap();
      item();
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }
};

}  // namespace
