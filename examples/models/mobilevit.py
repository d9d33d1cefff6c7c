"""MobileViT, extra extra small and extra small (arXiv 2110.02178, table 4 of the appendix), without dropout.

At 1000 classes they have 1,272,024 and 2,317,848 parameters (published: 1.3 M and 2.3 M), at 10 classes 954,234 and 1,936,698. For 32x32
images the first convolution and the last stage keep the size: the three transformers see maps of 8x8, 4x4 and 4x4, which is 16, 4 and 4
patches.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import InvertedResidual, conv_bn_act, initialize, scaled

WIDTH = 16
HEADS = 4
PATCH = 2
DEPTHS = (2, 4, 3)  # transformer layers of the last three stages
# size: (channels of the five stages, of the three transformers, of the last convolution; expansion of the inverted residuals), at width 16
SIZES = {
    "xxs": ((16, 24, 48, 64, 80), (64, 80, 96), 320, 2),
    "xs": ((32, 48, 64, 80, 96), (96, 120, 144), 384, 4),
}
# Of the first convolution and the five stages.
IMAGENET_STRIDES = (2, 1, 2, 2, 2, 2)
SMALL_STRIDES = (1, 1, 2, 2, 2, 1)


class TransformerLayer(nn.Module):
    """Self-attention and a two-layer perceptron twice as wide, each behind a layer norm and added to its input.

    `Tensor[N, 4, T, C]` to the same: attention is among the T tokens. The sample stays dimension 0, where compressed layers look for it.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 2 * channels)
        self.act = nn.SiLU()
        self.fc2 = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        # Dimensions 0 and 1 become one: attention is fused for four-dimensional tensors only.
        queries, keys, values = self.qkv(self.norm1(x)).flatten(0, 1).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(queries, keys, values)
        x = x + self.proj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class MobileViTBlock(nn.Module):
    """Convolutions see a pixel's neighbours, the transformer the pixels at the same place of every 2x2 patch (section 3.1).

    A map of odd height or width is resampled bilinearly to the next even one for the transformer, and back after it, as in the authors'
    code; padding would need a mask in the attention.
    """

    def __init__(self, channels: int, hidden: int, depth: int):
        super().__init__()
        self.local = conv_bn_act(channels, channels, 3, act=nn.SiLU)
        self.embed = nn.Conv2d(channels, hidden, 1, bias=False)
        self.transformer = nn.Sequential(*(TransformerLayer(hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(hidden)
        self.project = conv_bn_act(hidden, channels, 1, act=nn.SiLU)
        self.fuse = conv_bn_act(2 * channels, channels, 3, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        out = self.embed(self.local(x))
        size = out.shape[2:]
        even = [length + length % PATCH for length in size]
        if even != list(size):
            out = F.interpolate(out, even, mode="bilinear")
        out = fold(self.norm(self.transformer(unfold(out))), even)
        if even != list(size):
            out = F.interpolate(out, size, mode="bilinear")
        return self.fuse(torch.cat((x, self.project(out)), 1))


def unfold(x: Tensor) -> Tensor:
    """`Tensor[N, C, H, W]`, H and W even, to `Tensor[N, 4, H W / 4, C]`: place in the patch, patch, channel."""
    x = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return x.permute(0, 3, 5, 2, 4, 1).flatten(3, 4).flatten(1, 2)


def fold(x: Tensor, size: list[int]) -> Tensor:
    """The inverse of `unfold`; channels_last, which is how tokens lie in memory."""
    height, width = size
    x = x.unflatten(2, (height // PATCH, width // PATCH)).unflatten(1, (PATCH, PATCH))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class MobileViT(nn.Module):
    """`Tensor[N, in_channels, H, W]` to `Tensor[N, num_classes]`. `width` is the number of channels of the first convolution; the others
    follow in proportion, rounded to multiples of 8. `strides`: of the first convolution and the five stages."""

    def __init__(self, size: str, num_classes: int = 10, in_channels: int = 3, width: int = WIDTH, strides: tuple = SMALL_STRIDES):
        super().__init__()
        stages, transformers, last, expansion = SIZES[size]
        self.conv1 = nn.Conv2d(in_channels, width, 3, strides[0], 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = nn.SiLU(inplace=True)
        blocks, channels = [], width
        for stage, (published, stride) in enumerate(zip(stages, strides[1:], strict=True)):
            outputs = scaled(published, width / WIDTH)
            blocks.append(InvertedResidual(channels, outputs, stride, expansion, nn.SiLU))
            channels = outputs
            if stage == 1:
                blocks += [InvertedResidual(channels, channels, 1, expansion, nn.SiLU) for _ in range(2)]
            elif stage > 1:
                blocks.append(MobileViTBlock(channels, scaled(transformers[stage - 2], width / WIDTH), DEPTHS[stage - 2]))
        self.blocks = nn.Sequential(*blocks)
        self.last = conv_bn_act(channels, scaled(last, width / WIDTH), 1, act=nn.SiLU)
        self.fc = nn.Linear(self.last.conv.out_channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.act(self.bn1(self.conv1(x)))))
        return self.fc(torch.mean(x, (2, 3)))
