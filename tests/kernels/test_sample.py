"""Sampling: the processors against a naive float64 form, the choice against its distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_generation_kernels import reference_sampling as reference
from text_generation_kernels.philox import uniform_numbers


def naive_probabilities(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> list[float]:
    """One row, token by token. Among equals the lower id is the better one."""
    scaled = [value / temperature for value in logits]
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    least = scaled[order[top_k - 1]] if 0 < top_k < len(scaled) else -math.inf
    weights = [math.exp(value - scaled[order[0]]) if value >= least else 0.0 for value in scaled]
    total = sum(weights)
    kept, before = set(), 0.0
    for token in order:
        if top_p >= 1 or before < top_p or not kept:
            kept.add(token)
        before += weights[token] / total
    weights = [weight if token in kept else 0.0 for token, weight in enumerate(weights)]
    weights = [weight if weight >= min_p * max(weights) else 0.0 for weight in weights]
    weights = [weight / sum(weights) for weight in weights]
    if typical_p >= 1:
        return weights
    # How far a token's surprise is from the entropy; distances that float32 cannot tell apart are ties, which stay.
    entropy = -sum(weight * math.log(weight) for weight in weights if weight)
    distances = [round(abs(-math.log(weight) - entropy), 5) if weight else math.inf for weight in weights]
    held, farthest = 0.0, 0.0
    for distance, weight in sorted(zip(distances, weights, strict=True)):
        if weight and held < typical_p:
            held, farthest = held + weight, distance
    weights = [weight if distance <= farthest else 0.0 for distance, weight in zip(distances, weights, strict=True)]
    return [weight / sum(weights) for weight in weights]


def sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    **columns: object,
):
    rows = len(logits)
    seeds = columns.get("seeds", torch.arange(rows))
    positions = columns.get("positions", torch.zeros(rows, dtype=torch.int64))
    parameters = [torch.full((rows,), value) for value in (temperature, top_k, top_p, min_p, typical_p)]
    tokens, logprobs = reference.sample(logits, *parameters, seeds, positions)
    whole = reference.final_logprobs(logits, *parameters)
    is_sound = reference.finite_rows(logits)
    torch.testing.assert_close(whole.gather(1, tokens.unsqueeze(1)).squeeze(1)[is_sound], logprobs[is_sound])
    return tokens, logprobs, whole


@settings(deadline=None, max_examples=150)
@given(
    # Coarse values, so that ties are frequent, and probabilities that no rounding carries over top_p.
    values=st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    temperature=st.sampled_from([0.25, 1.0, 3.0]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([0.013, 0.31, 0.577, 0.911, 0.9973, 1.0]),
    min_p=st.sampled_from([0.0, 0.0171, 0.33, 1.0]),
    typical_p=st.sampled_from([0.0113, 0.297, 0.713, 0.9871, 1.0]),
    seed=st.integers(0, 1000),
)
def test_choice_is_the_inverse_distribution_of_the_naive_form(
    values: list[int], temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float, seed: int
) -> None:
    row = [value / 2 for value in values]
    filters = (temperature, top_k, top_p, min_p, typical_p)
    expected = naive_probabilities(row, *filters)
    tokens, logprobs, whole = sample(torch.tensor([row]), *filters, seeds=torch.tensor([seed]))
    token = int(tokens[0])
    torch.testing.assert_close(whole[0].double(), torch.tensor(expected).double().log(), atol=1e-5, rtol=0)
    number = uniform_numbers(np.array([seed]), np.array([0]))[0]
    assert sum(expected[:token]) - 1e-6 <= number <= sum(expected[: token + 1]) + 1e-6
    assert float(logprobs[0]) == pytest.approx(math.log(expected[token]), abs=1e-5)


def test_frequencies_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    tokens, *_ = sample(probabilities.log().repeat(20_000, 1))
    counts = tokens.bincount(minlength=4)
    assert counts[1] == 0
    # Within five standard deviations; the seeds are fixed.
    assert (counts / 20_000 - probabilities).abs().max() < 5 * math.sqrt(0.25 / 20_000)


def test_greedy_reports_the_models_own_logprob() -> None:
    logits = torch.randn(5, 301, generator=torch.Generator().manual_seed(1)).bfloat16()
    tokens, logprobs, _ = sample(logits, temperature=0.0, top_k=3, top_p=0.5)
    wide = logits.double()
    assert torch.equal(tokens, wide.argmax(-1))
    torch.testing.assert_close(logprobs, wide.log_softmax(-1).amax(-1).float())


def test_log_probabilities_of_a_whole_vocabulary() -> None:
    """As a model makes them: one or a few good tokens before a great many bad ones."""
    logits = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(5)) * 3
    logits[:, 17] += torch.arange(14.0, 22.0)
    expected = logits.double().log_softmax(-1)
    tokens, logprobs, whole = sample(logits, temperature=0.0)
    torch.testing.assert_close(whole.double(), expected, atol=1e-6, rtol=1e-7)
    assert torch.equal(logprobs, whole.gather(1, tokens.unsqueeze(1)).squeeze(1)), "one token, one value"


@pytest.mark.parametrize("vocab_size", [40, 5000])
def test_neighbours_change_nothing(vocab_size: int) -> None:
    """The same rows alone, all together and in another order, greedy and random ones mixed."""
    generator = torch.Generator().manual_seed(2)
    # Rows 4 and 7 are nearly flat, so that their nucleus needs the whole vocabulary sorted.
    logits = torch.randn(9, vocab_size, generator=generator) * torch.tensor([4, 4, 2, 4, 0.1, 4, 3, 0.1, 9])[:, None]
    columns = [
        torch.tensor([1.0, 0.0, 0.5, 1.5, 1.0, 0.0, 2.0, 1.0, 1.0]),
        torch.tensor([0, 0, 5, 17, 0, 3, 0, 0, 1]),
        torch.tensor([1.0, 1.0, 0.9, 0.5, 0.95, 0.2, 1.0, 0.99, 0.7]),
        torch.tensor([0.0, 0.5, 0.0, 0.1, 0.0, 0.0, 0.3, 0.01, 0.0]),
        torch.tensor([1.0, 0.5, 0.5, 1.0, 0.8, 1.0, 0.4, 1.0, 1.0]),
        torch.arange(9) * 77,
        torch.arange(9) + 3,
    ]
    tokens, logprobs = reference.sample(logits, *columns)
    order = torch.tensor([4, 8, 0, 3, 1, 7, 2, 6, 5])
    shuffled = reference.sample(logits[order], *(column[order] for column in columns))
    assert torch.equal(shuffled[0], tokens[order])
    for row in range(9):
        alone = reference.sample(logits[row : row + 1], *(column[row : row + 1] for column in columns))
        assert alone[0].tolist() == [tokens[row]]
        assert alone[1].tolist() == pytest.approx([float(logprobs[row])], abs=1e-6)


def test_seed_and_position_each_change_the_choice() -> None:
    flat = torch.zeros(64, 10_000)
    by_seed, *_ = sample(flat)
    by_position, *_ = sample(flat, seeds=torch.zeros(64, dtype=torch.int64), positions=torch.arange(64))
    assert len(set(by_seed.tolist())) > 60
    assert len(set(by_position.tolist())) > 60


def test_broken_rows_are_told_and_harm_no_other() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    logits[1] = torch.nan
    logits[2, 7] = torch.inf
    logits[3] = -torch.inf
    logits[4, :49] = -torch.inf
    assert reference.finite_rows(logits).tolist() == [True, False, False, False, True, True]
    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.9)):
        tokens, logprobs, _ = sample(logits, temperature, top_k=5, top_p=top_p)
        whole, whole_logprobs, _ = sample(logits[[0, 5]], temperature, 5, top_p, seeds=torch.tensor([0, 5]))
        assert tokens[[0, 5]].tolist() == whole.tolist()
        torch.testing.assert_close(logprobs[[0, 5]], whole_logprobs)
        assert tokens[4] == 49
        assert ((tokens >= 0) & (tokens < 50)).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[50.0, 80.0, -300.0, 79.0]])
    tokens, logprobs, _ = sample(logits, temperature)
    assert tokens.tolist() == [1]
    assert logprobs.tolist() == [0.0]


@pytest.mark.parametrize(("min_p", "typical_p"), [(0.05, 1.0), (0.0, 0.6), (0.02, 0.8)])
def test_min_p_and_typical_p_keep_what_transformers_keeps(min_p: float, typical_p: float) -> None:
    from transformers import MinPLogitsWarper, TypicalLogitsWarper

    row = torch.randn(1, 60, generator=torch.Generator().manual_seed(9)) * 2
    kept = MinPLogitsWarper(min_p)(None, row.clone()) if min_p else row.clone()
    kept = TypicalLogitsWarper(typical_p)(None, kept) if typical_p < 1 else kept
    expected = kept.log_softmax(-1)[0]
    rows, ones = 20_000, torch.ones(20_000)
    tokens, logprobs = reference.sample(
        row.repeat(rows, 1), ones, torch.zeros(rows), ones, ones * min_p, ones * typical_p,
        torch.arange(rows), torch.zeros(rows).long(),
    )  # fmt: skip
    torch.testing.assert_close(logprobs, expected[tokens], atol=1e-5, rtol=0)
    counts, wanted = tokens.bincount(minlength=60).double(), rows * expected.double().exp()
    degrees = int((wanted > 0).sum()) - 1
    statistic = float(((counts - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum())
    # The chi-square quantile at 1 - 1e-4, by Wilson and Hilferty.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3
