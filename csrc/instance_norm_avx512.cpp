#define CYCLEGAN_KERNELS kernels_avx512
#include "instance_norm_kernels.inl"
