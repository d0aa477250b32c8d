"""Well-known architectures with random weights, of any width: networks to be traced, in tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "DenseNet",
    "MlpMixer",
    "ResidualBlock",
    "VisionTransformer",
    "conv1d_network",
    "resnet18",
    "vgg19_convolutions",
]

VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norms around a skip, which is a 1x1 convolution where shapes change."""

    def __init__(self, d_in: int, d_out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(d_out)
        self.downsample = None
        if stride > 1 or d_in != d_out:
            self.downsample = nn.Sequential(nn.Conv2d(d_in, d_out, 1, stride, bias=False), nn.BatchNorm2d(d_out))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet18(width: int = 64, classes: int = 1000) -> nn.Sequential:
    """ResNet-18 in its ImageNet form; [B, 3, H, W] -> [B, classes]."""
    layers = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    d = width
    for stage in range(4):
        d_out = width * 2**stage
        layers += [ResidualBlock(d, d_out, 1 if stage == 0 else 2), ResidualBlock(d_out, d_out)]
        d = d_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d, classes))


def vgg19_convolutions(channels: Sequence[int] = VGG19) -> nn.Sequential:
    """The sixteen convolutions of VGG-19; a channel number of 0 is a pooling. [B, 3, H, W] -> feature maps."""
    layers, d = [], 3
    for width in channels:
        layers += [nn.Conv2d(d, width, 3, padding=1), nn.ReLU(inplace=True)] if width else [nn.MaxPool2d(2)]
        d = width or d
    return nn.Sequential(*layers)


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT with a class token; the defaults are ViT-tiny for 224 x 224 pixels. [B, 3, H, W] -> [B, classes]."""

    def __init__(
        self, width: int = 192, heads: int = 3, depth: int = 12, patch: int = 16, image: int = 224, classes: int = 1000
    ):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class _MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, hidden), nn.GELU(), nn.Linear(hidden, tokens))
        self.channels = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class MlpMixer(nn.Module):
    """Mlps over tokens and over channels in turn, with layer norms. [B, 3, H, W] -> [B, classes]."""

    def __init__(
        self, tokens: int = 4, width: int = 8, hidden: int = 10, depth: int = 2, patch: int = 4, classes: int = 3
    ):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(_MixerBlock(tokens, width, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


class _DenseLayer(nn.Module):
    def __init__(self, d_in: int, growth: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(d_in), nn.Conv2d(d_in, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


class DenseNet(nn.Module):
    """Two blocks whose layers read all before them, a 1x1 convolution between. [B, 3, H, W] -> [B, classes]."""

    def __init__(self, width: int = 6, growth: int = 4, depth: int = 2, classes: int = 5):
        super().__init__()
        end = width + depth * growth
        self.stem = nn.Conv2d(3, width, 3)
        self.first = nn.Sequential(*(_DenseLayer(width + k * growth, growth) for k in range(depth)))
        self.between = nn.Sequential(nn.BatchNorm2d(end), nn.ReLU(), nn.Conv2d(end, width, 1), nn.AvgPool2d(2))
        self.second = nn.Sequential(*(_DenseLayer(width + k * growth, growth) for k in range(depth)))
        self.head = nn.Linear(end, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.between(self.first(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


def conv1d_network(width: int = 8, classes: int = 4) -> nn.Sequential:
    """Strided, dilated and depthwise 1-d convolutions with tanh; [B, 2, 16] -> [B, classes]."""
    return nn.Sequential(
        nn.Conv1d(2, width, 5, stride=2, padding=2), nn.BatchNorm1d(width), nn.Tanh(),
        nn.Conv1d(width, 2 * width, 3, padding=2, dilation=2, groups=width), nn.Tanh(), nn.AvgPool1d(2),
        nn.Flatten(), nn.Linear(8 * width, classes),
    )  # fmt: skip
