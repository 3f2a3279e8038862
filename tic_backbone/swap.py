"""Put TiC in place of the backbone of a config that exists, and rewire what depends on it.

Which maps the old backbone gives is found by running it on a small image; who reads them is found in the config.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope

from tic_backbone.layers import LayerNorm2d
from tic_backbone.tic import VARIANTS, TiC, make_config

STRIDES = (4, 8, 16, 32)
CANNOT = {  # parts of a model that know more of their backbone than its maps
    "RFP": "its neck RFP runs a second copy of the backbone",
    "HourglassNet": "its heads read the outputs of stacked hourglasses, one after another",
    "TridentResNet": "its heads read three branches of one map",
    "SimpleFPN": "its neck SimpleFPN makes a pyramid of a plain ViT's single map",
    "Feature2Pyramid": "its neck Feature2Pyramid makes a pyramid of a plain ViT's single map",
    "MultiLevelNeck": "its neck MultiLevelNeck makes a pyramid of a plain ViT's single map",
    "MLANeck": "its neck MLANeck sums maps of a plain ViT, which have one size",
    "DPTHead": "its head DPTHead reads the class token of a plain ViT",
    "LRASPPHead": "its head LRASPPHead pools windows of 49 tokens, more than TiC's deepest map has in usual crops",
    "PIDHead": "its head PIDHead reads the three branches of PIDNet",
    "MultiTaskHead": "its head MultiTaskHead trains several heads of other kinds",
    "DDRHead": "its head DDRHead reads the branches of DDRNet",
}
# Heads of mmpretrain that take a vector and its length; all others become a LinearClsHead
CLASSIFIERS = {"LinearClsHead", "StackedLinearClsHead", "VisionTransformerClsHead", "MultiLabelLinearClsHead",
               "ArcFaceClsHead", "LinearReIDHead"}  # fmt: skip
POOLINGS = {"GlobalAveragePooling", "GeneralizedMeanPooling"}
# Self-supervised learners that compare whole images; the others hide parts of one from a backbone of their own kind
CONTRASTIVE = {"BYOL", "BarlowTwins", "DenseCL", "MoCo", "MoCoV3", "SimCLR", "SimSiam", "SwAV"}
# Pieces of names that `custom_keys` of an optimizer have from other backbones
OTHERS_PARAMETERS = ("absolute_pos_embed", "relative_position_bias_table", "cls_token", "attention_biases", "rel_pos_")


class Map(NamedTuple):
    """One of the maps that the old backbone returns."""

    channels: int
    stride: int


_SEEN: dict[str, list[Map]] = {}  # by config of the backbone, which takes seconds to run


def swap_backbone(cfg: Config, variant: str, **fields) -> Config:
    """A copy of `cfg` whose model has TiC in place of its backbone. What was changed goes to the log.

    Args:
        cfg: of a detector, segmentor, classifier or contrastive learner of OpenMMLab.
        variant: a name of `tic_backbone.VARIANTS`; ``tic_tiny`` and ``tic-tiny`` mean ``tiny``.
        **fields: of `TiCConfig`, as ``drop_path_rate=0.2``; the stages to return are chosen here.

    Raises:
        ValueError: one sentence why this model cannot be served.
    """
    arch = variant.lower().removeprefix("tic_").removeprefix("tic-")
    if arch not in VARIANTS:
        raise ValueError(f"unknown backbone {variant!r}; choose one of {[f'tic_{name}' for name in VARIANTS]}")
    if "out_indices" in fields:
        raise ValueError(f"out_indices={fields['out_indices']} is given, but the config decides which maps are read")
    channels = make_config(arch, **fields).channels
    cfg = copy.deepcopy(cfg)
    owner = _owner(cfg)
    old = owner.backbone
    for part in (old, *_parts(owner)):
        if _name(part) in CANNOT:
            raise ValueError(f"TiC cannot take the place of {_name(old)} here: {CANNOT[_name(part)]}")
    changes = _Changes()
    if "decode_head" in owner:
        stages = _rewire_segmentor(cfg, owner, channels, changes)
    elif cfg.get("default_scope") == "mmpretrain" or _name(owner) in ("ImageClassifier", "BaseReID"):
        stages = _rewire_classifier(owner, channels, changes)
    else:
        stages = _rewire_detector(cfg, owner, channels, changes)
    mean = (owner.get("data_preprocessor") or cfg.get("data_preprocessor") or {}).get("mean")
    inherited = dict(in_channels=len(mean)) if mean and len(mean) != 3 else {}
    if old.get("with_cp"):
        inherited["with_cp"] = True
    backbone = dict(type="TiC", arch=arch, out_indices=tuple(stages), **{**inherited, **fields})
    with torch.device("meta"):  # complains of wrong fields now, and has no weights
        tic = TiC(**{k: v for k, v in backbone.items() if k != "type"})
    changes.head = f"{_name(old)} gives its place to {backbone}, maps at strides {[STRIDES[i] for i in stages]}"
    owner["backbone"] = ConfigDict(backbone)
    _drop_weights(cfg, owner, changes)
    _clean_optimizer(cfg, tic, changes)
    imports = cfg.get("custom_imports") or dict(imports=[])
    names = [imports["imports"]] if isinstance(imports["imports"], str) else list(imports["imports"])
    cfg.custom_imports = dict(imports, imports=[*names, "tic_backbone.openmmlab"])
    print_log(str(changes), logger="current")
    return cfg


class _Changes:
    """What was done to a config, for the log."""

    def __init__(self) -> None:
        self.head, self.lines = "", []

    def set(self, part: dict, key: str, value, where: str) -> None:
        if part.get(key) != value:
            self.lines.append(f"{where}.{key}: {part.get(key)} -> {value}")
            part[key] = value

    def drop(self, part: dict, key: str, where: str) -> None:
        if part.pop(key, None) is not None:
            self.lines.append(f"{where}{key}: taken out")

    def __str__(self) -> str:
        return "\n  ".join([self.head, *self.lines])


def _name(part: dict) -> str:
    kind = part.get("type")
    return (kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))).rsplit(".", 1)[-1]


def _owner(cfg: Config) -> dict:
    """The part of the model that has the backbone: the model itself, or the detector inside it."""
    model = cfg.get("model") or {}
    owner = model if "backbone" in model else model.get("detector") or {}
    if not isinstance(owner.get("backbone"), dict) or not owner.backbone.get("type"):
        raise ValueError(f"TiC can take no place here: {_name(model) if model else 'the config'} has no `backbone`")
    return owner


def _list(parts) -> list[dict]:
    return [part for part in (parts if isinstance(parts, (list, tuple)) else [parts]) if part]


def _parts(owner: dict) -> Iterator[dict]:
    """The necks and heads."""
    for key, value in owner.items():
        if key != "backbone":
            yield from (part for part in _list(value) if isinstance(part, dict))


def _maps(cfg: Config, owner: dict) -> list[Map]:
    """The maps of the old backbone, from an image of 256 x 256."""
    key = repr((cfg.get("default_scope"), owner.backbone))
    if key in _SEEN:
        return _SEEN[key]
    part = copy.deepcopy(owner.backbone)
    part.init_cfg = None
    if part.get("pretrained"):
        part.pretrained = False if part.pretrained is True else None
    try:
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope")), torch.random.fork_rng(), torch.no_grad():
            backbone = MODELS.build(part)
            backbone.eval()
            shapes = [tuple(out.shape) for out in backbone(torch.zeros(1, part.get("in_channels", 3), 256, 256))]
        _SEEN[key] = [Map(channels, round(256 / height)) for _, channels, height, _ in shapes]
        return _SEEN[key]
    except Exception as error:
        raise ValueError(
            f"TiC cannot take the place of {_name(part)}, whose maps could not be found out by running it: "
            f"{type(error).__name__} {error}"
        ) from error


def _stages(maps: Sequence[Map], used: Sequence[int], old: dict) -> list[int]:
    """The stage of TiC for each of the `used` maps."""
    strides = [m.stride for m in maps]
    if strides == sorted({*strides} & {*STRIDES}):
        return [STRIDES.index(strides[i]) for i in used]
    if len(maps) == 4:  # dilated instead of strided, or a plain ViT
        return list(used)
    if len(used) == 1 and strides[used[0]] in STRIDES:
        return [STRIDES.index(strides[used[0]])]
    if len(used) <= 4:
        return list(range(4 - len(used), 4))
    raise ValueError(
        f"TiC's four maps, at strides {STRIDES}, cannot stand for the {len(used)} of {_name(old)}: {strides}"
    )


def _translate(value, old: Sequence[int], new: Sequence[int], where: str):
    """`value`, the channels of all maps in their order or in the reverse, or of the last one, for the new maps."""
    if isinstance(value, int) and value == old[-1]:
        return new[-1]
    for step in (1, -1):
        if isinstance(value, (list, tuple)) and list(value) == list(old)[::step]:
            return type(value)(new[::step])
    raise ValueError(f"TiC can take no place here: {where}={value} are not the channels {list(old)} of the old maps")


def _rewire_detector(cfg: Config, owner: dict, all_widths: Sequence[int], changes: _Changes) -> list[int]:
    if "shared_head" in (owner.get("roi_head") or {}):
        raise ValueError(
            f"TiC cannot take the place of {_name(owner.backbone)} here: roi_head.shared_head is its last stage"
        )
    maps = _maps(cfg, owner)
    channels, stages = [m.channels for m in maps], _stages(maps, range(len(maps)), owner.backbone)
    new = [all_widths[s] for s in stages]
    if not owner.get("neck"):
        found = [*_readers(owner, channels)]
        if not found:
            raise ValueError(f"TiC can take no place here: nothing in {_name(owner)} has in_channels={channels}")
        for where, part, key in found:
            changes.set(part, key, _translate(part[key], channels, new, where), where)
        return stages
    neck = _list(owner.neck)[0]
    if isinstance(neck.get("in_channels"), int):  # reads the last map alone
        changes.set(neck, "in_channels", _translate(neck.in_channels, channels, new, "neck.in_channels"), "neck")
        return stages[-1:]
    wired = _translate(neck.get("in_channels"), channels, new, "neck.in_channels")
    if _name(neck) == "SSDNeck":  # hands the backbone's maps on to the head, and adds smaller ones
        for where, part, key in (("neck", neck, "out_channels"), ("bbox_head", owner.bbox_head, "in_channels")):
            changes.set(part, key, (*new, *part[key][len(new) :]), where)
    start = neck.get("start_level", 0)
    if start:  # a map that nobody reads would leave its norm without a gradient
        wired, stages = wired[start:], stages[start:]
        changes.set(neck, "start_level", 0, "neck")
        if neck.get("end_level", -1) > 0:
            changes.set(neck, "end_level", neck.end_level - start, "neck")
    changes.set(neck, "in_channels", wired, "neck")
    return stages


def _readers(part, channels: list[int], where: str = "") -> Iterator[tuple[str, dict, str]]:
    """(path, part, key) of every value that holds the channels of all maps, or of the only one."""
    wanted = [channels, tuple(channels), *(channels if len(channels) == 1 else [])]
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        if key == "backbone":
            continue
        if key in ("in_channels", "out_channels") and value in wanted:
            yield f"{where}{key}", part, key
        elif isinstance(value, (dict, list, tuple)):
            yield from _readers(value, channels, f"{where}{key}.")


def _rewire_segmentor(cfg: Config, owner: dict, all_widths: Sequence[int], changes: _Changes) -> list[int]:
    maps = _maps(cfg, owner)
    old = [m.channels for m in maps]
    main = [head.get("kernel_generate_head", head) for head in _list(owner.decode_head)]
    heads = [*main, *_list(owner.get("auxiliary_head"))]
    neck = _list(owner.get("neck"))
    if neck:
        stages = _stages(maps, range(len(maps)), owner.backbone)
        new = [all_widths[s] for s in stages]
        changes.set(
            neck[0], "in_channels", _translate(neck[0].get("in_channels"), old, new, "neck.in_channels"), "neck"
        )
        if _name(neck[0]) == "JPU":  # hands all maps but the last on to the heads
            for head in heads:
                several = not isinstance(head.in_channels, int)
                widths = zip(_indices(head, len(maps)), head.in_channels if several else [head.in_channels])
                widths = [new[i] if i < len(maps) - 1 else width for i, width in widths]
                changes.set(head, "in_channels", widths if several else widths[0], _name(head))
        return stages
    read = [_indices(head, len(maps)) for head in heads]
    if _name(main[-1]) == "OCRHead":  # weighs the pixels of its map by the prediction before, so both read one map
        read[: len(main)] = [read[len(main) - 1]] * len(main)
    used = sorted({i for indices in read for i in indices} | {0 for head in heads if "c1_in_channels" in head})
    if used[-1] not in read[len(main) - 1]:
        raise ValueError(
            f"TiC cannot take the place of {_name(owner.backbone)} here: the main head reads a branch of its own, not "
            "the deepest map"
        )
    stages = _stages(maps, used, owner.backbone)
    new = {i: all_widths[s] for i, s in zip(used, stages)}
    for head, indices in zip(heads, read):
        places, widths = [used.index(i) for i in indices], [new[i] for i in indices]
        if isinstance(head.in_channels, int):
            places, widths = places[0], widths[0]
        if "in_index" in head:
            changes.set(head, "in_index", places, _name(head))
        changes.set(head, "in_channels", widths, _name(head))
        if "c1_in_channels" in head:
            changes.set(head, "c1_in_channels", new[0], _name(head))
        if head.get("num_convs") == 0:  # nothing between the map and the classifier
            changes.set(head, "channels", widths, _name(head))
    return stages


def _indices(head: dict, count: int) -> list[int]:
    """Which of `count` maps a head of mmseg reads through its ``in_index``; without one it reads the last, or all."""
    default = -1 if isinstance(head.in_channels, int) else range(count)
    indices = [i % count for i in torch.tensor(head.get("in_index", default)).view(-1).tolist()]
    return indices[-1:] if _name(head) == "EncHead" and not head.get("add_lateral") else indices  # it names more


def _rewire_classifier(owner: dict, all_widths: Sequence[int], changes: _Changes) -> list[int]:
    channels = all_widths[-1]
    if _name(owner) in CONTRASTIVE:
        for neck in _list(owner.neck):
            changes.set(neck, "in_channels", channels, "neck")
            if "with_avg_pool" in neck:
                changes.set(neck, "with_avg_pool", True, "neck")
        return [3]
    if _name(owner) not in ("ImageClassifier", "BaseReID"):
        raise ValueError(
            f"TiC cannot take the place of {_name(owner.backbone)} here: {_name(owner)} trains a backbone of its own "
            "kind, that is shown parts of an image"
        )
    head = owner.get("head")
    if not head:  # gives features
        return [3]
    if _name(head) == "CSRAClsHead":  # reads the map itself
        changes.set(head, "in_channels", channels, "head")
        return [3]
    kept = []
    for neck in _list(owner.get("neck")):
        if _name(neck) in POOLINGS:
            changes.drop(neck, "dim", "neck.")  # other than of maps
            kept.append(neck)
        elif _name(neck) == "ClsBatchNormNeck":
            changes.set(neck, "input_features", channels, "neck")
            kept.append(neck)
        elif _name(neck) == "LinearNeck":
            changes.set(neck, "in_channels", channels, "neck")
            channels = neck.out_channels
            kept.append(neck)
    if not any(_name(neck) in POOLINGS for neck in kept):
        kept.insert(0, dict(type="GlobalAveragePooling"))
    if [_name(neck) for neck in kept] != [_name(neck) for neck in _list(owner.get("neck"))]:
        changes.set(owner, "neck", kept, "model")
    if _name(head) not in CLASSIFIERS:
        classes = head.get("num_classes", owner.backbone.get("num_classes", 1000))
        kind = "MultiLabelLinearClsHead" if _name(head).startswith("MultiLabel") else "LinearClsHead"
        plain = dict(type=kind, num_classes=classes, in_channels=channels)
        changes.set(owner, "head", plain | {k: head[k] for k in ("loss", "topk", "cal_acc") if k in head}, "model")
    changes.set(owner["head"], "in_channels", channels, "head")
    return [3]


def _drop_weights(cfg: Config, owner: dict, changes: _Changes) -> None:
    """Take out what would load the old backbone's weights, or draw TiC's as the old backbone's are drawn."""
    changes.drop(owner, "pretrained", "model.")
    changes.drop(owner, "init_cfg", "model.")
    changes.drop(cfg, "load_from", "")


def _clean_optimizer(cfg: Config, backbone: TiC, changes: _Changes) -> None:
    """Take out what an optimizer knows of the old backbone's layers."""
    wrapper = cfg.get("optim_wrapper") or {}
    rules = wrapper.get("paramwise_cfg") or {}
    layerwise = {"decay_rate", "decay_type", "num_layers"} & {*rules}  # mmpretrain's asks the backbone for its layers
    if layerwise:
        changes.drop(wrapper, "constructor", "optim_wrapper.")
        for key in layerwise:
            changes.drop(rules, key, "optim_wrapper.paramwise_cfg.")
        for key in ("norm_decay_mult", "bias_decay_mult"):  # as that constructor does, unasked
            changes.set(rules, key, 0.0, "optim_wrapper.paramwise_cfg")
    keys = rules.get("custom_keys") or {}
    layers = {key: keys[key] for key in keys if key.startswith("backbone.")}
    leftovers = [*layers, *(key for key in keys if any(name in key for name in OTHERS_PARAMETERS))]
    for key in leftovers:
        keys.pop(key)
    if leftovers:
        changes.lines.append(f"optim_wrapper.paramwise_cfg.custom_keys: {len(leftovers)} of the old backbone taken out")
    by_name = (keys.get("norm") or {}).get("decay_mult") == 0  # not all of TiC's norms are called so
    if by_name or any(rule.get("decay_mult") == 0 for rule in layers.values()):  # it spared norms, one by one
        if "backbone" in keys:  # a rule that comes before norm_decay_mult
            for name, module in backbone.named_modules():
                if isinstance(module, LayerNorm2d):
                    keys[f"backbone.{name}."] = dict(keys["backbone"], decay_mult=0.0)
            changes.lines.append("optim_wrapper.paramwise_cfg.custom_keys: no decay of TiC's norms")
        else:
            changes.set(rules, "norm_decay_mult", 0.0, "optim_wrapper.paramwise_cfg")
    if (share := (keys.get("backbone") or {}).get("lr_mult", 1)) < 1:
        changes.lines.append(f"optim_wrapper: the backbone still learns at {share} of the rate, as if it was trained")
    if (wrapper.get("optimizer") or {}).get("type") == "SGD":
        changes.lines.append(
            "optimizer: stays SGD, where this project's configs have AdamW, lr=1e-4, weight_decay=0.05"
        )
