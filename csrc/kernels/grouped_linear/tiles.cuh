// The tiles of a grouped linear layer: their size in each precision, their order, and their shared memory.
#pragma once

#include "kernels/common/hopper.h"
#include "kernels/common/launch.h"
#include "kernels/common/stages.h"
#include "kernels/common/tensor_map.h"

namespace u4d::linear {

constexpr int kConsumers = 2;  // warpgroups that compute, each for half of the rows of a tile
constexpr int kTileRows = 128;
constexpr int kConsumerRows = kTileRows / kConsumers;
constexpr int kRowBytes = 128;    // of a row of a stage, and of a part of the result
constexpr int kStepBytes = 32;    // of a row, for one instruction
constexpr int kPartColumns = 64;  // of the result, that a consumer stores at a time

// 16 tiles of 128 rows and 8 of 256 columns are a square, and about one tile for each SM.
constexpr unsigned kMostPanelTiles = 16;

// Of bfloat16. 128 sums a thread.
struct Bf16Product {
  static constexpr int kTileColumns = 256;
  static constexpr int kStageDepth = 64;  // channels of a stage
  static constexpr int kStages = 4;
  static constexpr bool kScaled = false;
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

  static __device__ __forceinline__ void multiply(float (&sums)[kTileColumns / 2], uint64_t x, uint64_t weight,
                                                  int accumulate) {
    hopper::wgmma_shared<kTileColumns>(sums, x, weight, accumulate);
  }
};

// Of e4m3. The tensor core's own sum keeps about 14 bits, too few for thousands of channels, so each stage has sums of
// its own, which are added up in float32: 2 x 96 numbers a thread. 2 x 128 would be more than a thread can have.
struct E4m3Product {
  static constexpr int kTileColumns = 192;
  static constexpr int kStageDepth = 128;
  static constexpr int kStages = 4;
  static constexpr bool kScaled = true;
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_UINT8;

  static __device__ __forceinline__ void multiply(float (&sums)[kTileColumns / 2], uint64_t x, uint64_t weight,
                                                  int accumulate) {
    hopper::wgmma_shared_e4m3<kTileColumns>(sums, x, weight, accumulate);
  }
};

struct Problem {
  int streams, rows, columns, depth;
  const void* bias;  // may be null
  bool bias_is_float;
  bool gelu;
  const float *row_scale, *column_scale;  // where the product is scaled
};

// Where a tile begins.
struct Tile {
  int stream, row, column;
};

// Hands out the tiles to the blocks of a persistent grid: stream by stream, and in a stream panel by panel of at most
// kMostPanelTiles tiles of rows. Neighbouring blocks share a tile of the weight, and blocks that run at the same time
// need few rows of x and of the weight altogether, so most of them come from L2.
template <class Product>
struct Tiles {
  unsigned row_tiles, column_tiles, panel_tiles;
  unsigned next, count;

  __device__ __forceinline__ explicit Tiles(const Problem& problem)
      : row_tiles(static_cast<unsigned>(problem.rows + kTileRows - 1) / kTileRows),
        column_tiles(static_cast<unsigned>(problem.columns + Product::kTileColumns - 1) / Product::kTileColumns),
        next(blockIdx.x),
        count(static_cast<unsigned>(problem.streams) * row_tiles * column_tiles) {
    const unsigned panels = (row_tiles + kMostPanelTiles - 1) / kMostPanelTiles;
    panel_tiles = (row_tiles + panels - 1) / panels;  // all panels about alike
  }

  __device__ __forceinline__ bool take(Tile* tile) {
    if (next >= count) return false;
    const unsigned in_stream = next % (row_tiles * column_tiles), panel_size = panel_tiles * column_tiles;
    const unsigned first = in_stream / panel_size * panel_tiles, in_panel = in_stream % panel_size;
    const unsigned height = row_tiles - first < panel_tiles ? row_tiles - first : panel_tiles;
    tile->stream = static_cast<int>(next / (row_tiles * column_tiles));
    tile->row = static_cast<int>((first + in_panel % height) * kTileRows);
    tile->column = static_cast<int>(in_panel / height * Product::kTileColumns);
    next += gridDim.x;
    return true;
  }
};

// Stages of rows of x and of the weight, parts of the result on their way out, and what belongs to the columns of a
// tile; 16-byte pieces of rows are permuted.
template <class Product>
struct Memory {
  static constexpr int kStages = Product::kStages;
  static constexpr int kXBytes = kTileRows * kRowBytes, kWeightBytes = Product::kTileColumns * kRowBytes;
  static constexpr int kStageBytes = kXBytes + kWeightBytes;
  static constexpr int kPartBytes = kConsumerRows * kRowBytes;
  static constexpr int kParts = 2;  // of each consumer: one is written while the other is stored
  static constexpr int kTableBytes = Product::kTileColumns * static_cast<int>(sizeof(float));
  static constexpr int kTables = Product::kScaled ? 2 : 1;  // of each consumer
  static constexpr int kBarriers = 2 * kStages;
  // What is declared to be aligned to 1024 bytes is so to 128 in any case.
  static constexpr int kAlignment = 1024, kSlack = kAlignment - 128;
  static constexpr int kBytes =
      kSlack + kStages * kStageBytes + kConsumers * (kParts * kPartBytes + kTables * kTableBytes) + kBarriers * 8;
  static_assert(kBytes <= 227 * 1024);

  unsigned char* base;

  __device__ __forceinline__ explicit Memory(unsigned char* dynamic) : base(aligned_shared<kAlignment>(dynamic)) {}

  __device__ __forceinline__ unsigned char* x(int stage) const { return base + stage * kStageBytes; }
  __device__ __forceinline__ unsigned char* weight(int stage) const { return x(stage) + kXBytes; }
  __device__ __forceinline__ unsigned char* part(int consumer, int part) const {
    return x(kStages) + (consumer * kParts + part) * kPartBytes;
  }
  __device__ __forceinline__ float* table(int consumer, int table) const {
    return reinterpret_cast<float*>(part(kConsumers, 0) + (consumer * kTables + table) * kTableBytes);
  }

  // Full: the copies have come. Empty: all warps that compute have read them.
  __device__ __forceinline__ uint64_t* full(int stage) const {
    return reinterpret_cast<uint64_t*>(table(kConsumers, 0)) + stage;
  }
  __device__ __forceinline__ uint64_t* empty(int stage) const { return full(kStages + stage); }

  // By one thread.
  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::barrier_init(full(stage), 1);
      hopper::barrier_init(empty(stage), kConsumers * hopper::kWarpgroup / kWarp);
    }
    hopper::fence_barrier_init();
  }
};

// One thread of the block: brings what the others compute with, as far ahead as there is room, also of the next tile.
template <class Product>
__device__ __forceinline__ void produce(const Memory<Product>& memory, const CUtensorMap* x_map,
                                        const CUtensorMap* weight_map, const Problem& problem) {
  Ring<Product::kStages> ring;
  Tiles<Product> tiles(problem);
  for (Tile tile; tiles.take(&tile);) {
    for (int channel = 0; channel < problem.depth; channel += Product::kStageDepth, ring.advance()) {
      uint64_t* full = memory.full(ring.stage);
      hopper::barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
      hopper::barrier_arrive_expect(full, Memory<Product>::kStageBytes);
      hopper::tma_load_4d(memory.x(ring.stage), x_map, full, channel, tile.row, tile.stream, 0);
      hopper::tma_load_4d(memory.weight(ring.stage), weight_map, full, channel, tile.column, tile.stream, 0);
    }
  }
}

}  // namespace u4d::linear
