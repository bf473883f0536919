"""Layers of a CodeHiFiGAN that run offline, as a stream, and on a CPU without waste.

A convolution does not know where it stands: a *flow* (``WholeFlow`` or ``ChunkFlow``) sets what was there before it.

Tensors are [B, C, T]. While speaking they lie in memory as [B, T, C] ("time-major", oneDNN's channels-last): chunks are
then joined along the time without a copy per channel, and oneDNN takes them as they are. Measured on a chunk of 320 ms
of the preset ``small``, all convolutions: 4.4 ms by ``F.conv1d``, which sends small inputs to an im2col fall-back,
3.9 ms by oneDNN on time-major tensors, 2.9 ms with weights in its own layout (``pack_weights``), 2.7 ms as their part
of ten seconds at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echostream.models.decoders.vocoder_config import MAX_DURATION, DurationConfig

SLOPE = 0.1  # of HiFi-GAN's leaky ReLUs; the one before conv_post has PyTorch's 0.01


# ---------------------------------------------------------------------------------------- how a convolution sees time
class WholeFlow:
    """Offline: the whole sequence is there; before and behind it a convolution sees zeros.

    ``lengths`` [B] (at the current rate) is needed when rows differ and a layer looks ahead: what lies behind a row's
    end is zeroed at every convolution's own input, so that a row sounds the same alone and in a batch.
    """

    def __init__(self, lengths: Tensor | None):
        self.lengths = lengths
        self.mask: Tensor | None = None

    def extend(self, x: Tensor, left: int, right: int = 0) -> Tensor:
        """x [B, C, T] with what stands before and behind it: [B, C, left + T + right]."""
        if self.lengths is not None:
            if self.mask is None or self.mask.shape[-1] != x.shape[-1]:
                self.mask = (torch.arange(x.shape[-1], device=x.device) < self.lengths[:, None]).unsqueeze(1)
            x = torch.where(self.mask, x, 0.0)
        if not left and not right:
            return x
        if x.is_contiguous():
            return F.pad(x, (left, right))
        return F.pad(x.mT, (0, 0, left, right)).mT

    def upsampled(self, rate: int) -> WholeFlow:
        return WholeFlow(None if self.lengths is None else self.lengths * rate)


class ChunkFlow:
    """Streaming: before the chunk a convolution sees what it kept of the past; behind it, nothing.

    A layer that looks ahead gets its input delayed by as much, that is, more past.

    Args:
        lengths: [B] valid inputs of each row, at the current rate.
        caches: what each convolution kept, [B, kept inputs, C], in the order in which they run.
        new: gets what each convolution keeps now, in the same order.
        even: whether all rows are of one length; None: found out.
    """

    def __init__(
        self, lengths: Tensor, caches: Sequence[Tensor], new: list[Tensor] | None = None, even: bool | None = None
    ):
        self.lengths = lengths
        self.caches = caches
        self.new: list[Tensor] = [] if new is None else new
        self.even = bool((lengths == lengths[0]).all()) if even is None else even

    def extend(self, x: Tensor, left: int, right: int = 0) -> Tensor:
        past = left + right
        if not past:
            return x
        joined = torch.cat((self.caches[len(self.new)], x.mT), dim=1)
        if self.even:
            end = int(self.lengths[0])
            self.new.append(joined[:, end : end + past].clone())  # a view would keep all of it alive
        else:
            where = self.lengths[:, None] + torch.arange(past, device=x.device)
            self.new.append(joined.gather(1, where.unsqueeze(2).expand(-1, -1, x.shape[1])))
        return joined.mT

    def upsampled(self, rate: int) -> ChunkFlow:
        return ChunkFlow(self.lengths * rate, self.caches, self.new, self.even)


Flow = WholeFlow | ChunkFlow


# ------------------------------------------------------------------------------------------------------- convolutions
def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int = 1,
    packed: Packed | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``F.conv1d`` of x [B, C, T] with weight [C', C, K]; on a CPU without gradients by oneDNN whatever the size.

    Args:
        packed: the weight as ``pack`` laid it out; used where there are no gradients, and x is still of its type and on
            its device.
        residual: [B, C', T - (K - 1) * dilation], added to the result.
    """
    fast = not torch.is_grad_enabled() and _onednn(x)
    if fast and packed is not None:
        shape = ((0, 0), (1, 1), (1, dilation), 1)
        x = x.unsqueeze(2)
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(x, packed.weight, bias, *shape, "none", [], "").squeeze(2)
        residual = residual.unsqueeze(2)
        add = torch.ops.mkldnn._convolution_pointwise.binary
        return add(x, residual, packed.weight, bias, *shape, "add", 1.0, None, [], None).squeeze(2)
    if fast:
        y = torch.mkldnn_convolution(x.unsqueeze(2), weight.unsqueeze(2), bias, (0, 0), (1, 1), (1, dilation), 1)
        y = y.squeeze(2)
    else:
        y = F.conv1d(x, weight, bias, dilation=dilation)
    return y if residual is None else residual + y


def _onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and torch.backends.mkldnn.is_available()


class Packed:
    """A weight in oneDNN's own layout. Copies of a model share it; of a pickled model it is left out."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __deepcopy__(self, memo: dict) -> Packed:
        return self

    def __reduce__(self) -> tuple:
        return type(None), ()


def pack(weight: Tensor, dilation: int = 1) -> Packed | None:
    """A weight [C', C, K] as oneDNN's kernels read it. None: there is no oneDNN, or not for this type or device."""
    if not _onednn(weight):
        return None
    shape = ((0, 0), (1, 1), (1, dilation), 1)
    weight = weight.detach().unsqueeze(2).contiguous()
    return Packed(torch.ops.mkldnn._reorder_convolution_weight(weight, *shape, None))


class Conv(nn.Conv1d):
    """1-d convolution over [B, C, T] that keeps T: zeros on both sides, or before alone when causal.

    Args:
        ahead: inputs that a causal one sees ahead all the same.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, dilation: int = 1, causal: bool = False, ahead: int = 0):
        super().__init__(c_in, c_out, kernel, dilation=dilation)
        span = (kernel - 1) * dilation
        self.right = ahead if causal else span // 2
        self.left = span - self.right
        self.packed: Packed | None = None

    def forward(self, x: Tensor, flow: Flow, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x = flow.extend(x, self.left, self.right)
        return convolve(x, self.weight, self.bias, self.dilation[0], self.packed, residual)

    def pack(self) -> None:
        self.packed = pack(self.weight, self.dilation[0])


class Upsample(nn.ConvTranspose1d):
    """Transposed convolution, [B, C, T] to [B, C', rate * T].

    Causal: the first ``rate * T`` outputs of the full transposed convolution, so that sample t depends on the inputs
    up to t // rate.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, rate: int, causal: bool = False):
        super().__init__(c_in, c_out, kernel, rate, padding=0 if causal else (kernel - rate) // 2)
        self.rate = rate
        self.past = -(-kernel // rate) - 1 if causal else 0
        self.causal = causal

    def pack(self) -> None:
        """Lay the weight out as ``_by_blocks`` reads it.

        Not in oneDNN's own layout: for these shapes that depends on the input's length, and a wrong one costs
        milliseconds.
        """
        if self.causal:
            self.weight.data = self.weight.data.permute(2, 1, 0).contiguous().permute(2, 1, 0)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:  # type: ignore[override]
        size = x.shape[-1]
        x = flow.extend(x, self.past)
        if self.causal and self.kernel_size[0] == (self.past + 1) * self.rate and not torch.is_grad_enabled():
            return self._by_blocks(x, size)
        y = super().forward(x)
        return y[..., self.past * self.rate :][..., : size * self.rate] if self.causal else y

    def _by_blocks(self, x: Tensor, size: int) -> Tensor:
        """The same as one product per input and a sum of shifted blocks of ``rate`` outputs; [B, C, past + size]."""
        weight = self.weight.permute(2, 1, 0).reshape(-1, self.in_channels, 1)  # [K * C', C, 1]
        blocks = convolve(x, weight, None).mT.unflatten(2, (self.past + 1, -1))  # [B, past + size, K / rate, rate * C']
        y = sum(blocks[:, self.past - i :, i][:, :size] for i in range(self.past + 1))
        return (y.unflatten(2, (self.rate, -1)).flatten(1, 2) + self.bias).mT


class ResBlock(nn.Module):
    """HiFi-GAN's residual blocks: type 1 has two convolutions per dilation, type 2 one."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int], kind: str, causal: bool):
        super().__init__()
        first = nn.ModuleList(Conv(channels, channels, kernel, d, causal) for d in dilations)
        if kind == "1":
            self.convs1 = first
            self.convs2 = nn.ModuleList(Conv(channels, channels, kernel, 1, causal) for _ in dilations)
        else:
            self.convs = first

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        if hasattr(self, "convs"):
            for conv in self.convs:
                x = conv(F.leaky_relu(x, SLOPE), flow, residual=x)
            return x
        for conv1, conv2 in zip(self.convs1, self.convs2):
            x = conv2(F.leaky_relu(conv1(F.leaky_relu(x, SLOPE), flow), SLOPE), flow, residual=x)
        return x

    def in_order(self) -> list[Conv]:
        """The convolutions, in the order in which they run."""
        if hasattr(self, "convs"):
            return list(self.convs)
        return [conv for pair in zip(self.convs1, self.convs2) for conv in pair]


class ContextLayer(nn.Module):
    """Residual convolution over units [B, C, U]; sees ``right`` units ahead."""

    def __init__(self, channels: int, kernel: int, right: int):
        super().__init__()
        self.left, self.right = kernel - 1 - right, right
        self.conv = nn.Conv1d(channels, channels, kernel)
        self.proj = nn.Conv1d(channels, channels, 1)
        self.packed: tuple[Packed | None, Packed | None] = None, None

    def pack(self) -> None:
        self.packed = pack(self.conv.weight), pack(self.proj.weight)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        joined = flow.extend(x, self.left, self.right)
        kept = joined[..., self.left : self.left + x.shape[-1]]  # the input, delayed like the convolution's output
        y = F.leaky_relu(convolve(joined, self.conv.weight, self.conv.bias, packed=self.packed[0]), SLOPE)
        return convolve(y, self.proj.weight, self.proj.bias, packed=self.packed[1], residual=kept)


class DurationPredictor(nn.Module):
    """Log-durations of units: [B, C, U] to [B, U], log(frames + 1) (FastSpeech 2's variance predictor)."""

    def __init__(self, config: DurationConfig, causal: bool):
        super().__init__()
        hidden, kernel = config.var_pred_hidden_dim, config.var_pred_kernel_size
        self.conv1 = nn.Sequential(Conv(config.encoder_embed_dim, hidden, kernel, causal=causal))
        self.ln1 = nn.LayerNorm(hidden)
        self.conv2 = nn.Sequential(Conv(hidden, hidden, kernel, causal=causal))
        self.ln2 = nn.LayerNorm(hidden)
        self.proj = nn.Linear(hidden, 1)
        self.dropout = config.var_pred_dropout

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        for conv, norm in ((self.conv1[0], self.ln1), (self.conv2[0], self.ln2)):
            x = norm(F.relu(conv(x, flow)).mT).mT
            x = F.dropout(x, self.dropout, self.training)
        return self.proj(x.mT).squeeze(2)

    @staticmethod
    def frames(scores: Tensor) -> Tensor:
        """What ``forward`` gave as whole frames."""
        return torch.round(torch.exp(scores.clamp(max=20.0)) - 1).clamp(1, MAX_DURATION)

    def in_order(self) -> list[Conv]:
        """The convolutions over what ``forward`` is given, in the order in which they run."""
        return [self.conv1[0], self.conv2[0]]

    @property
    def right(self) -> int:
        """Units of look-ahead."""
        return sum(conv.right for conv in self.in_order())


class DurationClassifier(nn.Module):
    """Durations of units as a choice among 1..N frames; the answer is the mean of the distribution, rounded.

    It has an embedding of its own: what the frames are made of is shaped by the spectral losses, and predicts worse. A
    convolution over it (``look``) sees ``ahead`` units ahead, the residual convolutions behind none.
    """

    def __init__(self, config: DurationConfig, num_embeddings: int, ahead: int):
        super().__init__()
        width, hidden, kernel = config.encoder_embed_dim, config.var_pred_hidden_dim, config.var_pred_kernel_size
        self.dict = nn.Embedding(num_embeddings, width)
        self.first = Conv(width, hidden, kernel, causal=True, ahead=ahead)
        self.convs = nn.ModuleList(Conv(hidden, hidden, kernel, causal=True) for _ in range(config.var_pred_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(config.var_pred_layers + 1))
        self.proj = nn.Linear(hidden, config.var_pred_max_frames)
        self.dropout = config.var_pred_dropout

    def look(self, x: Tensor, flow: Flow) -> Tensor:
        """Its embeddings of the units [B, C, U], zeros beyond the ends, to the input of ``forward`` [B, H, U]."""
        return self.norms[0](F.relu(self.first(x, flow)).mT).mT

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        """[B, H, U] to logits [B, U, N]; the first is of one frame."""
        for conv, norm in zip(self.convs, self.norms[1:]):
            x = x + F.dropout(norm(F.relu(conv(x, flow)).mT), self.dropout, self.training).mT
        return self.proj(x.mT)

    @staticmethod
    def frames(scores: Tensor) -> Tensor:
        """What ``forward`` gave as whole frames; exact ties go to the even number, as ONNX's Round has it."""
        choices = torch.arange(1, scores.shape[2] + 1, dtype=scores.dtype, device=scores.device)
        return torch.round(scores.softmax(2) @ choices)

    def in_order(self) -> list[Conv]:
        """The convolutions over what ``forward`` is given, in the order in which they run."""
        return list(self.convs)


def pack_weights(module: nn.Module) -> None:
    """Make a model ready to speak on a CPU: keep its convolutions' weights a second time, as oneDNN reads them.

    Without it every call would rearrange them: as much work as the convolution itself on a chunk of 320 ms. The model
    must not be trained or loaded afterwards; what it says without gradients follows the weights as they are now.
    """
    for layer in module.modules():
        if isinstance(layer, (Conv, Upsample, ContextLayer)):
            layer.pack()
