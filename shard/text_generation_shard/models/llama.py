"""The Llama family: Llama 2 and 3, Mistral, Qwen2 and Qwen3, told apart by flags of ModelConfig."""

from itertools import pairwise

import torch
from text_generation_kernels.skinny_matmul import ScaledRows
from torch import nn

from text_generation_shard.layers.attention import Attention
from text_generation_shard.layers.embedding import LanguageModelHead, VocabParallelEmbedding
from text_generation_shard.layers.mlp import GatedMLP
from text_generation_shard.layers.norm import RMSNorm
from text_generation_shard.layers.partition import Partition, WeightTarget
from text_generation_shard.layers.rotary import RotaryEmbedding
from text_generation_shard.model_config import ModelConfig


class DecoderLayer(nn.Module):
    """Attention and MLP; each adds its output to the residual and norms the sum for what follows."""

    def __init__(self, config: ModelConfig, layer: int, rotary: RotaryEmbedding, partition: Partition) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, partition)
        self.attention = Attention(config, layer, rotary, partition)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, partition)
        self.mlp = GatedMLP(config, partition)

    def forward(
        self,
        normed: torch.Tensor | ScaledRows,
        residual: torch.Tensor,
        positions: torch.Tensor,
        next_norm: RMSNorm,
        rows: torch.Tensor | None,
    ) -> tuple[torch.Tensor | ScaledRows, torch.Tensor]:
        """From the normed sum of what came before, and that sum, to the same behind this layer, of some rows or all."""
        normed, residual = self.attention(normed, positions, residual, self.mlp_norm, rows)
        return self.mlp(normed, residual, next_norm)  # type: ignore[no-any-return]

    def targets(self, name: str) -> dict[str, WeightTarget]:
        """Targets of the checkpoint's tensors under `name`."""
        return (
            self.attention_norm.targets(f"{name}.input_layernorm")
            | self.attention.targets(f"{name}.self_attn")
            | self.mlp_norm.targets(f"{name}.post_attention_layernorm")
            | self.mlp.targets(f"{name}.mlp")
        )


class LlamaModel(nn.Module):
    """One rank's part of the model. Call it inside `forward_context` and `torch.inference_mode`."""

    def __init__(self, config: ModelConfig, partition: Partition) -> None:
        super().__init__()
        self.config = config
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, partition)
        rotary = RotaryEmbedding(config, partition.device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, rotary, partition) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, partition)
        self.head = LanguageModelHead(
            config.vocab_size,
            config.hidden_size,
            partition,
            tied_to=self.embedding if config.tie_word_embeddings else None,
        )

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states after the last norm, of the step's tokens or of those that `rows` names.

        Of the others the last layer computes keys and values, which later tokens attend to, and nothing behind them.
        """  # [T], [T], [R] -> [T or R, hidden]
        residual: torch.Tensor = self.embedding(input_ids)
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        normed: torch.Tensor | ScaledRows = layers[0].attention_norm(residual)
        for layer, next_layer in pairwise(layers):
            normed, residual = layer(normed, residual, positions, next_layer.attention_norm, None)
        normed, residual = layers[-1](normed, residual, positions, self.norm, rows)
        return self.norm(residual) if isinstance(normed, ScaledRows) else normed

    def compute_logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """Logits of some rows, complete on every rank; every rank must call it."""  # [R, hidden] -> [R, vocab]
        return self.head(hidden_rows)  # type: ignore[no-any-return]

    def targets(self) -> dict[str, WeightTarget]:
        """Where each tensor of a checkpoint goes, by its exact name."""
        targets = self.embedding.targets("model.embed_tokens") | self.norm.targets("model.norm")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            targets |= layer.targets(f"model.layers.{index}")
        return targets if self.config.tie_word_embeddings else targets | self.head.targets("lm_head")
