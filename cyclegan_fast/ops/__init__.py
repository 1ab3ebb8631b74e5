"""Fused operations. Each is one file: formula, reference, kernels, launchers, registration, public function."""

from cyclegan_fast.ops.crop_flip import crop_flip
from cyclegan_fast.ops.image_pool import pool_exchange
from cyclegan_fast.ops.instance_norm import instance_norm
from cyclegan_fast.ops.reflect_conv import reflect_conv2d

__all__ = ["crop_flip", "instance_norm", "pool_exchange", "reflect_conv2d"]
