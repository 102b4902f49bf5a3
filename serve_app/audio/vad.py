"""Voice activity: silero-vad's network, computed over many frames at once.

The network looks at 32 ms at a time and carries its state from frame to frame, so silero-vad runs it frame by frame.
But only its last, small, recurrent layer needs the order; the convolutions before it take all frames of a portion as
one batch, and the recurrent layer takes portions of several recordings side by side. The probabilities are the same,
for less than a tenth of the CPU time.

Weights and architecture: silero-vad 6, https://github.com/snakers4/silero-vad (MIT). They are read from the installed
package's files without importing it, because its import sets torch's number of threads for the whole process.
"""

from __future__ import annotations

import importlib.util
import itertools
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from serve_app.audio.samples import FRAME_SAMPLES, INT16_SCALE, Float32, Int16

CONTEXT_SAMPLES = 64  # of the frame before, seen again
WINDOW_SAMPLES = 256  # of its Fourier transforms, every 128 samples
BANDS = WINDOW_SAMPLES // 2 + 1
STATE = 128


class SileroNetwork(nn.Module):
    """Portions of b recordings, each n frames [n, 64 + 512] in [-1, 1] in their order → probabilities of speech [n, b].
    state: that after the portions before, [1, b, 128] twice.

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

    def forward(self, portions: Sequence[Tensor], state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        # one after the other up to here: what a portion's convolutions work on fits a core's cache
        hidden, state = self.recurrent(torch.stack([self._encode(frames) for frames in portions], 1), state)
        return self.output(hidden.relu())[..., 0].sigmoid(), state

    def _encode(self, frames: Tensor) -> Tensor:
        mirrored = frames[:, -CONTEXT_SAMPLES - 1 : -1].flip(1)  # what F.pad calls reflect, in a sixth of its time
        windows = torch.cat([frames, mirrored], 1).unfold(1, WINDOW_SAMPLES, WINDOW_SAMPLES // 2) * self.window
        squares = torch.view_as_real(torch.fft.rfft(windows)).square_()
        x: Tensor = (squares[..., 0] + squares[..., 1]).sqrt_()  # abs() takes four times as long
        for layer in self.encoder:
            x = layer(x)
        return x[:, 0]


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
TOGETHER = 8
"""Most portions that are computed at once: the recurrent layer then takes 0.4 of the time for each."""
ROUND_FRAMES = 938
"""So much of a recording, 30 s, is looked at before those that came meanwhile have their turn. Of recordings that come
together the first then have windows soon; portion by portion all would have theirs at the end, and the GPU nothing to
do until then."""


@dataclass(frozen=True, slots=True, eq=False)
class Portion:
    """samples: int16 [64 + 512 n], those of the frame before and whole frames. place: smaller ones come first. result:
    their probabilities, [n]."""

    stream: SpeechStream
    samples: Int16
    place: int
    result: Future[Float32]


class SpeechDetector:
    """Finds speech in recordings, each through a stream of its own.

    Portions of different recordings that wait at the same time are computed together, if they are of one length; those
    of the recordings that came first, come first.
    """

    def __init__(self) -> None:
        self._network = SileroNetwork()
        self._network.load_state_dict(_weights())
        self._network.eval()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="voice-activity")
        self._lock = threading.Lock()
        self._waiting: list[Portion] = []
        self._places = itertools.count()

    def place(self) -> int:
        """Behind all that have one."""
        return next(self._places)

    def stream(self) -> SpeechStream:
        return SpeechStream(self)

    def submit(self, portion: Portion) -> None:
        """Computes it as soon as there is time; what comes of it is its result."""
        with self._lock:
            self._waiting.append(portion)
        self._threads.submit(self._run)  # as often as there are portions, so that none is left

    def _run(self) -> None:
        portions = [portion for portion in self._take() if portion.result.set_running_or_notify_cancel()]
        if not portions:
            return
        try:
            results = self._probabilities(portions)
        except Exception as error:
            for portion in portions:
                portion.result.set_exception(error)
            return
        for portion, result in zip(portions, results, strict=True):
            portion.result.set_result(result)

    def _take(self) -> list[Portion]:
        """The portion whose turn it is, and the next of its length."""
        with self._lock:
            self._waiting.sort(key=lambda portion: portion.place)
            taken = [p for p in self._waiting if len(p.samples) == len(self._waiting[0].samples)][:TOGETHER]
            self._waiting = [portion for portion in self._waiting if portion not in taken]
        return taken

    @torch.inference_mode()
    def _probabilities(self, portions: Sequence[Portion]) -> list[Float32]:
        frames = [
            torch.from_numpy(portion.samples.astype(np.float32) / INT16_SCALE).unfold(
                0, CONTEXT_SAMPLES + FRAME_SAMPLES, FRAME_SAMPLES
            )
            for portion in portions
        ]
        hidden, cell = (torch.cat(tensors, 1) for tensors in zip(*(p.stream.state for p in portions), strict=True))
        probabilities, (hidden, cell) = self._network(frames, (hidden, cell))
        for i, portion in enumerate(portions):
            portion.stream.state = hidden[:, i : i + 1], cell[:, i : i + 1]
        return list(probabilities.T.contiguous().numpy())


class SpeechStream:
    """The probabilities of one recording, a frame of 32 ms each, whatever the portions it comes in: one after the
    other, each when the one before is done.

    state: the network's, after what is done: [1, 1, 128] twice.
    """

    def __init__(self, detector: SpeechDetector):
        self._detector = detector
        self.state = (torch.zeros(1, 1, STATE), torch.zeros(1, 1, STATE))
        self._rest = np.zeros(CONTEXT_SAMPLES, np.int16)  # with the end of the frame before
        self._place, self._frames = detector.place(), 0  # that it has had in this place

    def push(self, samples: Int16, *, last: bool = False) -> Future[Float32]:
        """Takes int16 [n] at 16 kHz, gives the probabilities [m] of the frames completed. last: nothing follows; an
        incomplete frame is completed with silence."""
        samples = np.concatenate([self._rest, samples])
        if last:
            samples = np.pad(samples, (0, -(len(samples) - CONTEXT_SAMPLES) % FRAME_SAMPLES))
        whole = (len(samples) - CONTEXT_SAMPLES) // FRAME_SAMPLES * FRAME_SAMPLES
        self._rest = samples[whole:].copy()  # a view would keep all
        return self._submit(samples[: CONTEXT_SAMPLES + whole])

    def _submit(self, samples: Int16) -> Future[Float32]:
        result: Future[Float32] = Future()
        if len(samples) == CONTEXT_SAMPLES:
            result.set_result(np.zeros(0, np.float32))
            return result
        if self._frames >= ROUND_FRAMES:
            self._place, self._frames = self._detector.place(), 0
        self._frames += (len(samples) - CONTEXT_SAMPLES) // FRAME_SAMPLES
        self._detector.submit(Portion(self, samples, self._place, result))
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
