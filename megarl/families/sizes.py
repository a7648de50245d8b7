"""Sizes of layers, from which memory is planned before a model is built."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Layers of one width."""

    layers: int
    hidden: int
    query: int  # heads x head size
    key: int  # groups x head size
    ffn: int  # of the dense layers
    gated: bool
    sparse: int = 0  # how many of the layers have experts
    experts: int = 0  # of such a layer
    expert_ffn: int = 0
    chosen: int = 0  # experts of a token
    groups: int = 0  # of keys and values; 0: there are as many as heads

    @property
    def attention(self) -> int:
        """Parameters of a layer's attention."""
        return self.hidden * (2 * self.query + 2 * self.key)

    @property
    def mlp(self) -> int:
        """Parameters of a dense layer's MLP."""
        return self.hidden * self.ffn * (3 if self.gated else 2)

    @property
    def expert(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden * self.expert_ffn


@dataclass(frozen=True)
class VisionSizes:
    """A vision tower and what stands between it and the decoder."""

    layers: Block
    patches_per_token: float  # at most
    patch: int  # numbers of one
    other: int  # parameters of the tower outside its layers
    projector: int  # parameters

    @property
    def in_layers(self) -> int:
        """Parameters of the tower's layers."""
        return self.layers.layers * (self.layers.attention + self.layers.mlp)
