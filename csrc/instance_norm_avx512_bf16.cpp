#define CYCLEGAN_KERNELS kernels_avx512_bf16
#define CYCLEGAN_AVX512_BF16
#include "instance_norm_kernels.inl"
