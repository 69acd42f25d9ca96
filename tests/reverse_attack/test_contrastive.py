"""InfoNCE against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from reverse_attack.contrastive import TEMPERATURE, chance, info_nce


def double_loop(z, similarity, bank=None):
    """The definition, image by image and view by view."""

    def s(a, b):
        dot = sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True))
        if similarity == "Cosine":
            dot /= math.sqrt(sum(p * p for p in a.tolist()) * sum(q * q for q in b.tolist()))
        return dot / TEMPERATURE

    N, V, _ = z.shape
    losses = []
    for n in range(N):
        total = 0.0
        for v in range(V):
            own = [(n, w) for w in range(V) if w != v]
            if bank is None:
                others = [(m, w) for m in range(N) for w in range(V) if m != n]
                candidates = [z[i] for i in own + others]
            else:
                candidates = [z[i] for i in own] + list(bank)
            scores = sum(math.exp(s(z[n, v], c)) for c in candidates)
            for w in own:
                total -= math.log(math.exp(s(z[n, v], z[w])) / scores) / len(own)
        losses.append(total / V)
    return torch.tensor(losses, dtype=z.dtype)


@pytest.mark.parametrize("similarity", ["Cosine", "Dot"])
@pytest.mark.parametrize("n_views", [2, 3, 4])
def test_info_nce_is_the_double_loop(n_views, similarity):
    generator = torch.Generator().manual_seed(n_views)
    z = torch.randn(4, n_views, 5, generator=generator, dtype=torch.float64)
    bank = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(info_nce(z, similarity), double_loop(z, similarity))
    torch.testing.assert_close(info_nce(z, similarity, bank), double_loop(z, similarity, bank))


def test_embeddings_that_tell_nothing_are_at_chance():
    same = torch.ones(6, 4, 3)
    torch.testing.assert_close(info_nce(same).mean().item(), chance(6 * 4 - 1))
    torch.testing.assert_close(info_nce(same, bank=torch.ones(9, 3)).mean().item(), chance(3 + 9))
