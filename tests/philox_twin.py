"""Philox (Salmon et al., SC 2011) in plain PyTorch: what the noise of csrc/core/philox.h is drawn from."""

import torch

WORD = 0xFFFFFFFF


def philox4x32(counter, key, rounds=7):
    """Four words each of counter and two of key (int64 tensors or ints, broadcast) to four words."""
    c0, c1, c2, c3 = (torch.as_tensor(c) for c in counter)
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3
