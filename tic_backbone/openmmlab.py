"""TiC and MSA-Conv in OpenMMLab's registries: ``custom_imports = dict(imports=['tic_backbone.openmmlab'])``.

One registration in mmengine's root registry serves mmdet, mmsegmentation and mmpretrain alike.
"""

import copy

from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import get_torch_safe_globals

from tic_backbone import tic
from tic_backbone.checkpoint import load_weights, read_checkpoint, strip_prefix


@MODELS.register_module()
class TiC(tic.TiC, BaseModule):
    """`tic_backbone.TiC` with ``init_cfg``.

    ``init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.')`` loads a checkpoint by path or address;
    a report of what did not match goes to the log, and a checkpoint of which less than 90 % matches is an error.
    """

    def __init__(self, arch: str | dict = "tiny", init_cfg: dict | None = None, **fields) -> None:
        if init_cfg is not None and (not isinstance(init_cfg, dict) or init_cfg.get("type") != "Pretrained"):
            raise ValueError(f"TiC initialises itself; init_cfg can only be dict(type='Pretrained', ...), got {init_cfg}")
        super().__init__(arch, **fields)
        self.init_cfg = copy.deepcopy(init_cfg)

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names; without it keep the constructor's random weights."""
        if self.init_cfg and not self.is_init:
            load_pretrained(self, self.init_cfg["checkpoint"], self.init_cfg.get("prefix"))
        self._is_init = True


def load_pretrained(backbone: tic.TiC, checkpoint: str, prefix: str | None = None) -> None:
    """Load `checkpoint`, a path or an address, and log what did not match."""
    weights = read_checkpoint(checkpoint, get_torch_safe_globals())
    report = load_weights(backbone, strip_prefix(weights, prefix) if prefix else weights)
    print_log(f"{checkpoint}: {report}", logger="current")
