"""TiC and MSA-Conv in OpenMMLab's registries: ``custom_imports = dict(imports=['tic_backbone.openmmlab'])``.

One registration in mmengine's root registry serves mmdet, mmsegmentation and mmpretrain alike.
"""

import copy
import pickle

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS

from tic_backbone import layers, tic
from tic_backbone.checkpoint import LoadReport, load_weights, read_checkpoint, strip_prefix
from tic_backbone.swap import swap_backbone

__all__ = ["MSAConv2d", "TiC", "load_pretrained", "read_mm_checkpoint", "swap_backbone"]


@MODELS.register_module()
class MSAConv2d(layers.MSAConv2d):
    """`tic_backbone.MSAConv2d` as ``conv_cfg=dict(type='MSAConv2d', heads=4)``.

    ``heads`` stands for ``groups``, which mmcv's ``ConvModule`` gives itself.
    """

    def __init__(self, *args, heads: int | None = None, **fields) -> None:
        super().__init__(*args, **(fields if heads is None else {**fields, "groups": heads}))


@MODELS.register_module()
class TiC(tic.TiC, BaseModule):
    """`tic_backbone.TiC` with ``init_cfg``.

    ``init_cfg=dict(type='Pretrained', checkpoint=...)`` loads the backbone from a checkpoint, by path or address, of a
    backbone, classifier, detector or segmentor; ``prefix='backbone.'`` says where in it, if that is not plain. A report
    of what did not match goes to the log. A checkpoint of which less than 90 % matches is an error, unless
    ``min_matched`` asks for less.
    """

    def __init__(self, arch: str | dict = "tiny", init_cfg: dict | None = None, **fields) -> None:
        if init_cfg is not None and (
            init_cfg.get("type") != "Pretrained" or {*init_cfg} - {"prefix", "min_matched"} != {"type", "checkpoint"}
        ):
            raise ValueError(
                "init_cfg can only be dict(type='Pretrained', checkpoint=..., prefix=..., min_matched=...), "
                f"got {init_cfg}"
            )
        super().__init__(arch, **fields)
        self.init_cfg = copy.deepcopy(init_cfg)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The maps in NCHW memory, which is all that mmcv's own operators take."""
        return tuple(out.contiguous() for out in super().forward(x))

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names; without it keep the constructor's random weights."""
        if self.init_cfg and not self.is_init:
            load_pretrained(self, **{key: value for key, value in self.init_cfg.items() if key != "type"})
        self._is_init = True

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """(layer, number of layers) of a parameter, for layer-wise decay: stem, each block, what comes after.

        The downsampling between stages belongs to the block after it.
        """
        depths = self.config.depths
        last = sum(depths) + 1
        part, *numbers = param_name.removeprefix(prefix).split(".")
        if not param_name.startswith(prefix) or part not in ("stem", "stages"):
            return last, last + 1
        if part == "stem":
            return 0, last + 1
        stage, index = int(numbers[0]), int(numbers[1])
        return sum(depths[:stage]) + max(index, 1), last + 1


def load_pretrained(
    backbone: tic.TiC, checkpoint: str, prefix: str | None = None, min_matched: float = 0.9
) -> LoadReport:
    """Load `checkpoint`, a path or an address, and log what did not match.

    Without a prefix, the first TiC in the checkpoint is taken, wherever it is. Raises ValueError where less than the
    share `min_matched` of the backbone's weights would be loaded.
    """
    weights = read_mm_checkpoint(checkpoint)
    if prefix is None:
        first = "stem.0.weight"
        prefix = next((name.removesuffix(first) for name in weights if name.endswith(first)), "")
    report = load_weights(backbone, strip_prefix(weights, prefix) if prefix else weights, min_matched)
    print_log(f"{checkpoint}: {report}", logger="current")
    return report


def read_mm_checkpoint(path: str) -> dict:
    """The tensors by name in a checkpoint of mmengine, which holds log history and numpy scalars besides."""
    reconstruct, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "uint32", "uint8", "bool")}
    history = (_history_method, "builtins.getattr")
    # Whichever numpy wrote the file: version 2 renamed the module of these two.
    arrays = [(f, f"numpy.{core}.multiarray.{f.__name__}") for f in (reconstruct, scalar) for core in ("core", "_core")]
    return read_checkpoint(path, [HistoryBuffer, history, *arrays, np.ndarray, np.dtype, *dtypes])


def _history_method(owner: type, name: str):
    """Stands in for the `getattr` that a HistoryBuffer's state calls: the real one would open every door."""
    if owner is HistoryBuffer and name in ("current", "max", "mean", "min"):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f"the file asks for {name} of {owner}")
