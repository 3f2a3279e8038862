"""The multi-directional cyclic shift of TiC: which token each part of a head's channels comes from."""

import torch

from tic_backbone.ops import native

DIRECTIONS = ((0, 0), (-1, -1), (1, 1), (-1, 1), (1, -1))  # the centre and the four diagonals, (down, right)


def cyclic_shift(x: torch.Tensor, groups: int, length: int, backend: str = "auto") -> torch.Tensor:
    """Bring into every token parts of the tokens `length` away along the four diagonals, around the border.

    The channels of each of `groups` heads are cut into five runs, as equal as can be and the first ones the longer: of
    token (i, j) the first run stays, the others come from ``((i + down * length) % H, (j + right * length) % W)``, for
    the four directions of `DIRECTIONS` in turn. Free of parameters and of sizes. Heads of fewer than five channels lack
    the last directions, and those of one channel stay as they are.

    Args:
        x: (N, C, H, W); `groups` must divide C.
        length: in tokens; 0 leaves all as it is.
        backend: "auto" and "native" run C on CPUs, with derivatives in reverse mode alone; all else is plain PyTorch.

    Returns:
        (N, C, H, W) in channels-last memory.

    Raises:
        ValueError: if x has another number of dimensions, or `groups` does not divide C.
        TypeError: if the length is no int.
    """
    if type(length) is not int:
        raise TypeError(f"the length must be an int, got {length!r}")
    if x.dim() != 4 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"need x of shape (N, C, H, W) with C a multiple of {groups=}, got {tuple(x.shape)}")
    steps = [(down * length, right * length) for down, right in DIRECTIONS]
    fast = backend in ("auto", "native") and x.device.type == "cpu" and not torch.compiler.is_exporting()
    if fast and not native.unavailable():
        return native.cyclic_shift_native(x, groups, steps)
    heads = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
    centre, *runs = heads.tensor_split(len(steps), 4)
    runs = [run.roll((-down, -right), (1, 2)) for run, (down, right) in zip(runs, steps[1:])]
    return torch.cat([centre, *runs], 4).flatten(3).permute(0, 3, 1, 2)
