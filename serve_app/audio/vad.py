"""Voice activity: silero-vad's network, computed over many frames at once.

The network looks at 32 ms at a time and carries its state from frame to frame, so silero-vad runs it frame by frame.
But only its last, small, recurrent layer needs the order; the convolutions before it take all frames of a block as one
batch. The probabilities are the same, for less than a tenth of the CPU time.

Weights and architecture: silero-vad 6, https://github.com/snakers4/silero-vad (MIT). They are read from the installed
package's files without importing it, because its import sets torch's number of threads for the whole process.
"""

from __future__ import annotations

import importlib.util
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serve_app.audio.samples import FRAME_SAMPLES, INT16_SCALE, Float32, Int16

CONTEXT_SAMPLES = 64  # of the frame before, seen again
WINDOW_SAMPLES = 256  # of its Fourier transforms, every 128 samples
BANDS = WINDOW_SAMPLES // 2 + 1
STATE = 128


class SileroNetwork(nn.Module):
    """Frames [n, 64 + 512] in [-1, 1] in their order → probabilities of speech [n].

    The convolutions run over four positions in time, then two, then one: too few for a convolution's code, so each
    position is a matrix product over its three neighbours, which lie side by side in memory. It takes a third of the
    time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window = nn.Buffer(torch.hann_window(WINDOW_SAMPLES), persistent=False)
        self.encoder = nn.ModuleList(
            [
                Taps(BANDS, 128, positions=4),
                Taps(128, 64, positions=4, stride=2),
                Taps(64, 64, positions=2, stride=2),
                Taps(64, STATE, positions=1),
            ]
        )
        self.recurrent = nn.LSTM(STATE, STATE)
        self.output = nn.Linear(STATE, 1)

    def forward(self, frames: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        padded = F.pad(frames[:, None], (0, CONTEXT_SAMPLES), "reflect")[:, 0]
        windows = padded.unfold(1, WINDOW_SAMPLES, WINDOW_SAMPLES // 2) * self.window  # [n, 4, 256]
        spectrum = torch.fft.rfft(windows)
        x = (spectrum.real * spectrum.real).addcmul_(spectrum.imag, spectrum.imag).sqrt_()  # abs() is slow; [n, 4, 129]
        for layer in self.encoder:
            x = layer(x)
        hidden, state = self.recurrent(x[:, 0], state)
        return self.output(hidden.relu())[:, 0].sigmoid(), state


class Taps(nn.Module):
    """A convolution with three taps and padding on both sides, and ReLU: [n, positions, before] →
    [n, positions / stride, after]."""

    def __init__(self, before: int, after: int, *, positions: int, stride: int = 1):
        super().__init__()
        self.positions, self.stride = positions, stride
        self.weight = nn.Parameter(torch.empty(3 * before, after))
        self.bias = nn.Parameter(torch.empty(after))

    def forward(self, x: Tensor) -> Tensor:
        n, _, before = x.shape
        after = len(self.bias)
        y = x.new_empty(n, len(range(0, self.positions, self.stride)), after)
        flat = x.reshape(n, -1)
        for i, position in enumerate(range(0, self.positions, self.stride)):
            # neighbours outside are zeros: their taps are left out
            first, last = max(0, position - 1), min(self.positions, position + 2)
            weight = self.weight[(first - position + 1) * before : (last - position + 1) * before]
            torch.addmm(self.bias, flat[:, first * before : last * before], weight, out=y[:, i])
        return y.relu_()


THREADS = 2
"""Of one detector. More would only wait for each other: between its products the network is Python."""


class SpeechDetector:
    """Finds speech in recordings, each through a stream of its own. threads: where its work belongs."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="voice-activity")
        self._network = SileroNetwork()
        self._network.load_state_dict(_weights())
        self._network.eval()

    def stream(self) -> SpeechStream:
        return SpeechStream(self._network)


class SpeechStream:
    """The probabilities of one recording, a frame of 32 ms each, whatever the blocks it comes in."""

    def __init__(self, network: SileroNetwork):
        self._network = network
        self._state = (torch.zeros(1, STATE), torch.zeros(1, STATE))
        self._context = np.zeros(CONTEXT_SAMPLES, np.float32)
        self._rest = np.zeros(0, np.int16)

    def push(self, samples: Int16) -> Float32:
        """Takes int16 [n] at 16 kHz, returns the probabilities [m] of the frames completed."""
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) // FRAME_SAMPLES * FRAME_SAMPLES
        self._rest = samples[whole:]
        return self._run(samples[:whole])

    def flush(self) -> Float32:
        """The probability of the last, incomplete frame, as if silence followed: [1], or [0] if there is none."""
        rest, self._rest = self._rest, self._rest[:0]
        return self._run(np.pad(rest, (0, -len(rest) % FRAME_SAMPLES)))

    @torch.inference_mode()
    def _run(self, samples: Int16) -> Float32:
        if len(samples) == 0:
            return np.zeros(0, np.float32)
        signal = np.concatenate([self._context, samples.astype(np.float32) / INT16_SCALE])
        self._context = signal[-CONTEXT_SAMPLES:]
        frames = torch.from_numpy(signal).unfold(0, CONTEXT_SAMPLES + FRAME_SAMPLES, FRAME_SAMPLES)
        probabilities, self._state = self._network(frames, self._state)
        result: Float32 = probabilities.numpy()
        return result


def _weights() -> dict[str, Tensor]:
    """From the TorchScript file, which silero-vad runs itself; its safetensors file holds an older network."""
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("silero-vad is not installed")
    path = Path(spec.submodule_search_locations[0]) / "data" / "silero_vad.jit"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, which is only read here
        script = torch.jit.load(str(path), map_location="cpu")
    theirs: dict[str, Tensor] = script.state_dict()
    names: dict[str, str] = {}
    for parameter in ("weight", "bias"):
        names |= {f"encoder.{i}.{parameter}": f"_model.encoder.{i}.reparam_conv.{parameter}" for i in range(4)}
        names |= {f"recurrent.{parameter}_{k}_l0": f"_model.decoder.rnn.{parameter}_{k}" for k in ("ih", "hh")}
        names[f"output.{parameter}"] = f"_model.decoder.decoder.2.{parameter}"
    weights = {ours: theirs[name].detach().clone() for ours, name in names.items()}
    for i in range(4):
        kernel = weights[f"encoder.{i}.weight"]  # [after, before, 3]
        weights[f"encoder.{i}.weight"] = kernel.permute(2, 1, 0).reshape(-1, len(kernel)).contiguous()
    weights["output.weight"] = weights["output.weight"][..., 0]
    return weights
