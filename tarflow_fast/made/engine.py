"""The sweep in C++ (csrc/cpu/made): weights packed in the order of the steps, rows in tiles over threads.

The univariate transforms it knows, and their constants:

    affine_zuko        (ln slope)                               parameters shift, raw scale
    affine_softplus    (epsilon)                                raw scale, shift: scale = softplus(raw) + epsilon
    affine_sigmoid     (offset, epsilon)                        sigmoid(raw + offset) + epsilon
    affine_exp         (offset, factor, epsilon)                exp(offset + factor raw) + epsilon
    spline_zuko        (K, bound, ln slope)                     K widths, K heights, K - 1 derivatives
    spline             (K, low, high, least width, height and derivative, scale of raw widths and heights, tails)
    spline_torchflows  (K, bound, least size, least derivative, offset of the raw derivatives)
"""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from tarflow_fast import native
from tarflow_fast.made.net import ACTIVATIONS, IDENTITY, Layer, Made, Unknown
from tarflow_fast.made.schedule import Schedule, standing

__all__ = ["Plan", "glance", "why_not"]

UNIVARIATES = ("affine_zuko", "affine_softplus", "affine_sigmoid", "affine_exp")
UNIVARIATES += ("spline_zuko", "spline", "spline_torchflows")
MOST_BINS, MOST_LAYERS = 64, 64  # in csrc/cpu/made
BLOCK_UNITS = 32  # of a hidden layer; more make the products within a block larger, fewer those between blocks smaller
CALL_FLOPS = 2e9  # of one native call and thread: at most 0.1 s, so that Ctrl-C is heard

_pointer, _i64, _i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Context(ctypes.Structure):
    """tf_made_context."""

    _fields_ = (
        ("weight", _pointer),
        ("bias", _pointer),
        ("stride", _i64),
        ("slope", ctypes.c_double),
        ("activation", _i32),
    )


class _Layer(ctypes.Structure):
    """tf_made_layer."""

    _fields_ = (
        *((name, _pointer) for name in ("weight", "mask", "bias", "places", "starts", "residual_at")),
        *((name, _i64) for name in ("units", "weight_stride", "mask_stride")),
        ("term", _Context),
        ("gate", _Context),
        ("slope", ctypes.c_double),
        *((name, _i32) for name in ("source", "reads_raw", "residual", "activation", "keeps_raw")),
    )


class _Made(ctypes.Structure):
    """tf_made."""

    _fields_ = (
        *((name, _pointer) for name in ("layers", "places", "starts", "blocks")),
        ("constants", ctypes.c_double * 8),
        *((name, _i64) for name in ("features", "steps", "block_count", "parameters", "context")),
        *((name, _i32) for name in ("layer_count", "univariate", "dtype")),
    )


class _Rows(ctypes.Structure):
    """tf_made_rows."""

    _fields_ = (
        *((name, _pointer) for name in ("y", "x", "log_det", "context")),
        *((name, _i64) for name in ("context_stride", "rows")),
    )


def why_not(made: Made) -> str:
    """Why the engine cannot take a transform; "" when it can."""
    if isinstance(made.univariate.engine, str):
        return made.univariate.engine
    name, constants = made.univariate.engine
    if name.startswith("spline") and constants[0] > MOST_BINS:
        return f"more than {MOST_BINS} bins"
    if len(made.layers) > MOST_LAYERS:
        return f"more than {MOST_LAYERS} layers"
    read: dict[int, set] = {}  # for each vector the activations after which it is read
    for layer in made.layers:
        read.setdefault(layer.source, set()).add(layer.activation)
    if read[0] != {IDENTITY} or any(len(each - {IDENTITY}) > 1 for each in read.values()):
        return "a vector that is read after two activations, or x after one"
    return ""


class Plan:
    """A transform of the engine's: its schedule as C reads it, and the weights that were packed last.

    The weights are packed at every call, unless it is to keep them.
    """

    def __init__(self, made: Made, schedule: Schedule, dtype: torch.dtype) -> None:
        self.schedule, self.dtype = schedule, dtype
        self._lock = threading.Lock()
        self._masks = [mask.to(torch.uint8).contiguous() for mask in schedule.masks]
        self._places = [each.to(torch.int32) for each in schedule.places]
        self._starts = [torch.tensor(each, dtype=torch.int32, device="cpu") for each in schedule.starts]
        self._blocks = torch.tensor(_blocks(schedule), dtype=torch.int32, device="cpu")
        self._residuals = [
            None if layer.residual is None else standing(schedule.places[layer.residual])[places].int()
            for layer, places in zip(made.layers, schedule.places[1:], strict=True)
        ]
        self._layers = (_Layer * len(made.layers))()
        for number, layer in enumerate(made.layers):
            readers = [each for each in made.layers if each.source == number + 1]
            own = next((each.activation for each in readers if each.activation != IDENTITY), IDENTITY)
            raw = any(each.activation == IDENTITY for each in readers)
            c = self._layers[number]
            c.mask, c.mask_stride = self._masks[number].data_ptr(), self._masks[number].size(1)
            c.places, c.starts = self._places[number + 1].data_ptr(), self._starts[number + 1].data_ptr()
            c.residual_at, c.units = native.pointer(self._residuals[number]), self._masks[number].size(0)
            c.source, c.reads_raw, c.slope = layer.source, layer.activation == IDENTITY, own.slope
            c.residual = -1 if layer.residual is None else layer.residual
            c.activation = [*ACTIVATIONS].index(own.name)
            c.keeps_raw = raw or any(each.residual == number + 1 for each in made.layers)
        name, constants = made.univariate.engine
        self._made = _Made(
            layers=ctypes.addressof(self._layers),
            places=self._places[0].data_ptr(),
            starts=self._starts[0].data_ptr(),
            blocks=self._blocks.data_ptr(),
            constants=(ctypes.c_double * 8)(*constants),
            features=made.features,
            steps=schedule.steps,
            block_count=len(self._blocks) - 1,
            parameters=made.univariate.parameters,
            context=made.context,
            layer_count=len(made.layers),
            univariate=UNIVARIATES.index(name),
            dtype=native.DTYPES[dtype],
        )
        # What the weights were, packed, and their memory: while it is held, no new weight can take the same address.
        self._kept: tuple[list, Tensor, list] | None = None
        # Memory for the next call's weights: the system gives new pages out slowly, 0.4 ms for 1.3 MB, and the weights
        # of a D of 256 and a width of 512 are packed in 0.1 ms. A call that runs at the same time takes its own.
        self._spare: Tensor | None = None

    def invert(self, made: Made, y: Tensor, context: Tensor | None, keep: bool = False) -> tuple[Tensor, Tensor]:
        """x and log |det dx/dy| of y (B, D) for a context (B, E), or (1, E) for all rows.

        keep: use the weights packed at an earlier call.

        Raises:
            RuntimeError: the weights were to be kept, and are no longer what they were.
            Unknown: a weight has a shape that does not fit the net.
            MemoryError: there is no memory for the activations of a few tiles.
        """
        packed = self._packed(made, keep)
        y = y.contiguous()
        x, log_det = torch.empty_like(y), y.new_empty(y.size(0))
        context = None if context is None else context.contiguous()
        stride = 0 if context is None or context.size(0) == 1 else context.size(1)
        threads = native.threads()
        most = max(int(CALL_FLOPS * threads / (2 * packed.numel())) // 64 * 64, 64 * threads)
        for first in range(0, y.size(0), most):
            rows = _Rows(
                y=y[first:].data_ptr(),
                x=x[first:].data_ptr(),
                log_det=log_det[first:].data_ptr(),
                context=None if context is None else context[first if stride else 0 :].data_ptr(),
                context_stride=stride,
                rows=min(most, y.size(0) - first),
            )
            call = ctypes.byref(self._made), packed.data_ptr(), ctypes.byref(rows), threads
            native.check(native.library().tf_made_invert(*call), "tf_made_invert")
        if not keep:
            self._spare = packed
        return x, log_det

    def _packed(self, made: Made, keep: bool) -> Tensor:
        seen = [glance(each) for each in (*made.parameters, *made.statistics)] if keep else []
        if keep and self._kept is not None:
            if self._kept[0] != seen:
                raise RuntimeError("made: the weights were changed after freeze(); call freeze() again, or unfreeze()")
            return self._kept[1]
        library = native.library()
        with self._lock:  # another thread's tensors must not take the place of these while they are read
            held = [_link(c, layer, made.context) for c, layer in zip(self._layers, made.layers, strict=True)]
            packed, self._spare = self._spare, None
            if packed is None:
                numbers = library.tf_made_numbers(ctypes.byref(self._made))
                packed = torch.empty(numbers, dtype=self.dtype, device="cpu")
            status = library.tf_made_pack(ctypes.byref(self._made), packed.data_ptr(), native.threads())
            del held
        native.check(status, "tf_made_pack")
        if keep:
            memory = [each.untyped_storage() for each in (*made.parameters, *made.statistics)]
            self._kept = seen, packed, memory
        return packed


def glance(tensor: Tensor) -> tuple[int, int, int | None]:
    """What changes when a tensor is replaced, moved or written."""
    return id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _link(c: _Layer, layer: Layer, context: int) -> list[Tensor]:
    """Point C at the weights as they are now. Returns what has to live as long as C reads.

    Raises:
        Unknown: a weight or a bias has another shape than C would read.
    """
    held: list[Tensor] = []

    def address(tensor: Tensor | None, columns: int | None = None) -> int | None:
        if tensor is None:
            return None
        fits = tensor.dim() == 1 if columns is None else tensor.dim() == 2 and tensor.size(1) >= columns
        if not fits or tensor.size(0) != c.units:
            raise Unknown(f"a weight or bias of shape {tuple(tensor.shape)} for {c.units} units")
        held.append(tensor.detach().contiguous())
        return held[-1].data_ptr()

    c.weight = address(layer.weight(), c.mask_stride)
    c.weight_stride, c.bias = held[-1].stride(0), address(layer.bias())
    for function, into in ((layer.term, c.term), (layer.gate, c.gate)):
        if function is not None:
            into.weight = address(function.weight(), context)
            into.stride, into.bias = held[-1].stride(0), address(function.bias())
            into.activation, into.slope = [*ACTIVATIONS].index(function.activation.name), function.activation.slope
    return held


def _blocks(schedule: Schedule) -> list[int]:
    """Where blocks of steps begin, and the end: as many steps as keep a hidden layer at BLOCK_UNITS units."""
    hidden = schedule.starts[1:-1] or schedule.starts[:1]
    bounds = [0]
    for s in range(1, schedule.steps):
        if any(starts[s + 1] - starts[bounds[-1]] > BLOCK_UNITS for starts in hidden):
            bounds.append(s)
    return [*bounds, schedule.steps]
