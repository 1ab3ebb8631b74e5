#define CYCLEGAN_CONV conv_portable
#include "conv_kernels.inl"
