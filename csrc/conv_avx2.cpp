#define CYCLEGAN_CONV conv_avx2
#include "conv_kernels.inl"
