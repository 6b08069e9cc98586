"""What changes logits before a token is chosen, against transformers' logits processors and counting by hand."""

import numpy as np
import pytest
import torch
from text_generation_kernels import green_list
from text_generation_kernels.logit_bias import LogitBias
from text_generation_kernels.token_records import TokenRecords
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    WatermarkLogitsProcessor,
)

pytestmark = pytest.mark.interpreted

NUM_ROWS = 40


def columns(device, *lists):
    kinds = [torch.int32, torch.int64]
    return [torch.tensor(values, dtype=kind, device=device) for values, kind in zip(lists, kinds, strict=True)]


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def record_of(prompt: list[int], generated: list[int], counts_prompt: bool, device):
    """As the caller of `start` makes it."""
    values: dict[int, int] = {}
    for token in prompt:
        values[token] = values.get(token, 0) + 2 if counts_prompt else 1
    for token in generated:
        values[token] = values.get(token, 0) + 2
    tokens = torch.tensor(list(values), dtype=torch.int64, device=device)
    return tokens, torch.tensor(list(values.values()), dtype=torch.int16, device=device)


@pytest.mark.parametrize("vocab_size", [1000, 2048])
def test_penalties_follow_what_each_row_has_seen(vocab_size, device):
    """Tokens counted one by one; transformers' repetition penalty, the others by hand."""
    random = np.random.default_rng(vocab_size)
    # Batch row -> repetition, frequency, presence, share; the row between has none, the last one is padding.
    settings = {0: (1.3, 0.0, 0.0, 0.0), 5: (1.0, 0.0, 0.0, 0.0), 17: (0.7, 0.5, 0.25, 0.0), 39: (1.1, 0.0, 0.0, 1.5)}
    settings |= {2: (1.0, -1.5, 0.0, 0.0), 16: (1.0, 0.0, 2.0, 0.0), NUM_ROWS: (1.0, 0.0, 0.0, 0.0)}
    records = TokenRecords(NUM_ROWS, vocab_size, device)
    penalties = torch.zeros(NUM_ROWS + 1, 4, device=device)
    penalties[:, 0] = 1.0
    texts: dict[int, tuple[list[int], list[int]]] = {}
    for row, values in settings.items():
        penalties[row] = torch.tensor(values)
        prompt, generated = (random.integers(0, 50, length).tolist() for length in (30, 6))
        texts[row] = (prompt, generated)
        if values != (1.0, 0.0, 0.0, 0.0):
            records.start(row, *record_of([9] * 40, [3], False, device))  # of a sequence before it
            records.start(row, *record_of(prompt, generated, values[3] != 0, device))
    for _ in range(3):
        order = random.permutation(list(settings)).tolist()
        lengths = [sum(map(len, texts[row])) for row in order]
        rows, positions = columns(device, order, lengths)
        logits = torch.from_numpy(random.normal(0, 3, (len(order), vocab_size))).float().to(device)
        expected = logits.cpu().double()
        records.penalize(logits, rows, positions, penalties)
        for sample, row in enumerate(order):
            repetition, frequency, presence, share = settings[row]
            prompt, generated = texts[row]
            ids = torch.tensor([prompt + generated])
            scores = RepetitionPenaltyLogitsProcessor(repetition)(ids, expected[sample : sample + 1].clone())[0]
            counts = torch.bincount(torch.tensor(generated), minlength=vocab_size).double()
            all_counts = torch.bincount(ids[0], minlength=vocab_size).double()
            scores -= frequency * counts + presence * (counts > 0) + share * all_counts / len(ids[0])
            torch.testing.assert_close(logits[sample].cpu().double(), scores, atol=2e-6, rtol=1e-6)
        tokens = random.integers(0, 50, len(order))
        records.count(torch.from_numpy(tokens).to(device), rows, penalties)
        for row, token in zip(order, tokens.tolist(), strict=True):
            texts[row][1].append(token)


def test_counts_stop_at_the_largest(device):
    records = TokenRecords(2, 64, device)
    penalties = torch.tensor([[1.0, 0.5, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], device=device)
    for row, value in ((0, 2 * (2**14 - 1)), (1, 2 * (2**14 - 2) + 1)):
        tokens = torch.tensor([7], device=device)
        records.start(row, tokens, torch.tensor([value], dtype=torch.int16, device=device))
    rows, positions = columns(device, [0, 1, 2], [9, 9, 9])
    records.count(torch.tensor([7, 7, 7], device=device), rows, penalties)
    logits = torch.zeros(3, 64, device=device)
    records.penalize(logits, rows, positions, penalties)
    assert logits[:, 7].tolist() == [-0.5 * (2**14 - 1), -0.5 * (2**14 - 1), 0.0]
    assert bool((logits[:, :7] == 0).all())


def test_biases_and_banned_tokens(device):
    bias = LogitBias(8, device)
    many = list(range(300, 1300))
    lists = {
        3: ([5, 9, 700], [0.0, 2.5, -100.0], (3, 2, 12)),  # 5 and 9 are banned before position 12
        6: (many, [0.5] * 1000, (1000, 0, 0)),
        7: ([], [], (0, 0, 0)),
    }
    for row, (token_ids, values, bounds) in lists.items():
        # Of a sequence before it.
        bias.set(row, ints([1, 2], device), torch.ones(2, device=device), ints([2, 1, 99], device))
        bias.set(row, ints(token_ids, device), torch.tensor(values, device=device), ints(list(bounds), device))
    bias.set(1, ints([0], device), torch.ones(1, device=device), ints([1, 1, 99], device))
    bias.clear(1)
    rows, positions = columns(device, [8, 3, 3, 6, 7, 1], [4, 11, 12, 4, 4, 4])
    logits = torch.randn(6, 1400, generator=torch.Generator().manual_seed(1)).to(device)
    logits[1] = logits[2]
    before = logits.cpu().clone()
    bias.add(logits, rows, positions)
    processor = SequenceBiasLogitsProcessor([[[5], 0.0], [[9], 2.5], [[700], -100.0]])
    late = processor(torch.zeros(1, 1, dtype=torch.int64), before[2:3].clone())[0]
    early = late.clone()
    early[[5, 9]] = -torch.inf
    raised = before[3].clone()
    raised[300:] += torch.tensor([0.5] * 1000 + [0.0] * 100)
    torch.testing.assert_close(logits.cpu(), torch.stack([before[0], early, late, raised, *before[4:]]))


@pytest.mark.parametrize(
    ("vocab_size", "share", "previous"), [(1501, 0.5, [1500, 277]), (97, 0.99, [120_000]), (50, 0.001, [3])]
)
def test_watermark_is_that_of_transformers(vocab_size, share, previous, device, monkeypatch):
    """The very list of green tokens, also for a product with the hash key that exceeds 32 bits."""
    monkeypatch.setattr(green_list, "ROWS_AT_ONCE", 1)
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(5)).to(device)
    expected = logits.cpu().clone()
    samples = [3, 1][: len(previous)]
    processor = WatermarkLogitsProcessor(vocab_size, "cpu", greenlist_ratio=share, bias=2.0)
    for sample, token in zip(samples, previous, strict=True):
        expected[sample] = processor(torch.tensor([[4, token]]), expected[sample : sample + 1])[0]
    columns = (torch.tensor(values, device=device) for values in (samples, previous))
    green_list.add_to_green_tokens(logits, *columns, share, 2.0)
    torch.testing.assert_close(logits.cpu(), expected)
