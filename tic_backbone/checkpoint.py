"""Reading weights safely and loading them loudly: nothing is skipped without being named."""

import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class LoadReport:
    """What became of each name when weights were loaded into a model."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # the model has it, the weights do not
    unexpected: tuple[str, ...]  # the weights have it, the model does not
    mismatched: tuple[str, ...]  # both have it, in different shapes
    matched: float  # share of the model's numbers that were loaded, between 0 and 1

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded, {self.matched:.0%} of the model's weights"]
        for title in ("missing", "mismatched", "unexpected"):
            names = getattr(self, title)
            if names:
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                lines.append(f"{len(names)} {title}: {shown}")
        return "\n".join(lines)


def read_checkpoint(path: str | Path, safe_globals: list = ()) -> dict[str, torch.Tensor]:
    """The tensors by name in a checkpoint file, on the CPU. Never runs code that the file brings.

    Files that hold a whole training state are entered at ``state_dict`` or ``model``.

    Args:
        path: a ``.safetensors`` file, which needs the package of that name, or a ``torch.save`` file under any other
            name; or an http(s) address of either, which is fetched once and kept in torch.hub's folder.
        safe_globals: what else a ``torch.save`` file may name, see ``torch.serialization.safe_globals``.

    Raises:
        ValueError: if this is not a checkpoint of tensors, or holds Python objects not known to be safe.
    """
    path = local_file(path)
    if path.suffix == ".safetensors":
        package = _safetensors(path)
        try:
            return package.torch.load_file(path)
        except package.SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals(list(safe_globals)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        named = re.search(r"Unsupported [^\n]*? was not an allowed", str(error))  # torch says much around it
        reason = named[0] + " one" if named else f"{type(error).__name__} {error}".splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no tensors by name, but {type(content).__name__}")
    return dict(content)


def write_checkpoint(weights: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Write tensors by name, and nothing else, to a ``.safetensors`` or a ``.pth`` file."""
    path = Path(path).expanduser()
    # Copies, since a view would drag its whole storage into the file
    weights = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    if path.suffix == ".safetensors":
        _safetensors(path).torch.save_file(weights, path)
    elif path.suffix == ".pth":
        torch.save(weights, path)
    else:
        raise ValueError(f"weights are written as .safetensors or .pth, not as {path}")


def _safetensors(path: Path):
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from error
    return safetensors


def local_file(path: str | Path) -> Path:
    """Where a checkpoint lies; what an http(s) address names is fetched first, once. FileNotFoundError if nowhere."""
    path = _download(str(path)) if str(path).startswith(("http://", "https://")) else Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    return path


def _download(address: str) -> Path:
    # A folder for each address: every other checkpoint of a hub is called model.safetensors
    folder = Path(torch.hub.get_dir(), "checkpoints", hashlib.sha256(address.encode()).hexdigest()[:16])
    path = folder / (Path(urlparse(address).path).name or "checkpoint")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path))  # writes a temporary file and moves it into place
        except OSError as error:
            raise ValueError(f"cannot fetch {address}: {error}") from error
    return path


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], min_matched: float = 0.9) -> LoadReport:
    """Copy into `model` every tensor whose name and shape agree, and say what did not.

    Raises:
        ValueError: if less than the share `min_matched` of the model's weights would be loaded; nothing is then.
    """
    own = model.state_dict()
    loaded = [name for name in own if name in weights and own[name].shape == weights[name].shape]
    report = LoadReport(
        loaded=tuple(loaded),
        missing=tuple(name for name in own if name not in weights),
        unexpected=tuple(name for name in weights if name not in own),
        mismatched=tuple(name for name in own if name in weights and own[name].shape != weights[name].shape),
        matched=sum(own[name].numel() for name in loaded) / sum(value.numel() for value in own.values()),
    )
    if report.matched < min_matched:
        raise ValueError(f"the weights do not fit the model, at least {min_matched:.0%} must match: {report}")
    model.load_state_dict({name: weights[name] for name in loaded}, strict=False)
    return report


def strip_prefix(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The part of `weights` under `prefix`, without it. A ValueError names what prefixes there are if none fits."""
    prefix = prefix.rstrip(".") + "."
    part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not part:
        raise ValueError(f"no weight is under {prefix=}; there are {sorted({n.split('.')[0] for n in weights})}")
    return part


SWIN_TABLE = re.compile(r"(.*?)(?:layers|stages)[._]0\.blocks\.0\.attn\.(w_msa\.)?relative_position_bias_table")
OPENMMLAB_SWIN = {
    "patch_embed.projection.": "patch_embed.proj.",
    "attn.w_msa.": "attn.",
    "ffn.layers.0.0.": "mlp.fc1.",
    "ffn.layers.1.": "mlp.fc2.",
}


def from_swin(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What a Swin Transformer's weights are in a TiC of the same widths, depths and heads, and the names left over.

    Known are the layouts of the original, of timm and of OpenMMLab, bare or under a prefix such as ``backbone.``.

    * A block's linear layers and norms, the norms of the outputs and a classifier map one to one.
    * Swin's blocks have no position convolution, so TiC's start at zero.
    * Downsampling becomes four of the nine weights of TiC's convolution, which agrees where the four tokens that Swin
      joins have one mean and one variance: Swin normalizes them together, TiC each by itself.
    * The patch embedding becomes a stem that agrees to a few percent, if the stem's width is at least 8 times the
      image's channels and 2 more, as it is in all of Swin's variants; else only its norm maps.
    * The position tables have no place in TiC.

    Raises:
        ValueError: if this is no Swin Transformer, or one of version 2, whose attention and norms are others.
    """
    tables = [match for name in weights if (match := SWIN_TABLE.fullmatch(name))]
    if len(tables) != 1:
        roots = sorted({name.split(".")[0] for name in weights})
        raise ValueError(f"need the weights of one Swin Transformer v1, not of {len(tables)}; there are {roots}")
    prefix, openmmlab = tables[0].groups()
    names = {name: _original_swin_name(name.removeprefix(prefix)) for name in weights if name.startswith(prefix)}
    swin = {own: weights[name] for name, own in names.items()}
    last = max(int(own.split(".")[1]) for own in swin if own.startswith("layers."))
    opens_next = "layers.0.downsample.reduction.weight" in swin  # in timm a stage begins with its downsampling
    tic: dict[str, torch.Tensor] = {}
    left = [name for name in weights if name not in names]
    for name, own in names.items():
        value = weights[name]
        match own.split("."):
            case ["layers", i, "blocks", j, "attn", "qkv", kind]:
                at = f"stages.{i}.{int(j) + 1}.attn"
                tic[f"{at}.q.{kind}"], tic[f"{at}.kv.{kind}"] = value.tensor_split([len(value) // 3])
            case ["layers", i, "blocks", j, ("norm1" | "norm2") as part, kind]:
                tic[f"stages.{i}.{int(j) + 1}.{part}.{kind}"] = value
                position = (len(value), 1, 3, 3) if kind == "weight" else len(value)
                tic[f"stages.{i}.{int(j) + 1}.pos.{kind}"] = value.new_zeros(position)
            case ["layers", i, "blocks", j, ("attn" | "mlp") as part, ("proj" | "fc1" | "fc2") as layer, kind]:
                tic[f"stages.{i}.{int(j) + 1}.{part}.{layer}.{kind}"] = value
            case ["layers", i, "downsample", "reduction", "weight"]:
                norm = [swin[f"layers.{i}.downsample.norm.{kind}"] for kind in ("weight", "bias")]
                parts = _merging_as_convolution(value, *norm, channels_first=bool(openmmlab))
                tic.update({f"stages.{int(i) + opens_next}.0.{part}": tensor for part, tensor in parts.items()})
            case ["layers", _, "downsample", "norm", _]:
                pass  # part of the convolution
            case ["patch_embed", "proj", "weight"] if _fits_stem(value):
                tic.update(_patches_as_stem(value, swin["patch_embed.proj.bias"]))
            case ["patch_embed", "proj", "bias"] if _fits_stem(swin["patch_embed.proj.weight"]):
                pass  # part of the stem
            case ["patch_embed", "norm", kind]:
                tic[f"stem.4.{kind}"] = value
            case ["norm", kind]:
                tic[f"norms.{last}.{kind}"] = value
            case [("norm0" | "norm1" | "norm2" | "norm3") as norm, kind]:
                tic[f"norms.{norm[-1]}.{kind}"] = value
            case ["head", kind] | ["head", "fc", kind]:
                tic[f"head.fc.{kind}"] = value
            case _:
                left.append(name)
    return tic, left


def _original_swin_name(name: str) -> str:
    name = re.sub(r"^(layers|stages)[._]", "layers.", name)
    for theirs, original in OPENMMLAB_SWIN.items():
        name = name.replace(theirs, original)
    return name


def _merging_as_convolution(reduction, norm_weight, norm_bias, *, channels_first: bool) -> dict[str, torch.Tensor]:
    """Swin's PatchMerging in the names of TiC's downsampling: a norm that only normalizes, then a 3 x 3 convolution.

    Its kernel covers tokens 2i - 1 to 2i + 1, Swin's pairs are 2i and 2i + 1: the first row and column stay zero.
    OpenMMLab's columns are ordered (channel, row, column of the pair), the original's (column, row, channel).
    """
    c = reduction.shape[1] // 4
    weight = reduction * norm_weight
    weight = weight.unflatten(1, (c, 2, 2)) if channels_first else weight.unflatten(1, (2, 2, c)).permute(0, 3, 2, 1)
    norm = {"0.weight": norm_weight.new_ones(c), "0.bias": norm_weight.new_zeros(c)}
    return {**norm, "1.weight": F.pad(weight, (1, 0, 1, 0)), "1.bias": reduction @ norm_bias}


def _fits_stem(patches: torch.Tensor) -> bool:
    return patches.shape[2:] == (4, 4) and len(patches) // 2 >= 8 * patches.shape[1] + 2


def _patches_as_stem(weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """A 4 x 4 convolution of stride 4 in the names of TiC's stem: two 3 x 3 convolutions, a norm and GELU between.

    The first convolution spreads 2 x 2 pixels over channels, each twice: as it is and negated. GELU(x) - GELU(-x) is x,
    so that the second one is linear in the pixels. The norm between is nearly a constant factor, as the channels left
    hold numbers that are large against normalized pixels; they differ for training to tell them apart.
    """
    out, colours = weight.shape[:2]
    half, used = out // 2, 4 * colours
    first = weight.new_zeros(half, colours, 3, 3)
    first[:used, :, 1:, 1:] = torch.eye(used).to(weight).unflatten(1, (colours, 2, 2))
    first[used : 2 * used] = -first[:used]
    spare = (half - 2 * used) // 2  # of either sign, so that the mean is 0
    large = torch.linspace(10, 20, spare).to(weight)
    constants = torch.cat([large, -large, large.new_zeros(half % 2)])
    scale = weight.new_ones(half)
    scale[: 2 * used] = (constants.square().sum() / half).sqrt()
    second = weight.new_zeros(out, half, 3, 3)
    # (out, colour, 2 rows of 2, 2 columns of 2) to (out, (colour, row, column) in a cell, cell's row, cell's column)
    patches = weight.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    second[:, :used, 1:, 1:], second[:, used : 2 * used, 1:, 1:] = patches, -patches
    return {
        **{"stem.0.weight": first, "stem.0.bias": torch.cat([weight.new_zeros(2 * used), constants])},
        **{"stem.1.weight": scale, "stem.1.bias": weight.new_zeros(half)},
        **{"stem.3.weight": second, "stem.3.bias": bias},
    }
