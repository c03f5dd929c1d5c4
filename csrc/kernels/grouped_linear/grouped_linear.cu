#include "kernels/grouped_linear/grouped_linear.h"

#include <climits>

#include "kernels/grouped_linear/consume.cuh"

namespace u4d {
namespace {

constexpr int kThreads = (1 + linear::kConsumers) * hopper::kWarpgroup;

// One block per SM; it takes tile after tile.
template <class Product>
__global__ __launch_bounds__(kThreads, 1) void linear_kernel(const __grid_constant__ CUtensorMap x_map,
                                                             const __grid_constant__ CUtensorMap weight_map,
                                                             const __grid_constant__ CUtensorMap out_map,
                                                             const __grid_constant__ linear::Problem problem) {
  U4D_DYNAMIC_SHARED(dynamic);
  const linear::Memory<Product> memory(dynamic);
  if (threadIdx.x == 0) {
    hopper::prefetch_tensor_map(&x_map);
    hopper::prefetch_tensor_map(&weight_map);
    hopper::prefetch_tensor_map(&out_map);
    memory.init_barriers();
  }
  __syncthreads();
  // 128 * 24 + 256 * 240 registers are just within the 65,536 of an SM.
  if (threadIdx.x < hopper::kWarpgroup) {
    hopper::registers_decrease<24>();
    if (threadIdx.x == 0) linear::produce<Product>(memory, &x_map, &weight_map, problem);
  } else {
    hopper::registers_increase<240>();
    linear::consume<Product>(memory, &out_map, problem);
  }
}

struct Operand {
  const void* data;
  int64_t rows, stream_stride, row_stride;
};

// Rows of `depth` channels of all streams; one copy brings `box_rows` rows of `box_depth` channels.
TensorLayout layout_of(const linear::Problem& problem, const Operand& operand, int64_t depth, int box_rows,
                       int box_depth, CUtensorMapDataType type) {
  // A dimension of one element may come with any stride: it gets that of a dense tensor.
  const int64_t row = operand.rows > 1 ? operand.row_stride : depth;
  const int64_t of_stream = problem.streams > 1 ? operand.stream_stride : operand.rows * row;
  return {{depth, operand.rows, problem.streams, 1},
          {1, row, of_stream, problem.streams * of_stream},
          {box_depth, box_rows, 1, 1},
          type};
}

template <class Product>
Status launch(void* stream, const linear::Problem& problem, const Operand& x, const Operand& weight, uint16_t* out) {
  using Memory = linear::Memory<Product>;
  CUtensorMap x_map, weight_map, out_map;
  const Operand result{out, problem.rows, int64_t(problem.rows) * problem.columns, problem.columns};
  Status status = encode_tensor_map(
      &x_map, x.data, layout_of(problem, x, problem.depth, linear::kTileRows, Product::kStageDepth, Product::kType));
  if (status == kOk) {
    status = encode_tensor_map(
        &weight_map, weight.data,
        layout_of(problem, weight, problem.depth, Product::kTileColumns, Product::kStageDepth, Product::kType));
  }
  if (status == kOk) {
    status = encode_tensor_map(&out_map, out,
                               layout_of(problem, result, problem.columns, linear::kConsumerRows, linear::kPartColumns,
                                         CU_TENSOR_MAP_DATA_TYPE_BFLOAT16));
  }
  if (status == kOk) status = allow_shared_memory(linear_kernel<Product>, Memory::kBytes);
  int multiprocessors = 0;
  if (status == kOk) status = count_multiprocessors(&multiprocessors);
  if (status != kOk) return status;
  const int64_t tiles = int64_t(problem.streams) * blocks_for(problem.rows, linear::kTileRows) *
                        blocks_for(problem.columns, Product::kTileColumns);
  if (tiles > INT_MAX / 2) return kTooLarge;  // block numbers go on past the last tile
  const int64_t blocks = tiles < multiprocessors ? tiles : multiprocessors;
  U4D_LAUNCH(linear_kernel<Product>, static_cast<unsigned int>(blocks), kThreads, Memory::kBytes, stream, x_map,
             weight_map, out_map, problem);
  return launch_status();
}

// Fills in what both precisions have; kOk with no streams where there is nothing to do.
Status describe(const void* bias, int64_t bias_dtype, int64_t streams, int64_t rows, int64_t columns, int64_t depth,
                int64_t depth_multiple, int64_t gelu, linear::Problem* problem) {
  if (streams < 0 || rows < 0 || columns < 0 || depth < 1) return kInvalidArgument;
  if (columns % 8 || depth % depth_multiple) return kInvalidArgument;
  if (bias && bias_dtype != kFloat32 && bias_dtype != kBfloat16) return kInvalidArgument;
  constexpr int64_t kMost = INT_MAX - 256;  // tiles may reach past the end
  if (streams > kMost || rows > kMost || columns > kMost || depth > kMost) return kTooLarge;
  *problem = {};
  if (rows == 0 || columns == 0) return kOk;
  problem->streams = static_cast<int>(streams);
  problem->rows = static_cast<int>(rows);
  problem->columns = static_cast<int>(columns);
  problem->depth = static_cast<int>(depth);
  problem->bias = bias;
  problem->bias_is_float = bias_dtype == kFloat32;
  problem->gelu = gelu != 0;
  return kOk;
}

}  // namespace

Status grouped_linear_cuda(void* stream, const uint16_t* x, const uint16_t* weight, const void* bias, uint16_t* out,
                           int64_t bias_dtype, int64_t streams, int64_t rows, int64_t columns, int64_t depth,
                           int64_t x_stream_stride, int64_t x_row_stride, int64_t weight_stream_stride,
                           int64_t weight_row_stride, int64_t gelu) {
  linear::Problem problem;
  const Status status = describe(bias, bias_dtype, streams, rows, columns, depth, 8, gelu, &problem);
  if (status != kOk || problem.streams == 0) return status;
  return launch<linear::Bf16Product>(stream, problem, {x, rows, x_stream_stride, x_row_stride},
                                     {weight, columns, weight_stream_stride, weight_row_stride}, out);
}

Status grouped_linear_fp8_cuda(void* stream, const uint8_t* x, const float* x_scale, const uint8_t* weight,
                               const float* weight_scale, const void* bias, uint16_t* out, int64_t bias_dtype,
                               int64_t streams, int64_t rows, int64_t columns, int64_t depth, int64_t x_stream_stride,
                               int64_t x_row_stride, int64_t weight_stream_stride, int64_t weight_row_stride,
                               int64_t gelu) {
  linear::Problem problem;
  const Status status = describe(bias, bias_dtype, streams, rows, columns, depth, 16, gelu, &problem);
  if (status != kOk || problem.streams == 0) return status;
  problem.row_scale = x_scale;
  problem.column_scale = weight_scale;
  return launch<linear::E4m3Product>(stream, problem, {x, rows, x_stream_stride, x_row_stride},
                                     {weight, columns, weight_stream_stride, weight_row_stride}, out);
}

}  // namespace u4d
