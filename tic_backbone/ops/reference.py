"""The definition of MSA-Conv, written with unfold: the oracle that every other backend is tested against."""

import torch
import torch.nn.functional as F


def msa_conv2d_reference(q, k, v, kernel_size, stride, dilation, groups, scale, key_stride):
    """See `tic_backbone.msa_conv2d`. Half-precision inputs are computed in float32."""
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    n, c, h, w = q.shape
    q = q[:, :, :: stride[0], :: stride[1]]
    centres = [torch.arange(0, size, s, device=q.device) // r for size, s, r in zip((h, w), stride, key_stride)]
    q = q.reshape(n, groups, c // groups, 1, *q.shape[2:])
    k, v = (windows_around(x, kernel_size, dilation, groups, centres) for x in (k, v))
    attn = (scale * q * k).sum(2, keepdim=True).softmax(3)  # (N, groups, 1, kh*kw, H', W')
    return (attn * v).sum(3).reshape(n, c, *q.shape[4:]).to(dtype)


def windows_around(x, kernel_size, dilation, groups, centres):
    """The window around every centre: (N, groups, C / groups, kh*kw, H', W')."""
    n, c, h, w = x.shape
    padding = tuple(d * (size - 1) // 2 for size, d in zip(kernel_size, dilation))
    x = F.unfold(x, kernel_size, dilation, padding).reshape(n, groups, c // groups, -1, h, w)
    for dim, centre in zip((4, 5), centres):
        if len(centre) != x.shape[dim] or not torch.equal(centre, torch.arange(len(centre), device=x.device)):
            x = x.index_select(dim, centre)
    return x
