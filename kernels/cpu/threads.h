// A pool that runs the parts of one job at a time; the caller works too.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace internjax {

class Pool {
 public:
  // `size` threads in all: the caller and size - 1 workers, each pinned to a CPU that this process
  // may use. Fewer where the system gives no more.
  explicit Pool(int size);
  ~Pool();

  // Calls part(i) once for every i in 0..count-1, on any thread and in any order; then returns.
  void run(int64_t count, const std::function<void(int64_t)>& part);

  int size() const { return static_cast<int>(workers_.size()) + 1; }

 private:
  void work(int cpu);
  bool take_part();

  std::vector<std::thread> workers_;
  std::vector<int> taken_;  // CPUs of the workers, where each has one of its own
  int home_ = -1;           // the CPU that is left for the caller
  std::mutex job_;  // held by the caller whose job runs
  const std::function<void(int64_t)>* part_ = nullptr;
  // A part is claimed by lowering `open_`; a job cannot end before its claimed parts do, so whoever
  // lowers it reads the `part_` of the same job.
  std::atomic<int64_t> open_{0}, unfinished_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
};

// The pool of this process; set_threads(n), between two jobs, makes it n threads, 0: as many as
// INTERNJAX_CPU_THREADS says, else as the CPUs that this process may use.
Pool& pool();
void set_threads(int n);

}  // namespace internjax
