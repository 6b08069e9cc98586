"""The Llama family: Llama 2 and 3, Mistral, Qwen2 and Qwen3, told apart by flags of ModelConfig."""

import torch
from text_generation_kernels.cpu_attention_plan import CpuAttentionPlan
from text_generation_kernels.skinny_matmul import ScaledRows
from torch import nn

from text_generation_shard.forward_context import get_forward_context
from text_generation_shard.layers.attention import Attention
from text_generation_shard.layers.cpu_decoder import CpuDecoder, CpuLayer
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
        self, normed: torch.Tensor | ScaledRows, residual: torch.Tensor, positions: torch.Tensor, next_norm: RMSNorm
    ) -> tuple[torch.Tensor | ScaledRows, torch.Tensor]:
        """From the normed sum of what came before, and that sum, to the same behind this layer."""
        normed, residual = self.attention(normed, positions, residual, self.mlp_norm)
        return self.mlp(normed, residual, next_norm)  # type: ignore[no-any-return]

    def on_cpu(self) -> CpuLayer:
        """Its part of a CpuDecoder, once the weights are loaded."""
        attention = self.attention
        query_norm, key_norm = attention.head_norms()
        return CpuLayer(
            self.attention_norm.weight, attention.qkv.on_cpu(), query_norm, key_norm, attention.scale,
            attention.output.on_cpu(), self.mlp_norm.weight, self.mlp.gate_up.on_cpu(), self.mlp.down.on_cpu(),
        )  # fmt: skip

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
        self._cpu_decoder: CpuDecoder | None = None

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states after the last norm, of the step's tokens or, on a CPU, of those that `rows` names."""
        # [T], [T], [R] -> [T or R, hidden]
        residual: torch.Tensor = self.embedding(input_ids)
        context = get_forward_context()
        if isinstance(context.plan, CpuAttentionPlan):
            self._cpu_decoder = self._cpu_decoder or self._on_cpu()
            return self._cpu_decoder.run(residual, rows, context.kv_caches, context.plan)
        assert rows is None
        layers = self._decoder_layers()
        normed: torch.Tensor | ScaledRows = layers[0].attention_norm(residual)
        for layer, next_norm in zip(layers, [*(layer.attention_norm for layer in layers[1:]), self.norm], strict=True):
            normed, residual = layer(normed, residual, positions, next_norm)
        return self.norm(residual) if isinstance(normed, ScaledRows) else normed

    def _decoder_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def _on_cpu(self) -> CpuDecoder:
        layers = self._decoder_layers()
        cos_sin_cache = layers[0].attention.rotary.cos_sin_cache  # that of all layers
        return CpuDecoder(
            [layer.on_cpu() for layer in layers], self.norm.weight, self.norm.eps, cos_sin_cache,
            self.config.sliding_windows,
        )  # fmt: skip

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
