"""TiC in timm: ``import tic_backbone.timm``, then ``timm.create_model("tic_tiny", num_classes=10)``.

Every field of `tic_backbone.TiCConfig` can be given to ``create_model`` too. No weights are published, so
``pretrained=True`` is an error. TorchScript is not supported: use ``torch.compile`` or ``torch.export``.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import NormMlpClassifierHead
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import nn

from tic_backbone import tic
from tic_backbone.layers import Linear2d, MSAConv2d
from tic_backbone.tic import checked_images

# Leaves in torch.fx graphs, which cannot hold their checks
register_notrace_module(MSAConv2d)
register_notrace_module(Linear2d)
register_notrace_function(checked_images)


# A subclass and no wrapper, so that parameters keep the core's names and weights travel both ways.
class TiCClassifier(tic.TiC):
    """`tic_backbone.TiC` with a head, by timm's rules: global pooling, dropout, linear.

    The only norm is the last stage's, ``norms.3``. With ``features_only=True`` there is none: as from timm's Swin and
    ConvNeXt come the maps as the stages leave them, in the stages' order, where the core returns them normalized; the
    wrapper has no ``set_grad_checkpointing``, so give ``with_cp=True``.

    Args:
        arch: a name of `tic_backbone.VARIANTS`.
        num_classes: 0 for no classifier.
        in_chans: channels of the images.
        global_pool: "avg", "max" or "avgmax"; with "" the classifier gives a map of logits.
        drop_rate: dropout before the classifier.
        device, dtype: of the weights.
        **fields: of `TiCConfig`; any other name is a TypeError.
    """

    def __init__(
        self,
        arch: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields,
    ) -> None:
        last = len(fields.get("channels", tic.VARIANTS[arch].channels)) - 1
        super().__init__(arch, in_channels=in_chans, out_indices=(last,), **fields)
        self.to(device=device, dtype=dtype)
        channels = self.config.channels
        self.feature_info = [dict(num_chs=c, reduction=4 * 2**i, module=f"stages.{i}") for i, c in enumerate(channels)]
        self.num_features = channels[-1]
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; its pooling stays unless given."""
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        head = NormMlpClassifierHead(
            self.num_features, num_classes, pool_type=pool, drop_rate=self.drop_rate, norm_layer=nn.Identity
        )
        self.head = head.apply(tic._init).to(self.stem[0].weight).train(self.training)
        self.num_classes, self.head_hidden_size = num_classes, self.num_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) with H, W >= 32 to (N, num_features, ceil(H / 32), ceil(W / 32)), normalized."""
        return self.forward_intermediates(x, indices=1)[0]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The features and the maps of chosen stages, in the stages' order.

        Args:
            x: images.
            indices: the last n stages if an int, all if None; negative numbers count from the end.
            norm: normalize the last stage's map too, the only one that has a norm.
            stop_early: leave out the stages after the last chosen one.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"TiC's maps can only be NCHW, got {output_fmt=}")
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(checked_images(x, self.in_chans))
        maps = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = checkpoint_seq(stage, x) if self.config.with_cp and self.training else stage(x)
            if i in take:
                maps.append(self._norm(i, x) if norm else x)
        return maps if intermediates_only else (self._norm(i, x), maps)

    def _norm(self, stage: int, x: torch.Tensor) -> torch.Tensor:
        return self.norms[str(stage)](x) if str(stage) in self.norms else x

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last chosen one, and with any of them norm and head; return the chosen ones."""
        take, last = feature_take_indices(len(self.stages), indices)
        if last < len(self.stages) - 1:
            self.stages = self.stages[: last + 1]
            self.num_features = self.feature_info[last]["num_chs"]
            prune_norm = prune_head = True
        if prune_norm:
            self.norms = nn.ModuleDict()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.config = replace(self.config, with_cp=enable)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for layer-wise decay: stem, each block with the downsampling before it, head; coarse: each stage."""
        norm = (r"^norms", (99999,))  # timm's number for: with the layer before
        blocks = [(r"^stages\.(\d+)\.0\.", (1,)), (r"^stages\.(\d+)\.(\d+)", None)]
        return dict(stem=r"^stem", blocks=[(r"^stages\.(\d+)", None), norm] if coarse else [*blocks, norm])

    def no_weight_decay(self) -> set[str]:
        """Nothing beyond the norms and biases, which timm leaves out by itself."""
        return set()


CFG = {
    **dict(url="", num_classes=1000, input_size=(3, 224, 224), fixed_input_size=False, pool_size=(7, 7), crop_pct=0.9),
    **dict(interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD),
    **dict(first_conv="stem.0", classifier="head.fc", license="apache-2.0", paper_ids="arXiv:2310.04134"),
}
default_cfgs = generate_default_cfgs({f"tic_{arch}.untrained": CFG for arch in tic.VARIANTS})


def _register(arch: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        """A `TiCClassifier`, or with ``features_only=True`` timm's wrapper around one."""
        features = dict(out_indices=(0, 1, 2, 3), feature_cls="getter")
        return build_model_with_cfg(TiCClassifier, f"tic_{arch}", pretrained, feature_cfg=features, arch=arch, **kwargs)

    create.__name__ = f"tic_{arch}"
    return register_model(create)


tic_nano = _register("nano")
tic_tiny = _register("tiny")
tic_small = _register("small")
tic_base = _register("base")
