"""Token ids that go from one step to the next on the device, against plain indexing."""

import numpy as np
import pytest
import torch
from text_generation_kernels.token_exchange import publish_tokens, read_tokens, token_of_row

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("num_tokens", [1, 3, 257])
def test_known_ids_stay_and_rows_are_looked_up(num_tokens, device):
    random = np.random.default_rng(num_tokens)
    last_tokens = random.integers(0, 2**31 - 1, 40)
    known, rows = random.integers(0, 2**31 - 1, num_tokens), random.integers(0, 40, num_tokens)
    is_known = random.random(num_tokens) < 0.5
    input_ids = np.where(is_known, known, token_of_row(rows)).astype(np.int32)
    answer = read_tokens(torch.from_numpy(input_ids).to(device), torch.from_numpy(last_tokens).to(device))
    assert answer.tolist() == np.where(is_known, known, last_tokens[rows]).tolist()
    assert answer.dtype == torch.int64


@pytest.mark.parametrize("num_samples", [1, 300])
def test_tokens_reach_their_rows_and_the_host(num_samples, device):
    random = np.random.default_rng(num_samples)
    tokens = torch.from_numpy(random.integers(0, 10**6, num_samples)).to(device)
    logprobs = -torch.rand(num_samples, device=device)
    is_finite = torch.rand(num_samples, device=device) < 0.5
    rows = torch.from_numpy(random.permutation(400)[:num_samples].astype(np.int32)).to(device)
    last_tokens = torch.full((400,), -7, device=device)
    output = torch.full((3, 512), -9, dtype=torch.int32, device=device)
    publish_tokens(tokens, logprobs, is_finite, rows, last_tokens, output)
    assert last_tokens[rows.long()].equal(tokens)
    assert (last_tokens == -7).sum() == 400 - num_samples
    assert output[0, :num_samples].tolist() == tokens.tolist()
    assert output[1, :num_samples].view(torch.float32).equal(logprobs)
    assert output[2, :num_samples].tolist() == is_finite.int().tolist()
    assert (output[:, num_samples:] == -9).all()


def test_a_step_without_tokens(device):
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    assert read_tokens(nothing, torch.zeros(3, dtype=torch.int64, device=device)).shape == (0,)
