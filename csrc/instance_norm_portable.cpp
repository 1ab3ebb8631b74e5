#define CYCLEGAN_KERNELS kernels_portable
#include "instance_norm_kernels.inl"
