// Hopper's own instructions on the CPU, for tests without a GPU: the functions of hopper.h, written from the PTX ISA
// and not from the kernels that use them.
//
// What comes asynchronously comes as late as the rules allow: copies and products when no thread can go on without, one
// at a time, products not before their group is waited for. Until then its destination holds NaN. So a missing wait, a
// wrong parity, a stage that is filled too early, a wrong swizzle give a wrong result in every run, not in one of a
// thousand. Shared memory starts as NaN. Misuse that a GPU would answer with a hang or worse ends the launch
// (kShimFailure) and says why.
//
// What it cannot show: memory ordering between threads; a fence_async_shared() that some of the threads lack, unless it
// is asked to look for that (hopper_shim_fence.h); registers changed under a product's way (ptxas sees these);
// clusters; the cost of anything.
#pragma once

#include "kernels/common/hopper_shim_store.h"
#include "kernels/common/hopper_shim_wgmma.h"

namespace u4d::hopper_shim {

struct NamedBarrier {
  int threads = 0, come = 0;
  unsigned generation = 0;
};
inline NamedBarrier named_barriers[16];

struct Wait {
  enum { kBarrier, kNamed, kProducts, kStoresRead, kStoresWritten } what;
  std::uint64_t* barrier;
  unsigned number;  // parity; generation; products; stores
  int id;
};
inline std::vector<Wait> waits;
inline std::vector<std::vector<int>> register_counts;  // what setmaxnreg asked for, by thread

inline void wait_for(Wait wait) {
  waits[static_cast<std::size_t>(host_shim::current)] = wait;
  host_shim::wait(host_shim::Waiting::kOther);
}

inline bool over(const Wait& wait, int thread) {
  if (wait.what == Wait::kBarrier) return barrier_at(wait.barrier).phase % 2 != wait.number;
  if (wait.what == Wait::kNamed) return named_barriers[wait.id].generation != wait.number;
  if (wait.what == Wait::kStoresRead) return store_queues[thread].read >= static_cast<int>(wait.number);
  if (wait.what == Wait::kStoresWritten) return store_queues[thread].written >= static_cast<int>(wait.number);
  return warpgroups[static_cast<std::size_t>(thread / kThreads)].done >= static_cast<int>(wait.number);
}

// All of a warpgroup change their registers alike, and together the threads have no more than the block began with.
inline void check_registers() {
  const int threads = static_cast<int>(register_counts.size()), launched = 65536 / threads / 8 * 8;
  int total = 0;
  for (int i = 0; i < threads; ++i) {
    const std::vector<int>& mine = register_counts[static_cast<std::size_t>(i)];
    if (mine != register_counts[static_cast<std::size_t>(i / kThreads * kThreads)]) {
      fail("setmaxnreg was not executed alike by all warps of warpgroup %d", i / kThreads);
    }
    total += mine.empty() ? launched : mine.back();
  }
  if (total > threads * launched) fail("setmaxnreg: %d registers wanted, %d there", total, threads * launched);
}

struct Hopper : host_shim::Extension {
  void begin_launch() override { late_writes.clear(); }
  void end_launch() override {
    for (const Write& write : late_writes) perform(write);
  }

  void begin_block(int threads) override {
    barriers.clear();
    loads.clear();
    store_queues.clear();
    barriers_fenced = false;
    begin_fences();
    std::fill(std::begin(named_barriers), std::end(named_barriers), NamedBarrier{});
    warpgroups.assign(static_cast<std::size_t>(threads / kThreads), {});
    waits.assign(static_cast<std::size_t>(threads), {});
    register_counts.assign(static_cast<std::size_t>(threads), {});
  }

  void end_block() override {
    if (!loads.empty()) fail("the block ended with %zu copies under way", loads.size());
    end_stores();
    check_all_products_waited_for();
    check_registers();
  }

  void ran(int thread) override { notice_stores(thread); }

  bool ready(int thread) override { return over(waits[static_cast<std::size_t>(thread)], thread); }

  bool advance() override {
    const std::vector<Warpgroup*> groups = ready_warpgroups();
    const std::vector<StoreQueue*> queues = wanted_stores();
    const std::size_t until_groups = loads.size() + groups.size(), all = until_groups + queues.size();
    if (all == 0) return false;
    const std::size_t chosen = random_below(all);
    if (chosen < loads.size()) {
      perform_load(chosen);
    } else if (chosen < until_groups) {
      finish_products(*groups[chosen - loads.size()]);
    } else {
      go_on(*queues[chosen - until_groups]);
    }
    return true;
  }

  std::string waits_for(int thread) override {
    const Wait& wait = waits[static_cast<std::size_t>(thread)];
    char text[200];
    if (wait.what == Wait::kBarrier) {
      const Barrier& barrier = barriers[wait.barrier];
      std::snprintf(text, sizeof(text), "for parity %u of %s (phase %u, %u of %u arrivals and %lld bytes missing)",
                    wait.number, name_of(wait.barrier).c_str(), barrier.phase, barrier.missing, barrier.arrivals,
                    static_cast<long long>(barrier.bytes));
    } else if (wait.what == Wait::kNamed) {
      const NamedBarrier& barrier = named_barriers[wait.id];
      std::snprintf(text, sizeof(text), "at named barrier %d (%d of %d threads have come)", wait.id, barrier.come,
                    barrier.threads);
    } else {
      std::snprintf(text, sizeof(text), "for products that other threads of warpgroup %d have not issued",
                    thread / kThreads);
    }
    return text;
  }
};
inline Hopper hopper;
inline const bool installed = (host_shim::extension = &hopper, true);

inline void come_to(int id, int threads) {
  if (id < 0 || id > 15 || threads < 32 || threads > 1024 || threads % 32) {
    fail("named barrier %d for %d threads: expected 0 to 15, and whole warps", id, threads);
  }
  NamedBarrier& barrier = named_barriers[id];
  if (barrier.come && barrier.threads != threads) {
    fail("named barrier %d: %d threads are expected by some and %d by others", id, barrier.threads, threads);
  }
  barrier.threads = threads;
  if (++barrier.come < threads) return;
  barrier.come = 0;
  ++barrier.generation;
}

inline void set_registers(int count) {
  if (count < 24 || count > 256 || count % 8) fail("setmaxnreg: expected a multiple of 8 in 24 to 256, got %d", count);
  register_counts[static_cast<std::size_t>(host_shim::current)].push_back(count);
}

}  // namespace u4d::hopper_shim

namespace u4d::hopper {

constexpr int kWarpgroup = 128;

enum class Swizzle : std::uint64_t { kNone = 0, k128Bytes = 1, k64Bytes = 2, k32Bytes = 3 };

inline std::uint32_t shared_address(const void* pointer) {
  return hopper_shim::shared_offset(pointer, 0, "an address");
}

inline void barrier_init(std::uint64_t* barrier, unsigned arrivals) {
  if (arrivals < 1 || arrivals > hopper_shim::kMaxCount) hopper_shim::fail("a barrier of %u arrivals", arrivals);
  if (reinterpret_cast<std::uintptr_t>(barrier) % 8) hopper_shim::fail("a barrier that is not aligned to 8 bytes");
  if (hopper_shim::barriers.count(barrier)) hopper_shim::fail("barrier_init of a barrier in use");
  hopper_shim::barriers[barrier] = {arrivals, arrivals};
  *barrier = hopper_shim::kBarrierMark;
  hopper_shim::barriers_fenced = false;
}

inline void fence_barrier_init() { hopper_shim::barriers_fenced = true; }
inline void barrier_arrive(std::uint64_t* barrier) { hopper_shim::arrive(barrier, 0); }
inline void barrier_arrive_expect(std::uint64_t* barrier, unsigned bytes) { hopper_shim::arrive(barrier, bytes); }

// A thread looks again each time it could run: two phases gone by meanwhile keep it waiting, as they may on a GPU.
inline void barrier_wait(std::uint64_t* barrier, unsigned parity) {
  if (parity > 1) hopper_shim::fail("barrier_wait for parity %u", parity);
  const hopper_shim::Wait wait{hopper_shim::Wait::kBarrier, barrier, parity, 0};
  while (!hopper_shim::over(wait, host_shim::current)) hopper_shim::wait_for(wait);
}

inline void named_barrier_sync(int id, int threads) {
  const unsigned generation = hopper_shim::named_barriers[id & 15].generation;
  const hopper_shim::Wait wait{hopper_shim::Wait::kNamed, nullptr, generation, id};
  hopper_shim::come_to(id, threads);
  if (!hopper_shim::over(wait, host_shim::current)) hopper_shim::wait_for(wait);
}

inline void named_barrier_arrive(int id, int threads) { hopper_shim::come_to(id, threads); }

template <int kRegisters>
void registers_decrease() {
  hopper_shim::set_registers(kRegisters);
}
template <int kRegisters>
void registers_increase() {
  hopper_shim::set_registers(kRegisters);
}

inline void prefetch_tensor_map(const CUtensorMap*) {}

inline void tma_load_3d(void* shared, const CUtensorMap* map, std::uint64_t* barrier, int c0, int c1, int c2) {
  hopper_shim::issue_load(shared, map, barrier, {c0, c1, c2});
}
inline void tma_load_4d(void* shared, const CUtensorMap* map, std::uint64_t* barrier, int c0, int c1, int c2, int c3) {
  hopper_shim::issue_load(shared, map, barrier, {c0, c1, c2, c3});
}
inline void tma_load_5d(void* shared, const CUtensorMap* map, std::uint64_t* barrier, int c0, int c1, int c2, int c3,
                        int c4) {
  hopper_shim::issue_load(shared, map, barrier, {c0, c1, c2, c3, c4});
}

inline void tma_store_4d(const CUtensorMap* map, const void* shared, int c0, int c1, int c2, int c3) {
  hopper_shim::issue_store(map, shared, {c0, c1, c2, c3});
}

inline void store_commit() {
  hopper_shim::StoreQueue& mine = hopper_shim::my_stores();
  mine.commits.push_back(mine.issued);
}

template <int kPending>
void store_wait_read() {
  const int until = hopper_shim::my_stores().committed_before(kPending);
  hopper_shim::my_stores().wanted_read = std::max(hopper_shim::my_stores().wanted_read, until);
  const hopper_shim::Wait wait{hopper_shim::Wait::kStoresRead, nullptr, static_cast<unsigned>(until), 0};
  if (!hopper_shim::over(wait, host_shim::current)) hopper_shim::wait_for(wait);
}

template <int kPending>
void store_wait() {
  store_wait_read<kPending>();
  const int until = hopper_shim::my_stores().committed_before(kPending);
  hopper_shim::my_stores().wanted_written = std::max(hopper_shim::my_stores().wanted_written, until);
  const hopper_shim::Wait wait{hopper_shim::Wait::kStoresWritten, nullptr, static_cast<unsigned>(until), 0};
  if (!hopper_shim::over(wait, host_shim::current)) hopper_shim::wait_for(wait);
}

inline void fence_async_shared() { hopper_shim::fence_stores(host_shim::current); }

inline void wgmma_fence() { hopper_shim::my_lane().fenced = true; }

inline void wgmma_commit() {
  hopper_shim::Lane& lane = hopper_shim::my_lane();
  lane.commits.push_back(lane.issued);
}

template <int kPending>
void wgmma_wait() {
  hopper_shim::Warpgroup& group = hopper_shim::my_warpgroup();
  hopper_shim::Lane& lane = hopper_shim::my_lane();
  lane.fenced = false;
  if (lane.commits.size() <= kPending) return;
  const int until = lane.commits[lane.commits.size() - 1 - kPending];
  const hopper_shim::Wait wait{hopper_shim::Wait::kProducts, nullptr, static_cast<unsigned>(until), 0};
  group.wanted = std::max(group.wanted, until);
  if (!hopper_shim::over(wait, host_shim::current)) hopper_shim::wait_for(wait);
  hopper_shim::give_back_registers(group, lane, until);
}

template <class T, int kCount>
void hold_registers(T (&)[kCount]) {}

inline void order_after(float) {}

inline std::uint64_t shared_descriptor(const void* shared, unsigned leading_bytes, unsigned stride_bytes,
                                       Swizzle swizzle) {
  const std::uint64_t start = shared_address(shared);
  if (start % 16 || leading_bytes % 16 || stride_bytes % 16) {
    hopper_shim::fail("a matrix descriptor's start, leading and stride bytes: expected multiples of 16");
  }
  if (leading_bytes >= 1u << 18 || stride_bytes >= 1u << 18)
    hopper_shim::fail("a matrix descriptor's stride is too long");
  return start >> 4 | static_cast<std::uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<std::uint64_t>(stride_bytes >> 4) << 32 | static_cast<std::uint64_t>(swizzle) << 62;
}

inline std::uint64_t advance(std::uint64_t descriptor, unsigned bytes) {
  if (bytes % 16) hopper_shim::fail("a matrix descriptor advances by %u bytes: expected a multiple of 16", bytes);
  return descriptor + (bytes >> 4);
}

inline float exp2_approx(float x) { return std::exp2(x); }

inline std::uint16_t round_to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;  // the NaN that cvt gives
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline std::uint32_t pack_bf16(float low, float high) {
  return round_to_bfloat16(low) | static_cast<std::uint32_t>(round_to_bfloat16(high)) << 16;
}

// To the nearest e4m3, of two the even one; beyond 448 is 448. With 4 bits of fraction a number below 2^(e+1) is a
// multiple of 2^(e-3), and none is finer than 2^-9.
inline std::uint32_t round_to_e4m3(float value) {
  if (value != value) return 0x7f;  // the NaN that cvt gives
  const std::uint32_t sign = std::signbit(value) ? 0x80 : 0;
  const float size = std::min(std::fabs(value), 448.0f);
  const int exponent = std::max(size > 0 ? std::ilogb(size) : -6, -6);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));  // 8 to 16; below 2^-6 less
  return sign | static_cast<std::uint32_t>((exponent + 6) * 8 + steps);
}

inline std::uint32_t pack_e4m3(float first, float second, float third, float fourth) {
  return round_to_e4m3(first) | round_to_e4m3(second) << 8 | round_to_e4m3(third) << 16 | round_to_e4m3(fourth) << 24;
}

template <int N>
void wgmma_shared(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, int accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  hopper_shim::issue_product({hopper_shim::Factor::kBfloat16, N, false, true, accumulate != 0, a, b}, d, nullptr);
}

template <int N>
void wgmma_registers(float (&d)[N / 2], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                     std::uint64_t b, int accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  const std::uint32_t fragment[] = {a0, a1, a2, a3};
  hopper_shim::issue_product({hopper_shim::Factor::kBfloat16, N, true, false, accumulate != 0, 0, b}, d, fragment);
}

template <int N>
void wgmma_shared_e4m3(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, int accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  hopper_shim::issue_product({hopper_shim::Factor::kE4m3, N, false, true, accumulate != 0, a, b}, d, nullptr);
}

template <int N>
void wgmma_registers_e4m3(float (&d)[N / 2], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                          std::uint64_t b, int accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  const std::uint32_t fragment[] = {a0, a1, a2, a3};
  hopper_shim::issue_product({hopper_shim::Factor::kE4m3, N, true, true, accumulate != 0, 0, b}, d, fragment);
}

}  // namespace u4d::hopper
