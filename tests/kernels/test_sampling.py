"""Sampling against a float64 computation that sorts each row."""

import math

import numpy as np
import pytest
import torch
from text_generation_kernels import sampling
from text_generation_kernels.philox import uniform_numbers
from text_generation_kernels.sampling import SamplingParameters, choose_best, final_logprobs, sample

pytestmark = pytest.mark.interpreted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# temperature, top-k, top-p, min-p, typical-p
SETTINGS = [
    (0.0, 5, 0.5, 0.5, 0.5),
    (1.0, 0, 1.0, 0.0, 1.0),
    (0.7, 20, 1.0, 0.0, 1.0),
    (1.3, 0, 0.9, 0.0, 1.0),
    (1.0, 50, 0.8, 0.0, 1.0),
    (1.0, 0, 1.0, 0.05, 1.0),
    (1.5, 0, 1.0, 0.0, 0.6),
    (2.0, 400, 0.95, 0.01, 0.8),
    (1.0, 1, 1.0, 0.0, 1.0),
    (1.0, 0, 1e-6, 0.0, 1.0),
    (1e-4, 0, 1.0, 0.0, 1.0),
    (1.0, 100000, 1.0, 3.0, 1.0),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Rows of a thousand tokens span several tiles."""
    monkeypatch.setattr(sampling, "TILE", 512)


def parameters_for(settings, device, seed=2**40 + 17, first_position=3) -> SamplingParameters:
    columns = list(zip(*settings, strict=True))
    rows = len(settings)
    floats = [torch.tensor(columns[index], dtype=torch.float32, device=device) for index in (0, 2, 3, 4)]
    top_k = torch.tensor(columns[1], dtype=torch.int32, device=device)
    seeds = torch.arange(rows, device=device) * 999_999_937 - seed
    positions = torch.arange(rows, device=device) * 2**31 + first_position
    return SamplingParameters(floats[0], top_k, *floats[1:], seeds, positions)


def exact_probabilities(logits: np.ndarray, temperature, top_k, top_p, min_p, typical_p) -> np.ndarray:
    scores = logits / temperature
    if 0 < top_k < len(scores):
        scores = np.where(scores < np.sort(scores)[-top_k], -np.inf, scores)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[(before >= top_p) & (np.arange(len(p)) > 0)]] = 0
        p /= p.sum()
    p = np.where(p < min(min_p, 1) * p.max(), 0, p)
    p /= p.sum()
    if typical_p < 1:
        surprise = -np.log(np.where(p > 0, p, 1))
        distance = np.where(p > 0, np.abs(surprise - (p * surprise).sum()), np.inf)
        order = np.argsort(distance, kind="stable")
        last = order[min((np.cumsum(p[order]) < typical_p).sum(), (p > 0).sum() - 1)]
        # Ties with the last stay; float32 cannot tell nearly equal distances apart.
        p = np.where(distance > distance[last] + 1e-6, 0, p)
        p /= p.sum()
    return p


def check_rows(logits, parameters, sampled):
    columns = [column.cpu().tolist() for column in parameters[:5]]
    numbers = uniform_numbers(parameters.seeds.cpu().numpy(), parameters.positions.cpu().numpy())
    for row, (temperature, *filters) in enumerate(zip(*columns, strict=True)):
        wide = logits[row].cpu().double().numpy()
        token, logprob = int(sampled.tokens[row]), float(sampled.logprobs[row])
        if temperature == 0:
            expected, p = int(wide.argmax()), np.exp(wide - wide.max()) / np.exp(wide - wide.max()).sum()
        else:
            p = exact_probabilities(wide, temperature, *filters)
            expected = int(np.searchsorted(np.cumsum(p), numbers[row] * p.sum(), side="right"))
        assert token == expected, (row, temperature, filters)
        assert logprob == pytest.approx(math.log(p[token]), abs=2e-5), (row, temperature, filters)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1100, torch.bfloat16), (1100, torch.float32), (600, torch.float16), (77, torch.bfloat16)]
)
def test_every_filter(vocab_size, dtype, device):
    torch.manual_seed(vocab_size)
    logits = (4 * torch.randn(len(SETTINGS), vocab_size)).to(dtype).to(device)
    parameters = parameters_for(SETTINGS, device)
    sampled = sample(logits, parameters)
    assert sampled.tokens.dtype == torch.int64
    assert bool(sampled.is_finite.all())
    check_rows(logits, parameters, sampled)


def test_log_probabilities_of_all_tokens(device):
    """What is never chosen has none, whatever excludes it; ties of the last kept token lie in both tiles."""
    settings = [SETTINGS[index] for index in (0, 2, 4, 5, 6, 7)]
    torch.manual_seed(1)
    logits = (4 * torch.randn(len(settings), 600)).bfloat16().to(device)
    columns = parameters_for(settings, device)
    found = final_logprobs(logits, columns).cpu().double().numpy()
    for row, (temperature, *filters) in enumerate(settings):
        wide = logits[row].cpu().double().numpy()
        if temperature == 0:
            temperature, filters = 1.0, SETTINGS[1][1:]
        with np.errstate(divide="ignore"):
            expected = np.log(exact_probabilities(wide, temperature, *filters))
        assert row == 0 or -np.inf in expected
        np.testing.assert_allclose(found[row], expected, atol=2e-5, rtol=0, err_msg=str(settings[row]))


def test_neighbours_do_not_matter(device):
    torch.manual_seed(8)
    logits = (3 * torch.randn(4, 600)).to(device)
    settings = [SETTINGS[index] for index in (4, 0, 7, 1)]
    parameters = parameters_for(settings, device)
    together = sample(logits, parameters)
    for row in (0, 2):
        alone = sample(logits[row : row + 1], SamplingParameters(*(column[row : row + 1] for column in parameters)))
        assert [float(column[0]) for column in alone] == [float(column[row]) for column in together]


def test_ties_of_the_last_kept_token(device):
    """Top-p keeps equals with low ids, top-k keeps all equals, and greedy takes the first."""
    logits = torch.zeros(3, 1300, dtype=torch.bfloat16, device=device)
    logits[:, 700:] = -1.0
    settings = [(1.0, 0, 0.5, 0.0, 1.0), (1.0, 10, 1.0, 0.0, 1.0), (0.0, 0, 1.0, 0.0, 1.0)]
    sampled = sample(logits, parameters_for(settings, device))
    num_kept = math.ceil(0.5 * (700 + 600 * math.exp(-1)))
    assert num_kept > 450
    assert int(sampled.tokens[0]) < num_kept
    assert int(sampled.tokens[1]) < 700
    expected = [-math.log(num_kept), -math.log(700), -math.log(700 + 600 * math.exp(-1))]
    torch.testing.assert_close(sampled.logprobs.cpu(), torch.tensor(expected), atol=1e-5, rtol=0)
    assert int(sampled.tokens[2]) == 0


def test_ties_across_tiles(device):
    """The kept ties of top-p end within the second tile; a number close to 1 chooses the last of them."""
    logits = torch.full((1, 1400), -50.0, device=device)
    logits[0, [5, 600, 700, 1300]] = 2.0
    numbers = uniform_numbers(np.zeros(400, np.int64), np.arange(400))
    chosen = set()
    for position in (int(numbers.argmin()), int(numbers.argmax()), int(np.abs(numbers - 0.5).argmin())):
        parameters = parameters_for([(1.0, 0, 0.7, 0.0, 1.0)], device)
        sampled = sample(
            logits, parameters._replace(seeds=parameters.seeds * 0, positions=torch.tensor([position], device=device))
        )
        assert float(sampled.logprobs[0]) == pytest.approx(-math.log(3), abs=1e-5)
        chosen.add(int(sampled.tokens[0]))
    assert chosen == {5, 600, 700}


def test_masked_tokens_are_never_chosen(device):
    torch.manual_seed(2)
    logits = torch.randn(len(SETTINGS), 1030).bfloat16()
    logits[:, 1:] = -torch.inf
    logits[:, 900] = 0.5
    logits = logits.to(device)
    sampled = sample(logits, parameters_for(SETTINGS, device))
    assert set(sampled.tokens.tolist()) <= {0, 900}
    assert bool(sampled.is_finite.all())
    assert bool(sampled.logprobs.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_broken_rows_harm_no_other(dtype, device):
    torch.manual_seed(3)
    logits = torch.randn(6, 700).to(dtype)
    logits[1] = torch.nan
    logits[2, 650] = torch.nan
    logits[3] = -torch.inf
    logits[4, 10] = torch.inf
    logits = logits.to(device)
    settings = [SETTINGS[4]] * 5 + [SETTINGS[0]]
    parameters = parameters_for(settings, device)
    sampled = sample(logits, parameters)
    assert sampled.is_finite.tolist() == [True, False, False, False, False, True]
    assert bool(((sampled.tokens >= 0) & (sampled.tokens < 700)).all())
    whole = torch.tensor([0, 5], device=device)
    check_rows(
        logits[whole],
        SamplingParameters(*(column[whole] for column in parameters)),
        sampling.Sampled(*(column[whole] for column in sampled)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_choose_best(dtype, device):
    torch.manual_seed(4)
    logits = (3 * torch.randn(3, 1500)).to(dtype).to(device)
    logits[1, [40, 900, 1499]] = 60.0
    logits[2] = -60.0
    sampled = choose_best(logits)
    greedy = parameters_for([SETTINGS[0]] * 3, device)
    check_rows(logits, greedy, sampled)
    assert int(sampled.tokens[1]) == 40
    assert int(sampled.tokens[2]) == 0


def test_tiny_temperatures_choose_the_best(device):
    torch.manual_seed(6)
    logits = torch.randn(2, 600).to(device)
    settings = [(1e-40, 0, 0.9, 0.0, 1.0), (1e-30, 7, 1.0, 0.0, 0.5)]
    sampled = sample(logits, parameters_for(settings, device))
    assert sampled.tokens.tolist() == logits.argmax(dim=-1).tolist()
    torch.testing.assert_close(sampled.logprobs.cpu(), torch.zeros(2))


def test_rows_of_a_wider_tensor(device):
    torch.manual_seed(7)
    padded = torch.randn(3, 640, device=device)
    padded[:, 600:] = torch.nan
    parameters = parameters_for([SETTINGS[3], SETTINGS[0], SETTINGS[2]], device)
    sampled = sample(padded[:, :600], parameters)
    assert bool(sampled.is_finite.all())
    check_rows(padded[:, :600], parameters, sampled)


def test_no_rows(device):
    none = torch.zeros(0, device=device)
    sampled = sample(torch.zeros(0, 50, device=device), SamplingParameters(*[none] * 7))
    assert sampled.tokens.shape == (0,)
