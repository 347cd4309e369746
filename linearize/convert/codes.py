"""Where the columns of `learned_softmax` start: at keys that the layer has made, as the centres of its codes.

A key takes a share of the code whose centre c is near it, as in a mixture of Gaussians of one width: its logit is
-|k - c|^2 / (2 s) but for |k|^2, which all codes share. A query reads code c as softmax attention reads the key c, by
q.c / sqrt(D). Their product is attention to the centres, each in the place of the keys about it: the Nystroem method
(Xiong et al. 2021, arXiv:2102.03902) with keys that were seen as its landmarks. Training moves the centres from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.modeling.mixer import Mixer

WIDTH = 4.0
"""s of a Gaussian, in mean squared distances of a key from the mean, over D: wider than the keys that it stands for."""


@torch.no_grad()
def start_codes(mixer: Mixer, keys: Tensor) -> None:
    """Set the maps of queries and keys from `keys` [S, n, D], the linear branch's, any n; in place.

    Of more keys than codes, as many as there are codes are taken at even distances; of fewer, the codes beyond them
    stay as they are. Keys are centred: softmax over keys does not see what all of them share.
    """
    heads, count, size = keys.shape
    width = mixer.k_map.weight.shape[2]
    place = torch.linspace(0, count - 1, min(width, count), device=keys.device).round().long()
    mean = keys.mean(1, keepdim=True)
    centred = keys - mean
    spread = (WIDTH * centred.square().sum(-1).mean(-1) / size).clamp_min(1e-12)[:, None, None]
    codes = centred[:, place]  # [S, codes, D]
    columns = (codes / spread).mT
    bias = -codes.square().sum(-1) / (2 * spread[..., 0]) - (mean @ columns).squeeze(1)
    of_query = (codes * mixer.scaling).mT.repeat_interleave(mixer.num_heads // heads, dim=0)
    for values, parameter in (
        (columns, mixer.k_map.weight),
        (bias, mixer.k_map.bias),
        (of_query, mixer.q_map.weight),
        (torch.zeros_like(of_query[:, 0]), mixer.q_map.bias),
    ):
        parameter[..., : len(place)] = values.to(parameter.dtype)
