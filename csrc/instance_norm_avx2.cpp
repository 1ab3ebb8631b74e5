#define CYCLEGAN_KERNELS kernels_avx2
#include "instance_norm_kernels.inl"
