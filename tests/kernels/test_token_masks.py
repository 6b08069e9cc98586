"""Masked logits, against a mask of one boolean a token."""

import numpy as np
import pytest
import torch
from text_generation_kernels.token_masks import NO_MASK, mask_tokens, num_words

pytestmark = pytest.mark.interpreted


def packed(allowed: np.ndarray) -> torch.Tensor:
    """Words of 32 tokens, the lowest bit first; what lies beyond the vocabulary is allowed."""
    rows, vocab_size = allowed.shape
    padded = np.ones((rows, num_words(vocab_size) * 32), np.int64)
    padded[:, :vocab_size] = allowed
    words = (padded.reshape(rows, -1, 32) << np.arange(32)).sum(axis=2)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 33), (3, 5000), (4, 4096)])
@pytest.mark.parametrize("has_free_row", [True, False])
def test_excluded_tokens_become_impossible(num_rows, vocab_size, has_free_row, dtype, device):
    random = np.random.default_rng(vocab_size)
    allowed = random.random((num_rows + 1, vocab_size)) < 0.3
    logits = torch.from_numpy(random.normal(size=(num_rows, vocab_size))).to(device, dtype)
    mask_rows = random.permutation(num_rows + 1)[:num_rows].astype(np.int32)
    if has_free_row:
        mask_rows[num_rows // 2] = NO_MASK
    expected = logits.clone()
    for row, mask_row in enumerate(mask_rows):
        if mask_row != NO_MASK:
            expected[row, torch.from_numpy(~allowed[mask_row]).to(device)] = float("-inf")
    mask_tokens(logits, packed(allowed).to(device), torch.from_numpy(mask_rows).to(device))
    assert logits.equal(expected)


def test_rows_of_a_wider_tensor(device):
    """Logits may be a part of a larger tensor; what lies beside them stays."""
    whole = torch.zeros(2, 64, device=device)
    allowed = np.zeros((1, 40), bool)
    mask_tokens(whole[:, :40], packed(allowed).to(device), torch.tensor([NO_MASK, 0], dtype=torch.int32, device=device))
    assert whole.isinf().sum(dim=1).tolist() == [0, 40]
    assert whole[1, 40:].tolist() == [0.0] * 24


def test_no_rows(device):
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    mask_tokens(torch.zeros(0, 40, device=device), torch.zeros(1, 2, dtype=torch.int32, device=device), nothing)
