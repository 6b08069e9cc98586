"""Sampling in plain PyTorch: what the kernels are tested against, and what a CPU runs.

Shapes: B rows, R of them random, V vocabulary. The parameters may stay on the CPU: they decide what is computed, and
reading them there waits for no GPU.
"""

import torch

from text_generation_kernels.philox import uniform_numbers

# A nucleus (top-p) is first looked for among this many best tokens; sorting a whole vocabulary is the exception.
NUM_NUCLEUS_CANDIDATES = 512


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A float64 number in [0, 1) for each pair of seed and position, on the seeds' device."""
    numbers = uniform_numbers(seeds.cpu().numpy(), positions.cpu().numpy())
    return torch.from_numpy(numbers).to(seeds.device)


def finite_rows(logits: torch.Tensor) -> torch.Tensor:
    """Which rows can be sampled from: their largest value is a number. A masked (-inf) token is no fault."""  # [B]
    return logits.amax(dim=-1).isfinite()


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Of every token, [B, V] float32, within 1e-6 of what float64 gives.

    On a CPU torch's own `log_softmax` adds up a row one by one: with 49152 tokens it was 1.7e-5 off.
    """
    scores = logits.float()
    scores = scores.sub(scores.amax(dim=-1, keepdim=True))
    return scores.sub_(scores.exp().sum(dim=-1, keepdim=True).log_())


def choose_best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best token of each row, [B] int64, and its log-probability, [B] float32."""
    logits = logits.float()
    tokens = logits.argmax(dim=-1)
    scores = logits - logits.gather(1, tokens.unsqueeze(1))
    return tokens, scores.exp_().sum(dim=-1).log_().neg_()


def sample(
    logits: torch.Tensor,  # [B, V]
    temperatures: torch.Tensor,  # [B]; 0: the best token
    top_k: torch.Tensor,  # [B]; 0: off
    top_p: torch.Tensor,  # [B]; 1: off
    min_p: torch.Tensor,  # [B]; 0: off
    typical_p: torch.Tensor,  # [B]; 1: off
    seeds: torch.Tensor,  # [B]
    positions: torch.Tensor,  # [B]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row, [B] int64, and its log-probability after all that filtered the row, [B] float32.

    A row without finite logits gets some token of the vocabulary; `finite_rows` tells which those are.
    """
    is_greedy = temperatures <= 0
    if bool(is_greedy.all()):
        return choose_best(logits)
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if bool(is_greedy.any()):
        rows = is_greedy.nonzero().squeeze(1).to(logits.device)
        tokens[rows], logprobs[rows] = choose_best(logits[rows])
    random = (~is_greedy).nonzero().squeeze(1)
    rows = random.to(logits.device)
    scores = _scores(logits[rows], temperatures[random])
    weights = _keep(scores, top_k[random], top_p[random], min_p[random], typical_p[random])
    numbers = uniform(seeds[random], positions[random]).to(logits.device)
    tokens[rows], logprobs[rows] = _choose_at_random(weights, numbers)
    return tokens, logprobs


def final_logprobs(
    logits: torch.Tensor,  # [B, V]
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    typical_p: torch.Tensor,
) -> torch.Tensor:
    """Log-probability of every token after all that filters its row, -inf where it is filtered out.

    Of a greedy row the model's own.
    """  # [B, V] float32
    result = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    is_greedy = temperatures <= 0
    if bool(is_greedy.any()):
        rows = is_greedy.nonzero().squeeze(1).to(logits.device)
        result[rows] = log_probabilities(logits[rows])
    random = (~is_greedy).nonzero().squeeze(1)
    if len(random):
        rows = random.to(logits.device)
        scores = _scores(logits[rows], temperatures[random])
        weights = _keep(scores, top_k[random], top_p[random], min_p[random], typical_p[random])
        # Where only temperature and top-k count, a weight of 0 may be a probability too small for float32.
        is_open = (top_p[random] >= 1) & (min_p[random] <= 0) & (typical_p[random] >= 1)
        is_kept = (weights > 0) | is_open.to(logits.device).unsqueeze(1)
        total = scores.exp().mul_(weights > 0).sum(dim=-1, keepdim=True, dtype=torch.float64)
        result[rows] = (scores - total.log().float()).masked_fill_(~is_kept, -torch.inf)
    return result


def _scores(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Logits over the temperature, relative to the best token's: so no temperature, however small, overflows."""
    scores = logits.float()
    scores = scores.sub(scores.amax(dim=-1, keepdim=True))
    return scores.div_(temperatures.to(scores).unsqueeze(1))


def _keep(
    scores: torch.Tensor,  # [R, V] float32; what top-k drops is set to -inf
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    typical_p: torch.Tensor,
) -> torch.Tensor:
    """Weights that are proportional to the probabilities of the kept tokens, 0 elsewhere."""  # [R, V]
    _keep_top_k(scores, top_k)
    weights = scores.softmax(dim=-1)
    _keep_top_p(weights, top_p)
    _keep_min_p(weights, min_p)
    _keep_typical(weights, typical_p)
    return weights


def _choose_at_random(
    weights: torch.Tensor,  # [R, V]
    numbers: torch.Tensor,  # [R] float64 in [0, 1)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of the cumulative distribution in token-id order."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Strictly below the total: the product may round up to it, and no token lies beyond.
    target = torch.minimum(numbers.unsqueeze(1) * total, total.nextafter(torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[1] - 1)
    chosen = weights.gather(1, tokens).double() / total
    return tokens.squeeze(1), chosen.log().squeeze(1).float()


def _keep_top_k(scores: torch.Tensor, top_k: torch.Tensor) -> None:
    """Set what is below the k-th best value to -inf; ties with it stay."""
    rows = ((top_k > 0) & (top_k < scores.shape[1])).nonzero().squeeze(1)
    if len(rows) == 0:
        return
    counts, rows = top_k[rows].long(), rows.to(scores.device)
    best = scores[rows].topk(int(counts.max()), dim=-1).values
    least = best.gather(1, (counts - 1).to(scores.device).unsqueeze(1))
    scores[rows] = scores[rows].masked_fill(scores[rows] < least, -torch.inf)


def _keep_top_p(weights: torch.Tensor, top_p: torch.Tensor) -> None:
    """Set to 0 what is outside the smallest set of tokens that reaches `top_p`; among equals low ids come first."""
    rows = (top_p < 1).nonzero().squeeze(1)
    if len(rows) == 0:
        return
    wanted, rows = top_p[rows].to(weights.device).double().unsqueeze(1), rows.to(weights.device)
    candidates = weights[rows]
    num_candidates = min(NUM_NUCLEUS_CANDIDATES, candidates.shape[1])
    best = candidates.topk(num_candidates, dim=-1).values
    if bool((best.sum(dim=-1, keepdim=True, dtype=torch.float64) < wanted).any()):
        best = candidates.sort(dim=-1, descending=True).values
    before = best.cumsum(dim=-1, dtype=torch.float64) - best
    num_kept = (before < wanted).sum(dim=-1, keepdim=True).clamp(min=1)
    least = best.gather(1, num_kept - 1)
    num_ties = num_kept - (best > least).sum(dim=-1, keepdim=True)
    is_tie = candidates == least
    is_kept = (candidates > least) | (is_tie & (is_tie.cumsum(dim=-1) <= num_ties))
    weights[rows] = candidates.masked_fill(~is_kept, 0)


def _keep_min_p(weights: torch.Tensor, min_p: torch.Tensor) -> None:
    """Set to 0 what is less than `min_p` times as likely as the best token, which always stays."""
    rows = (min_p > 0).nonzero().squeeze(1)
    if len(rows) == 0:
        return
    share, rows = min_p[rows].to(weights).clamp(max=1).unsqueeze(1), rows.to(weights.device)
    candidates = weights[rows]
    weights[rows] = candidates.masked_fill(candidates < share * candidates.amax(dim=-1, keepdim=True), 0)


def _keep_typical(weights: torch.Tensor, typical_p: torch.Tensor) -> None:
    """Keep the tokens whose surprise is nearest to the entropy until they hold `typical_p`; ties with the last stay."""
    rows = (typical_p < 1).nonzero().squeeze(1)
    if len(rows) == 0:
        return
    wanted, rows = typical_p[rows].to(weights.device).double().unsqueeze(1), rows.to(weights.device)
    probabilities = weights[rows].double()
    probabilities /= probabilities.sum(dim=-1, keepdim=True)
    surprise = -probabilities.log()
    entropy = (probabilities * surprise).nan_to_num_(0).sum(dim=-1, keepdim=True)
    # Dropped tokens are infinitely far. Float32: nearly equal distances are ties, as they are to the kernel.
    distance = (surprise - entropy).abs_().float()
    ordered, order = distance.sort(dim=-1, stable=True)
    held = probabilities.gather(1, order).cumsum(dim=-1)
    num_below = (held < wanted).sum(dim=-1, keepdim=True).clamp(max=weights.shape[1] - 1)
    farthest = ordered.gather(1, num_below)
    weights[rows] = weights[rows].masked_fill(distance > farthest, 0)
