"""TiC and MSA-Conv in OpenMMLab's registries: ``custom_imports = dict(imports=['tic_backbone.openmmlab'])``.

One registration in mmengine's root registry serves mmdet, mmsegmentation and mmpretrain alike.
"""

import copy
import pickle

import numpy as np
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS

from tic_backbone import tic
from tic_backbone.checkpoint import load_weights, read_checkpoint, strip_prefix
from tic_backbone.layers import MSAConv2d

MODELS.register_module(module=MSAConv2d)  # conv_cfg=dict(type="MSAConv2d")


@MODELS.register_module()
class TiC(tic.TiC, BaseModule):
    """`tic_backbone.TiC` with ``init_cfg``.

    ``init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.')`` loads a checkpoint by path or address;
    a report of what did not match goes to the log, and a checkpoint of which less than 90 % matches is an error.
    """

    def __init__(self, arch: str | dict = "tiny", init_cfg: dict | None = None, **fields) -> None:
        if init_cfg is not None and (
            init_cfg.get("type") != "Pretrained" or {*init_cfg} - {"prefix"} != {"type", "checkpoint"}
        ):
            raise ValueError(f"init_cfg can only be dict(type='Pretrained', checkpoint=..., prefix=...), got {init_cfg}")
        super().__init__(arch, **fields)
        self.init_cfg = copy.deepcopy(init_cfg)

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names; without it keep the constructor's random weights."""
        if self.init_cfg and not self.is_init:
            load_pretrained(self, self.init_cfg["checkpoint"], self.init_cfg.get("prefix"))
        self._is_init = True


def load_pretrained(backbone: tic.TiC, checkpoint: str, prefix: str | None = None) -> None:
    """Load `checkpoint`, a path or an address, and log what did not match."""
    weights = read_mm_checkpoint(checkpoint)
    report = load_weights(backbone, strip_prefix(weights, prefix) if prefix else weights)
    print_log(f"{checkpoint}: {report}", logger="current")


def read_mm_checkpoint(path: str) -> dict:
    """The tensors by name in a checkpoint of mmengine, which holds log history and numpy scalars besides."""
    reconstruct, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "uint32", "uint8", "bool")}
    history = (_history_method, "builtins.getattr")
    return read_checkpoint(path, [HistoryBuffer, history, reconstruct, scalar, np.ndarray, np.dtype, *dtypes])


def _history_method(owner: type, name: str):
    """Stands in for the `getattr` that a HistoryBuffer's state calls: the real one would open every door."""
    if owner is HistoryBuffer and name in ("current", "max", "mean", "min"):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f"the file asks for {name} of {owner}")
