"""TiC: a vision backbone whose attention lives in a convolution's window. Imports torch and nothing else."""

from tic_backbone.layers import MSAConv2d
from tic_backbone.ops import choose_backend, cyclic_shift, msa_conv2d
from tic_backbone.tic import VARIANTS, TiC, TiCConfig

__all__ = ["VARIANTS", "MSAConv2d", "TiC", "TiCConfig", "choose_backend", "cyclic_shift", "msa_conv2d"]
__version__ = "0.1.0"
