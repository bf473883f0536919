"""CodeHiFiGAN files: ``{"generator": ...}`` checkpoints, ours and the field's, with their ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from echostream.errors import CheckpointError
from echostream.files import replacing, write_json
from echostream.models.decoders.vocoder import CodeHiFiGAN
from echostream.models.decoders.vocoder_config import VocoderConfig
from echostream.models.decoders.vocoder_generator import NORMED
from echostream.models.decoders.vocoder_layers import Conv, Upsample, pack_weights
from echostream.weights import check_tensors, read_weights, with_weights


def _field_layout(model: CodeHiFiGAN) -> dict[str, Tensor]:
    """The weights as the field stores them: weight norm as ``weight_g`` and ``weight_v``."""
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        normed = isinstance(module, (Conv, Upsample)) and name.startswith(NORMED)
        for key, value in module.named_parameters(recurse=False):
            if normed and key == "weight":
                continue
            state[f"{name}.{key}"] = value.detach()
        if normed:
            weight = module.weight.detach()
            state[f"{name}.weight_g"] = weight.norm(dim=(1, 2), keepdim=True)
            state[f"{name}.weight_v"] = weight
    return state


def _plain_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight norm in either of PyTorch's layouts folded into plain weights (Salimans & Kingma, 2016)."""
    plain: dict[str, Tensor] = {}
    pairs = ((".weight_g", ".weight_v"), (".parametrizations.weight.original0", ".parametrizations.weight.original1"))
    for key, value in state.items():
        for g, v in pairs:
            if key.endswith(g):
                base = key[: -len(g)]
                if base + v not in state:
                    raise CheckpointError(f"{base + v} is missing beside {key}")
                direction = state[base + v].double()
                if direction.dim() != 3 or value.numel() not in (1, len(direction)):
                    raise CheckpointError(f"{key} {list(value.shape)} does not fit {v} {list(direction.shape)}")
                norm = direction.norm(dim=tuple(range(1, direction.dim())), keepdim=True)
                plain[base + ".weight"] = (direction * (value.double() / norm.clamp(min=1e-20))).float()
                break
            if key.endswith(v):
                if key[: -len(v)] + g not in state:
                    raise CheckpointError(f"{key[: -len(v)] + g} is missing beside {key}")
                break
        else:
            plain[key] = value.float()
    return plain


def load_generator_state(path: str | Path) -> dict[str, Tensor]:
    """The ``generator`` weights of a checkpoint file, weight norm folded in.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, or holds more than tensors.
    """
    content = read_weights(path, "vocoder checkpoint")
    state = content.get("generator") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"vocoder checkpoint {path} has no 'generator' weights; it is no CodeHiFiGAN checkpoint")
    state = check_tensors(state, f"vocoder checkpoint {path}")
    try:
        return _plain_layout(state)
    except CheckpointError as error:
        raise CheckpointError(f"vocoder checkpoint {path}: {error}") from None


def load_vocoder(
    checkpoint_path: str | Path, config_path: str | Path, device: str | torch.device = "cpu"
) -> CodeHiFiGAN:
    """Read a CodeHiFiGAN, ours or the field's, ready to speak.

    Args:
        checkpoint_path: ``{"generator": state_dict}``, with weight norm or without.
        config_path: its config.json.

    Raises:
        ConfigError: the configuration is missing, incomplete or not supported.
        CheckpointError: the checkpoint cannot be read, or does not fit the configuration.
    """
    config, state = VocoderConfig.from_json(config_path), load_generator_state(checkpoint_path)
    return vocoder_of(config, state, f"vocoder checkpoint {checkpoint_path}", str(config_path), device)


def vocoder_of(
    config: VocoderConfig, state: Mapping[str, Tensor], name: str, where: str, device: str | torch.device = "cpu"
) -> CodeHiFiGAN:
    """A CodeHiFiGAN with these plain weights, ready to speak.

    Args:
        name, where: of the weights and of the configuration, for the message.

    Raises:
        CheckpointError: they do not fit each other.
    """
    model = with_weights(lambda: CodeHiFiGAN(config), state, lambda empty: check_weights(empty, state, name, where))
    if torch.device(device).type == "cpu":
        pack_weights(model)
    return model.to(device).eval()


def load_weights(model: CodeHiFiGAN, state: Mapping[str, Tensor], name: str, config: str = "its configuration") -> None:
    """Copy plain weights into a model without weight norm.

    Raises:
        CheckpointError: a weight is missing, unknown, of another shape, or not finite.
    """
    check_weights(model, state, name, config)
    model.load_state_dict(dict(state))


def check_weights(model: CodeHiFiGAN, state: Mapping[str, Tensor], name: str, config: str) -> None:
    """Compare names and shapes of plain weights with a model's.

    Raises:
        CheckpointError: a weight is missing, unknown, of another shape, or not finite.
    """
    expected = model.state_dict()
    for key in expected:
        if key not in state:
            raise CheckpointError(f"{name} has no weight {key!r}; it does not fit {config}")
        if state[key].shape != expected[key].shape:
            raise CheckpointError(
                f"{name}: {key} has shape {list(state[key].shape)}, {config} asks for {list(expected[key].shape)}"
            )
        if not torch.isfinite(state[key]).all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinity")
    unknown = [key for key in state if key not in expected]
    if unknown:
        raise CheckpointError(f"{name} has a weight {unknown[0]!r} that {config} does not know")


def save_vocoder(model: CodeHiFiGAN, checkpoint_path: str | Path, config_path: str | Path, half: bool = False) -> None:
    """Write ``{"generator": ...}`` in the field's layout and the config.json beside it.

    Args:
        half: store fp16 (for shipping; loading gives fp32 again).
    """
    state = _field_layout(model)
    state = {key: (value.half() if half else value.float()).cpu().contiguous().clone() for key, value in state.items()}
    with replacing(checkpoint_path) as file:
        torch.save({"generator": state}, file)
    write_json(config_path, model.config.to_dict())
