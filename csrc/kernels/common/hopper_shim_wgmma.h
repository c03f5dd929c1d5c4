// The tensor cores of hopper_shim.h: products of a warpgroup that come late.
//
// After the PTX ISA ("Asynchronous warpgroup level matrix instructions": fragments, "Canonical Layouts", "Matrix
// Descriptor Format"). A product is worked out when its group is waited for and no thread can go on otherwise, from
// what shared memory holds then; until a thread's wait is over its accumulators hold a NaN of their own. A from
// registers is read at once: that registers under way are left alone is seen by ptxas, not here. Sums are float32: that
// the tensor cores keep about 14 bits of a sum of e4m3 products is not emulated.
#pragma once

#include <deque>

#include "kernels/common/hopper_shim_tma.h"
#include "kernels/common/vectorise.h"

namespace u4d::hopper_shim {

constexpr int kThreads = 128, kRows = 64, kDepthBytes = 32;
constexpr int kMostDepth = 32, kMostColumns = 256;
constexpr std::uint32_t kUnderWay = 0x7f81dead;  // a signalling NaN: arithmetic with it gives another one

// Type of the factors.
enum class Factor { kBfloat16, kE4m3 };

inline int bytes_of(Factor factor) { return factor == Factor::kE4m3 ? 1 : 2; }

// How deep one product is: 32 bytes.
inline int depth_of(Factor factor) { return kDepthBytes / bytes_of(factor); }

// An operand in shared memory. `major_is_depth`: K-major, else MN-major.
struct Layout {
  unsigned start, leading, stride, span;
  bool major_is_depth;

  // The piece of 16 bytes that is number `i` along the contiguous dimension and number `j` along the other one.
  unsigned address(unsigned i, unsigned j) const {
    const unsigned per_span = span / 16;
    unsigned at = start + j % 8 * (span ? span : 16);
    if (major_is_depth) {
      at += j / 8 * stride + (span ? i * 16 : i * leading);
    } else if (span) {
      at += i % per_span * 16 + i / per_span * leading + j / 8 * stride;
    } else {
      at += i * stride + j / 8 * leading;
    }
    return swizzled(at, span);
  }
};

inline Layout decode(std::uint64_t descriptor, bool major_is_depth) {
  constexpr unsigned kSpans[] = {0, 128, 64, 32};
  const auto field = [&](int bit) { return static_cast<unsigned>(descriptor >> bit & 0x3fff) << 4; };
  constexpr std::uint64_t kUsed = 0xc00e'3fff'3fff'3fffull;
  if (descriptor & ~kUsed) fail("matrix descriptor %016llx has bits set that mean nothing", (long long)descriptor);
  if (descriptor >> 49 & 7) fail("a matrix descriptor's base offset is not emulated");
  return {field(0), field(16), field(32), kSpans[descriptor >> 62], major_is_depth};
}

inline float widen_bfloat16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline float widen_e4m3(unsigned char bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  if ((bits & 0x7f) == 0x7f) return std::nanf("");
  const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(1.0f * fraction, -9);
  return bits & 0x80 ? -size : size;
}

inline float widen(Factor factor, const unsigned char* from) {
  static const std::vector<float> e4m3 = [] {
    std::vector<float> values;
    for (int bits = 0; bits < 256; ++bits) values.push_back(widen_e4m3(static_cast<unsigned char>(bits)));
    return values;
  }();
  if (factor == Factor::kE4m3) return e4m3[*from];
  std::uint16_t bits;
  std::memcpy(&bits, from, 2);
  return widen_bfloat16(bits);
}

// The operand's `count` rows (of A) or columns (of B), as deep as a product is; element (index, depth) goes to
// to[index * by_index + depth * by_depth].
inline void read_operand(const Layout& layout, Factor factor, int count, float* to, int by_index, int by_depth) {
  const unsigned char* shared = async_view();
  const bool deep = layout.major_is_depth;
  const int per_piece = 16 / bytes_of(factor), depth_of_all = depth_of(factor);
  const int pieces = (deep ? depth_of_all : count) / per_piece, others = deep ? count : depth_of_all;
  for (int j = 0; j < others; ++j) {
    for (int i = 0; i < pieces; ++i) {
      const unsigned at = layout.address(static_cast<unsigned>(i), static_cast<unsigned>(j));
      if (at + 16 > static_cast<unsigned>(host_shim::dynamic_bytes)) fail("a product reads past the shared memory");
      for (int e = 0; e < per_piece; ++e) {
        const int index = deep ? j : i * per_piece + e, depth = deep ? i * per_piece + e : j;
        to[index * by_index + depth * by_depth] = widen(factor, shared + at + e * bytes_of(factor));
      }
    }
  }
}

// sum[64,columns] += a[64,depth] b[depth,columns].
U4D_CLONES __attribute__((noinline, optimize("O3"))) static void multiply_add(const float* __restrict__ a,
                                                                              const float* __restrict__ b,
                                                                              float* __restrict__ sum, int columns,
                                                                              int depth) {
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < depth; ++k) {
      const float factor = a[row * depth + k];
      for (int column = 0; column < columns; ++column) sum[row * columns + column] += factor * b[k * columns + column];
    }
  }
}

// One wgmma.mma_async.
struct Instruction {
  Factor factor;
  int columns;
  bool a_in_registers, b_major_is_depth, accumulate;
  std::uint64_t a, b;

  bool operator==(const Instruction& other) const {
    return factor == other.factor && columns == other.columns && a_in_registers == other.a_in_registers &&
           a == other.a && b == other.b && b_major_is_depth == other.b_major_is_depth && accumulate == other.accumulate;
  }
};

// What a warpgroup made of it. `fresh`: no older product under way writes to these accumulators.
struct Product {
  Instruction instruction;
  int accumulator, threads;  // that have issued it
  bool fresh;
  float fragment[kRows * kMostDepth];
};

// Registers of one thread that products under way write: `last` is the youngest of these products.
struct Held {
  float* registers;
  int columns, accumulator, last;
};

struct Lane {
  int issued = 0;
  std::vector<int> commits;  // products issued before each commit
  bool fenced = false;
  std::vector<Held> held;
};

struct Sum {
  std::vector<float> values;  // [64,columns]
  int threads = 0;            // whose registers it stands for
};

struct Warpgroup {
  Lane lanes[kThreads];
  std::deque<Product> products;  // those not worked out yet; the first is number `done`
  int done = 0, accumulators = 0;
  std::map<int, Sum> sums;  // by accumulator
  int wanted = 0;           // products before this one are waited for

  Product& product(int number) { return products[static_cast<std::size_t>(number - done)]; }
  bool issued_by_all(int until) {
    return until <= done ||
           (until <= done + static_cast<int>(products.size()) && product(until - 1).threads == kThreads);
  }
};
inline std::vector<Warpgroup> warpgroups;

inline Warpgroup& my_warpgroup() { return warpgroups[static_cast<std::size_t>(host_shim::current / kThreads)]; }
inline Lane& my_lane() { return my_warpgroup().lanes[host_shim::current % kThreads]; }

// Row and column of a thread's accumulator register.
inline int row_of(int lane, int index) { return lane / 32 * 16 + lane % 32 / 4 + index % 4 / 2 * 8; }
inline int column_of(int lane, int index) { return index / 4 * 8 + lane % 4 * 2 + index % 2; }

inline bool under_way(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits == kUnderWay;
}

inline Held* find_held(Lane& lane, float* registers, int columns) {
  for (Held& held : lane.held) {
    if (held.registers == registers && held.columns == columns) return &held;
    if (registers < held.registers + held.columns / 2 && held.registers < registers + columns / 2) {
      fail("a product on part of the accumulators of another product under way");
    }
  }
  return nullptr;
}

// The products' running sums take over the thread's registers.
inline Held* take_registers(Warpgroup& group, int accumulator, float* registers, int columns) {
  const int lane = host_shim::current % kThreads;
  std::vector<float>& sum = group.sums[accumulator].values;
  ++group.sums[accumulator].threads;
  sum.resize(static_cast<std::size_t>(kRows * columns));
  for (int i = 0; i < columns / 2; ++i) {
    sum[static_cast<std::size_t>(row_of(lane, i) * columns + column_of(lane, i))] = registers[i];
    std::memcpy(&registers[i], &kUnderWay, 4);
  }
  group.lanes[lane].held.push_back({registers, columns, accumulator, 0});
  return &group.lanes[lane].held.back();
}

// What a thread's four registers of A bring: 4 bytes each, which lie one after the other in a row.
inline void keep_fragment(Product& product, const std::uint32_t* fragment) {
  const int index = host_shim::current % kThreads;
  const Factor factor = product.instruction.factor;
  const int each = 4 / bytes_of(factor);  // elements of a register
  for (int number = 0; number < 4; ++number) {
    const int row = index / 32 * 16 + index % 32 / 4 + number % 2 * 8, first = (index % 4 + number / 2 * 4) * each;
    unsigned char bytes[4];
    std::memcpy(bytes, &fragment[number], 4);
    for (int e = 0; e < each; ++e) {
      product.fragment[row * depth_of(factor) + first + e] = widen(factor, bytes + e * bytes_of(factor));
    }
  }
}

inline void issue_product(const Instruction& instruction, float* registers, const std::uint32_t* fragment) {
  if (static_cast<std::size_t>(host_shim::current / kThreads) >= warpgroups.size())
    fail("a product by half a warpgroup");
  Warpgroup& group = my_warpgroup();
  Lane& lane = my_lane();
  Held* held = find_held(lane, registers, instruction.columns);
  if (!lane.fenced && (!held || fragment)) fail("a product without wgmma_fence since the last wgmma_wait");
  if (lane.issued - group.done == static_cast<int>(group.products.size())) {
    group.products.emplace_back();
    Product& first = group.products.back();
    first.instruction = instruction;
    first.threads = 0;
    first.fresh = !held;
    first.accumulator = held ? held->accumulator : group.accumulators++;
  }
  Product& product = group.product(lane.issued);
  if (!(product.instruction == instruction)) fail("the threads of a warpgroup issue different products");
  if (product.fresh != !held || (held && held->accumulator != product.accumulator)) {
    fail("the threads of a warpgroup issue a product on different accumulators");
  }
  if (!held) held = take_registers(group, product.accumulator, registers, instruction.columns);
  held->last = lane.issued++;
  ++product.threads;
  if (fragment) keep_fragment(product, fragment);
}

inline void work_out(Warpgroup& group, const Product& product) {
  static float a[kRows * kMostDepth], b[kMostDepth * kMostColumns];
  const Instruction& given = product.instruction;
  std::vector<float>& sum = group.sums[product.accumulator].values;
  if (!given.accumulate) std::fill(sum.begin(), sum.end(), 0.0f);
  const int depth = depth_of(given.factor);
  if (!given.a_in_registers) read_operand(decode(given.a, true), given.factor, kRows, a, depth, 1);
  read_operand(decode(given.b, given.b_major_is_depth), given.factor, given.columns, b, 1, given.columns);
  multiply_add(given.a_in_registers ? product.fragment : a, b, sum.data(), given.columns, depth);
}

// The thread's registers get the sums that no younger product still works on.
inline void give_back_registers(Warpgroup& group, Lane& lane, int until) {
  const int index = static_cast<int>(&lane - group.lanes);
  for (std::size_t h = lane.held.size(); h-- > 0;) {
    const Held held = lane.held[h];
    if (held.last >= until) continue;
    const std::vector<float>& sum = group.sums[held.accumulator].values;
    for (int i = 0; i < held.columns / 2; ++i) {
      if (!under_way(held.registers[i])) fail("an accumulator was written while a product on it was under way");
      held.registers[i] = sum[static_cast<std::size_t>(row_of(index, i) * held.columns + column_of(index, i))];
    }
    if (--group.sums[held.accumulator].threads == 0) group.sums.erase(held.accumulator);
    lane.held.erase(lane.held.begin() + static_cast<std::ptrdiff_t>(h));
  }
}

// Warpgroups with products that are waited for and that all threads have issued.
inline std::vector<Warpgroup*> ready_warpgroups() {
  std::vector<Warpgroup*> ready;
  for (Warpgroup& group : warpgroups) {
    if (group.done < group.wanted && group.issued_by_all(group.wanted)) ready.push_back(&group);
  }
  return ready;
}

inline void finish_products(Warpgroup& group) {
  for (; group.done < group.wanted; ++group.done) {
    work_out(group, group.products.front());
    group.products.pop_front();
  }
}

inline void check_all_products_waited_for() {
  for (Warpgroup& group : warpgroups) {
    for (const Lane& lane : group.lanes) {
      if (!lane.held.empty()) fail("the block ended with products under way");
    }
  }
}

}  // namespace u4d::hopper_shim
