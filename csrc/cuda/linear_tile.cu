#include "matmul.cuh"
namespace nf4::cuda {
bool tile_forward_takes(const Matmul&) { return false; }
size_t tile_forward_workspace(const Matmul&) { return 0; }
int tile_forward(const Matmul&, void*, cudaStream_t) { return 1; }
bool tile_backward_takes(const Matmul&) { return false; }
size_t tile_backward_workspace(const Matmul&) { return 0; }
int tile_backward(const Matmul&, void*, cudaStream_t) { return 1; }
}
