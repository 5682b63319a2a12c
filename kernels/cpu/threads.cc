#include "threads.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <system_error>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include "cpu.h"

namespace internjax {
namespace {

// How long a worker without a job looks for the next one before it sleeps. Between two products of
// a decoding step lie some 20 us; waking a thread takes longer than that.
constexpr auto kLook = std::chrono::microseconds(100);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0)
    for (int i = 0; i < CPU_SETSIZE; ++i)
      if (CPU_ISSET(i, &set)) cpus.push_back(i);
#endif
  if (cpus.empty()) cpus.assign(std::max(1u, std::thread::hardware_concurrency()), -1);
  return cpus;
}

void pin(int cpu) {
#if defined(__linux__)
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);  // refused: it runs where it may
#endif
}

// Moves this thread to `home` if it runs on a CPU that a worker is pinned to: the two would take
// turns. It may leave again whenever the system likes.
void make_way(const std::vector<int>& taken, int home) {
#if defined(__linux__)
  if (std::find(taken.begin(), taken.end(), sched_getcpu()) == taken.end()) return;
  cpu_set_t before;
  if (pthread_getaffinity_np(pthread_self(), sizeof(before), &before) != 0) return;
  pin(home);
  pthread_setaffinity_np(pthread_self(), sizeof(before), &before);
#endif
}

}  // namespace

Pool::Pool(int size) {
  const std::vector<int> cpus = allowed_cpus();
  const int all = static_cast<int>(cpus.size());
  home_ = cpus[0];
  try {
    for (int i = 1; i < size; ++i) {
      const int cpu = cpus[i % all];
      if (size <= all) taken_.push_back(cpu);
      workers_.emplace_back([this, cpu] { work(cpu); });
    }
  } catch (const std::system_error&) {
  }
}

Pool::~Pool() {
  stop_ = true;
  {
    std::lock_guard<std::mutex> lock(sleep_);
    wake_.notify_all();
  }
  for (std::thread& worker : workers_) worker.join();
}

bool Pool::take_part() {
  int64_t left = open_.load(std::memory_order_acquire);
  while (left > 0) {
    if (open_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) {
      (*part_)(left - 1);
      unfinished_.fetch_sub(1, std::memory_order_release);
      return true;
    }
  }
  return false;
}

void Pool::run(int64_t count, const std::function<void(int64_t)>& part) {
  const PlainFloats plain;
  if (count <= 1 || workers_.empty()) {
    for (int64_t i = 0; i < count; ++i) part(i);
    return;
  }
  std::lock_guard<std::mutex> one_job(job_);
  make_way(taken_, home_);
  part_ = &part;
  unfinished_.store(count, std::memory_order_relaxed);
  open_.store(count);  // sequentially consistent with `sleepers_`: a worker sees one of the two
  if (sleepers_.load() > 0) {
    std::lock_guard<std::mutex> lock(sleep_);
    wake_.notify_all();
  }
  while (take_part()) {
  }
  while (unfinished_.load(std::memory_order_acquire) > 0) pause();
}

void Pool::work(int cpu) {
  pin(cpu);
  const PlainFloats plain;
  while (!stop_) {
    const auto until = std::chrono::steady_clock::now() + kLook;
    while (take_part() || std::chrono::steady_clock::now() < until) pause();
    std::unique_lock<std::mutex> lock(sleep_);
    ++sleepers_;
    wake_.wait(lock, [this] { return stop_ || open_.load() > 0; });
    --sleepers_;
  }
}

namespace {

std::mutex pool_lock;
Pool* the_pool = nullptr;  // never deleted at exit: a forked child has no workers to join

int default_threads() {
  const char* asked = std::getenv("INTERNJAX_CPU_THREADS");
  const int n = asked ? std::atoi(asked) : 0;
  return n > 0 ? n : static_cast<int>(allowed_cpus().size());
}

}  // namespace

Pool& pool() {
  std::lock_guard<std::mutex> lock(pool_lock);
  if (!the_pool) the_pool = new Pool(default_threads());
  return *the_pool;
}

void set_threads(int n) {
  std::lock_guard<std::mutex> lock(pool_lock);
  delete the_pool;
  the_pool = new Pool(n > 0 ? n : default_threads());
}

}  // namespace internjax
