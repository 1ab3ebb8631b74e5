#define CYCLEGAN_CONV conv_avx512
#include "conv_kernels.inl"
