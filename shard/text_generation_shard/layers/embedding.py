"""Token embedding and output head, both split over the ranks by vocabulary."""

import torch
import torch.nn.functional as F
from torch import nn

from text_generation_shard import distributed
from text_generation_shard.layers.partition import CheckpointTensor, Partition, WeightTarget
from text_generation_shard.layers.product_weight import ProductWeight

NUM_EXACT_LOGITS = 16


class VocabParallelEmbedding(nn.Module):
    """This rank's range of the vocabulary, which is padded so that all ranges are equally long."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        partition: Partition,
        tied_to: "VocabParallelEmbedding | None" = None,
    ) -> None:
        super().__init__()
        self.partition = partition
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.share = -(-vocab_size // partition.world_size)
        self.first_id = partition.rank * self.share
        own = partition.parameter(self.share, hidden_size) if tied_to is None else tied_to.weight
        self.weight: nn.Parameter = own
        self.product: ProductWeight = (
            ProductWeight(own, partition.form, is_multiplied=False) if tied_to is None else tied_to.product
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of the tokens, on every rank."""  # [T] -> [T, hidden]
        if self.partition.world_size == 1:
            return F.embedding(input_ids, self.weight)
        local_ids = input_ids - self.first_id
        is_elsewhere = (local_ids < 0) | (local_ids >= self.share)
        output = F.embedding(local_ids.masked_fill(is_elsewhere, 0), self.weight)
        return distributed.all_reduce(output.masked_fill(is_elsewhere.unsqueeze(1), 0))

    def targets(self, name: str) -> dict[str, WeightTarget]:
        """Target of the checkpoint matrix `name` (without `.weight`)."""
        return {f"{name}.weight": WeightTarget(self.weight, (self.vocab_size, self.hidden_size), self._load)}

    def _load(self, tensor: CheckpointTensor) -> None:
        start = min(self.first_id, self.vocab_size)
        end = min(self.first_id + self.share, self.vocab_size)
        if end > start:
            self.product.load(tensor, own=slice(0, end - start), rows=slice(start, end))
        if end - start < self.share:
            self.product.load_zeros(slice(end - start, self.share))


class LanguageModelHead(VocabParallelEmbedding):
    """Hidden states to logits; with tied embeddings the weight is the embedding's."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        partition: Partition,
        tied_to: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__(vocab_size, hidden_size, partition, tied_to)
        self.product.is_multiplied = True
        self.product.is_looked_up = tied_to is not None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the whole vocabulary, complete on every rank."""  # [R, hidden] -> [R, vocab]
        logits = self.product.linear(hidden)
        if self.product.is_packed and self.product.is_looked_up and logits.dtype == torch.bfloat16:
            logits = _with_exact_best(logits, hidden, self.weight)
        return distributed.all_gather(logits)[:, : self.vocab_size]


def _with_exact_best(logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Float32 logits, the best of which are computed again in float32.

    Rounded to bfloat16, as a CPU's product leaves them, the best ones are often equal, or in the wrong order. Only a
    weight whose rows can be looked up, that of a tied head, allows it.
    """
    best = logits.topk(min(NUM_EXACT_LOGITS, logits.shape[1]), dim=-1).indices
    exact = (weight[best].float() @ hidden.float().unsqueeze(2)).squeeze(2)
    return logits.float().scatter_(1, best, exact)
