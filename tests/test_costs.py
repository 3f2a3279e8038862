"""What a forward pass does, counted: guards of its speed and memory that no busy machine can upset."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tic_backbone import VARIANTS, TiC
from tic_backbone.ops import native
from tic_backbone.tic import Block

needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=f"native: {native.unavailable()}")


class Kernels(TorchDispatchMode):
    """Counts the operators that compute or copy; views of memory are free."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def kernels(function, x):
    with Kernels() as mode:
        function(x)
    return dict(mode.counts)


@needs_native
@pytest.mark.parametrize("index", [0, 1])
def test_a_block_runs_no_kernel_but_these(index):
    """None that gathers or copies but the shift, once for keys and values together: maps stay in one layout."""
    block = Block(96, VARIANTS["tiny"], index=index, drop_path=0.0)
    x = torch.randn(2, 96, 20, 24).contiguous(memory_format=torch.channels_last).requires_grad_()
    counts = kernels(block, x)
    weights = ("new_ones", "constant_pad_nd", "add")  # of the position convolution: its kernel plus the identity
    assert counts.pop("add") == 3 and all(counts.pop(name) == 1 for name in weights[:2])
    assert counts.pop("convolution") + counts.pop("addmm", 0) == 1 + 5  # linear layers are one or the other
    expected = dict(native_layer_norm=2, msa_conv2d_native=1, cyclic_shift_native=1, gelu=1)
    assert counts == {**expected, **({"avg_pool2d": 1} if index else {})}
    for part in (block.attn.q(x), *block.attn.keys_and_values(x)):  # nor inside of msa_conv2d_native
        assert native._tokens(part).data_ptr() == part.data_ptr()


@needs_native
def test_backward_of_a_block_keeps_each_map_once():
    """In maps of its size: x, two norms' outputs, the attention's q, k, v and output, the MLP's inside twice."""
    block = Block(96, VARIANTS["tiny"], index=0, drop_path=0.0)
    x = torch.randn(2, 96, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    saved = {}

    def note(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        block(x)
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    maps = sum(size for data, size in saved.items() if data not in parameters) / x.nbytes
    assert maps < 1 + 2 + 2 + 4 + 8 + 0.2, maps


def test_inference_keeps_the_inside_of_an_mlp_small():
    """The largest tensor that a block makes does not grow to the map's size times the MLP's width."""
    block = Block(32, VARIANTS["nano"], index=0, drop_path=0.0).eval()
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(t.nbytes for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t))
            return out

    x = torch.randn(1, 32, 160, 160)
    with torch.no_grad(), Largest():
        block(x)
    assert max(largest) <= 2 * x.nbytes  # k and v; the MLP's inside would be 4


@pytest.mark.heavy
def test_exported_graph_has_one_attention_a_block_and_no_unfolding():
    sides = {i: torch.export.Dim(f"side{i}", min=65) for i in (2, 3)}
    small = TiC("nano", channels=(16, 32), depths=(1, 2), out_indices=(0, 1)).eval()
    graph = torch.export.export(small, (torch.randn(1, 3, 96, 128),), dynamic_shapes=(sides,)).graph
    calls = Counter(
        node.target.overloadpacket.__name__ for node in graph.nodes if hasattr(node.target, "overloadpacket")
    )
    blocks = 3
    assert calls["scaled_dot_product_attention"] == blocks and calls["linear"] == 5 * blocks
    assert calls["embedding"] == 4 * blocks  # q, k, v into tiles and the output out of them
    assert calls["roll"] == 4 * blocks and calls["cat"] == blocks  # the cyclic shift
    assert calls["im2col"] == calls["unfold"] == 0
