"""Reading weights safely and loading them loudly: nothing is skipped without being named."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
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
        path: a ``torch.save`` file, or its http(s) address, which is kept in torch.hub's folder.
        safe_globals: what else the file may name, see ``torch.serialization.safe_globals``.

    Raises:
        ValueError: if this is not a checkpoint of tensors, or holds Python objects not known to be safe.
    """
    path = _download(path) if str(path).startswith(("http://", "https://")) else Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals(list(safe_globals)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no tensors by name, but {type(content).__name__}")
    return dict(content)


def _download(address: str) -> Path:
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(address).path).name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path))  # writes a temporary file and moves it into place
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
