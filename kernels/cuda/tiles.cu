// Runs the blocks of bodies.h and positives.h on a GPU.
#include <cuda_runtime.h>

#include "bodies.h"

namespace tdro_tiles {

struct GpuBlock {
  template <class State>
  struct PerThread {
    State state;
    __device__ __forceinline__ State& of(int) { return state; }
  };

  int64_t index;
  LogSum* shared;

  template <class Each>
  __device__ __forceinline__ void each(Each each) const {
    each(int(threadIdx.x));
  }
  __device__ __forceinline__ void barrier() const { __syncthreads(); }
};

template <class Body>
__global__ void __launch_bounds__(kThreads, 2) run(const __grid_constant__ Body body) {
  __shared__ LogSum shared[Body::kShared];
  GpuBlock block{int64_t(blockIdx.x), shared};
  body(block);
}

template <class Body>
int launch(int64_t blocks, const Body& body, void* stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  run<<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(body);
  return cudaGetLastError();
}

}  // namespace tdro_tiles

#include "entry.h"

extern "C" const char* tdro_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
