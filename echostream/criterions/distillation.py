"""What a full-context Whisper teaches a model that streams: its encoder's frames, its decoder's distributions.

Letters in shapes: B rows, S sentences, T feature frames (10 ms), N inner frames of the student (20 ms), D width, U MT
target tokens, V target dictionary, K entries of it that are one token of Whisper's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from echostream.constants import EOS, PAD, WHISPER_SILENCE
from echostream.errors import CheckpointError, ConfigError
from echostream.whisper.reference import WhisperReference
from echostream.whisper.source import whisper_source
from echostream.whisper.subwords import TokenOrigins, piece_origins
from echostream.whisper.tokens import WhisperBPE, prompt

TARGETS = ("frames", "tokens", "both")
# On ten real recordings, against 30 s of silence, with Whisper base: strides of 4, 8, 16 and 32 have an error of 0.004,
# 0.018, 0.031 and 0.050 of the frames' variance (students are at 0.3 and above); 16 costs three quarters of 8. Silence
# of 2, 5 and 10 s and nothing behind it has errors of 0.11, 0.07 and 0.035.
SILENCE, STRIDE = 20, 16
# A dimension that hardly moves within an item counts as one that moves half as much as most.
LEAST_DEVIATION = 0.5


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What the teacher makes of a batch.

    Attributes:
        frames: float32 [B, N', D] behind its encoder's last norm.
        lengths: [B], frames of each row with the silence just behind it.
        mask: float [B, N'], what attention adds to its scores over them (see ``WhisperReference.encode_padded``).
    """

    frames: Tensor
    lengths: Tensor
    mask: Tensor


class WhisperTeacher:
    """A Whisper model that is never trained and no part of any other: it is no module, so that nobody saves it.

    It hears what the student hears, augmentation and masks included unless the batch has it clean, behind one frame of
    silence (see ``WhisperStem``) and with silence behind up to the end of its window: without, its decoder invents. Of
    an item longer than its window (30 s) it hears the beginning.

    Args:
        source: see ``whisper_source``; a directory with its tokenizer where distributions are wanted.
        targets: ``frames``, ``tokens`` or ``both``.
        task: whose dictionary and languages count.
        silence: feature frames (10 ms) behind an item that are computed one by one.
        stride: of the frames of silence behind those, one in so many is computed; 0: there is no more silence.

    Raises:
        CheckpointError: the source cannot be used. ConfigError: the task's features or languages do not fit.
    """

    def __init__(self, source: str, targets: str, task: Any, silence: int = SILENCE, stride: int = STRIDE):
        config = task.config
        if getattr(task, "reads_text", False):
            raise ConfigError("--distill-weight: a teacher hears speech, but --source is text")
        if config.features != "whisper":
            raise ConfigError(f"--distill-teacher hears whisper features, but the data's are {config.features}")
        path = whisper_source(source)
        self.model = WhisperReference.load(path)
        self.source, self.silence, self.stride = source, silence, stride
        self.prompt: tuple[int, ...] = ()
        if targets != "frames":
            if config.target_lang not in ("", "en"):
                raise ConfigError(f"--distill-target {targets}: Whisper writes English, not {config.target_lang!r}")
            bpe, n_vocab = WhisperBPE.load(path), self.model.dims.n_vocab
            self.prompt = prompt(n_vocab, bpe.end_of_text, config.source_lang, "translate")
            self.origins: TokenOrigins = piece_origins(bpe, config.target.vocabulary)
            single = torch.from_numpy(self.origins.single)
            if int(single.max()) >= n_vocab:
                raise CheckpointError(f"{source}: the tokenizer has token {int(single.max())}, the model {n_vocab}")
            self.entries = (single >= 0).nonzero()[:, 0]  # [K] of the dictionary
            self.tokens = single[self.entries]  # [K] of Whisper's vocabulary

    @torch.no_grad()
    def hear(self, features: Tensor, lengths: Tensor) -> Lesson:
        """Features [B, T, 80], ``lengths`` [B] of them, as a batch holds them. Rows do not depend on each other.

        Raises:
            CheckpointError: they have another number of mel bins.
        """
        self.model.to(features.device)
        dims = self.model.dims
        if features.shape[2] != dims.n_mels:
            raise CheckpointError(f"{self.source} hears {dims.n_mels} mel bins, the student {features.shape[2]}")
        limit = 2 * dims.n_audio_ctx
        size = min(1 + features.shape[1] + self.silence, limit)
        mel = torch.full((len(features), size, dims.n_mels), WHISPER_SILENCE, device=features.device)
        heard = features[:, : size - 1].float()
        valid = torch.arange(heard.shape[1], device=features.device) < lengths[:, None]
        mel[:, 1 : 1 + heard.shape[1]] = torch.where(valid[:, :, None], heard, WHISPER_SILENCE)
        counts = (1 + lengths + self.silence).clamp(max=limit)
        frames, mask = self.model.encode_padded(mel.transpose(1, 2), counts, self.stride)
        return Lesson(frames.float(), -(-counts // 2), mask)

    @torch.no_grad()
    def distributions(self, lesson: Lesson, row: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing along the sentences ``target`` [S, U] (dictionary indices, end symbol last) of ``row`` [S].

        An entry of several tokens stands for them in what the teacher has read; where an entry has none (``<unk>``) and
        where the teacher's positions end, it has nothing to say of the rest.

        Returns:
            (log probabilities float32 [S, U, K] over ``entries``; [S, U], true where there are some).
        """
        longest = self.model.dims.n_text_ctx
        read: list[list[int]] = []
        places: list[list[int]] = []  # of each sentence: where the teacher foretells its tokens
        for sentence in target.tolist():
            ids, found = list(self.prompt), []
            for entry in sentence:
                if entry == PAD or len(ids) > longest:
                    break
                found.append(len(ids) - 1)
                if entry == EOS or not self.origins.tokens[entry]:
                    break
                ids += self.origins.tokens[entry]
            read.append(ids[:longest])
            places.append(found)
        device, size = lesson.frames.device, target.shape[1]
        prompted = pad_sequence([torch.tensor(ids) for ids in read], batch_first=True)
        index = torch.tensor([found + [0] * (size - len(found)) for found in places], device=device)
        known = (
            torch.arange(size, device=device) < torch.tensor([len(found) for found in places], device=device)[:, None]
        )
        logits = self.model.decode(
            prompted.to(device), lesson.frames[row], lesson.mask[row], self.tokens.to(device)
        ).float()
        index = index[:, :, None].expand(-1, -1, logits.shape[2])
        return logits.gather(1, index).log_softmax(-1), known


def frame_loss(lesson: Lesson, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of the student's frames [B, N, D], ``lengths`` [B] of them.

    Each dimension is measured by the teacher's deviation within the item (Whisper's output has a few loud ones, which
    would be all that counts); within the item, so that its loss depends on nothing else in the batch. Frames that the
    teacher did not hear are left out.

    Returns:
        ([B], mean over the frames of the mean over the dimensions; [B] frames compared).

    Raises:
        CheckpointError: the student's frames are of another width or rate.
    """
    size = min(frames.shape[1], lesson.frames.shape[1])
    wanted, found = lesson.frames[:, :size], frames[:, :size].float()
    if wanted.shape[2] != found.shape[2]:
        raise CheckpointError(
            f"encoder_embed_dim is {found.shape[2]}, but the teacher's frames have {wanted.shape[2]} dimensions"
        )
    counts = torch.minimum(lengths, lesson.lengths)
    valid = (torch.arange(size, device=frames.device) < counts[:, None])[:, :, None]
    frames_of = counts.clamp(min=1)[:, None]
    mean = (wanted * valid).sum(1) / frames_of
    deviation = (((wanted - mean[:, None]) * valid).square().sum(1) / frames_of).sqrt()
    deviation = torch.maximum(deviation, LEAST_DEVIATION * deviation.median(1, keepdim=True).values).clamp(min=1e-3)
    error = ((found - wanted) / deviation[:, None]).masked_fill(~valid, 0.0).square().mean(2)
    return error.sum(1) / frames_of[:, 0], counts


def token_loss(teacher: Tensor, known: Tensor, logits: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Kullback-Leibler divergence of the student's distributions from the teacher's over ``entries`` [K].

    Args:
        teacher, known: see ``WhisperTeacher.distributions``. logits: the student's, [S, U, V].

    Returns:
        ([S], mean over the known positions; [S] how many there are).
    """
    student = logits[..., entries.to(logits.device)].float().log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1).masked_fill(~known, 0.0)
    counts = known.sum(1)
    return divergence.sum(1) / counts.clamp(min=1), counts
