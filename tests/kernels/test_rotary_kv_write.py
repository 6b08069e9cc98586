"""The fused head norm, rotation and cache write against a float64 computation."""

import pytest
import torch
from text_generation_kernels.rotary_kv_write import rotary_kv_write

pytestmark = pytest.mark.interpreted

TOLERANCES = {torch.float32: 5e-6, torch.float16: 6e-3, torch.bfloat16: 5e-2}
NUM_BLOCKS, BLOCK_SIZE, MAX_POSITIONS = 7, 4, 50
EPS = 1e-5


def exact_heads(heads: torch.Tensor, positions: torch.Tensor, angles: torch.Tensor, norm: torch.Tensor | None):
    """Norm and rotate, one complex number for each pair of coordinates."""
    heads = heads.double()
    if norm is not None:
        heads = heads / (heads.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()
    half = angles.shape[1]
    turned = torch.complex(heads[..., :half], heads[..., half : 2 * half])
    turned = turned * torch.polar(torch.ones_like(angles), angles)[positions].unsqueeze(1)
    return torch.cat((turned.real, turned.imag, heads[..., 2 * half :]), dim=-1)


def make_angles(rotary_dim: int) -> torch.Tensor:
    frequencies = 100.0 ** -(torch.arange(rotary_dim // 2, dtype=torch.float64) / (rotary_dim // 2))
    return torch.arange(MAX_POSITIONS, dtype=torch.float64).unsqueeze(1) * frequencies


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [(1, 4, 2, 16, 16), (5, 9, 3, 24, 24), (4, 12, 1, 32, 8), (6, 2, 2, 20, 12)],
)
def test_rotary_kv_write(num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, has_norm, dtype, device):
    torch.manual_seed(num_tokens)
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    positions = torch.randint(0, MAX_POSITIONS, (num_tokens,))
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:num_tokens]
    if num_tokens > 1:
        slots[1] = -1
    norms = (1 + 0.2 * torch.randn(2, head_dim)).to(dtype) if has_norm else (None, None)
    angles = make_angles(rotary_dim)
    caches = torch.full((2, NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim), 768.0, dtype=dtype, device=device)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).float().to(device)
    weights = [None if norm is None else norm.to(device) for norm in norms]
    query = rotary_kv_write(
        qkv.to(device), positions.to(device), cos_sin, caches[0], caches[1], slots.to(device), *weights, EPS
    )

    heads = qkv.view(num_tokens, -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    expected_key = exact_heads(heads[1], positions, angles, norms[1])
    expected_caches = torch.full(caches.shape, 768.0, dtype=torch.float64)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected_caches[0, slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = expected_key[token]
            expected_caches[1, slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = heads[2][token].double()
    tolerance = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype] / 4}
    torch.testing.assert_close(query.cpu().double(), exact_heads(heads[0], positions, angles, norms[0]), **tolerance)
    torch.testing.assert_close(caches[0].cpu().double(), expected_caches[0], **tolerance)
    assert torch.equal(caches[1].cpu().double(), expected_caches[1]), "values are copied as they are"


def test_padded_tokens_write_nothing(device):
    caches = torch.full((2, 3, 1, 4, 8), 5.0, device=device)
    cos_sin = torch.ones(4, 8, device=device)
    positions, slots = torch.zeros(3, dtype=torch.int64, device=device), torch.full((3,), -1, device=device)
    query = rotary_kv_write(torch.randn(3, 32, device=device), positions, cos_sin, caches[0], caches[1], slots)
    assert query.shape == (3, 2, 8)
    assert bool((caches == 5.0).all())


def test_no_tokens(device):
    caches = torch.zeros(2, 3, 1, 4, 8, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    query = rotary_kv_write(
        torch.zeros(0, 32, device=device), none, torch.ones(4, 8, device=device), caches[0], caches[1], none
    )
    assert query.shape == (0, 2, 8)
